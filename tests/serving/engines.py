"""Exports of the trained demo model, servers, and the comparison with transformers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fissile.cli.main import main

FAST = {
    "calibrate.tokens": "8192",
    "calibrate.context": "256",
    "extract.allocation": "proxy",
    "extract.refine_rounds": "0",
    "route.steps": "40",
    "recover.method": "none",
    "recover.refit_tokens": "8192",
    "quantize.enabled": "false",
    "quantize.tokens": "8192",
    "export.dtype": "float32",
}
"""The demo recipe in a minute: quality is not what is proved here."""


class Exports:
    """Folders made from the demo model when they are first asked for."""

    def __init__(self, model: Path, home: Path) -> None:
        self.model, self.home = model, home

    def converted(self, name: str, **changes: str) -> Path:
        """A run of the demo recipe up to the artifact."""
        out = self.home / name
        if not out.exists():
            items = (FAST | changes).items()
            words = [word for key, value in items for word in ("--set", f"{key}={value}")]
            arguments = ["run", "demo/moe-nested", "-q", "--model", str(self.model)]
            stop = ["--out", str(out), "--stop-after", "export"]
            assert main([*arguments, *words, *stop]) == 0
        return out / "model"

    def exported(self, source: Path, target: str, *flags: str) -> Path:
        """What `fissile export` makes of an artifact."""
        out = self.home / "-".join((source.parent.name, target, *flags))
        if not out.exists():
            assert main(["export", str(source), "--to", target, "--out", str(out), *flags]) == 0
        return out

    def routed(self) -> Path:
        """Float experts, four of twelve a token."""
        return self.converted("routed")

    def nested(self) -> Path:
        """The same recipe with weights of 2, 3 and 4 bits."""
        return self.converted("nested", **{"quantize.enabled": "true", "export.dtype": "bfloat16"})

    def lowerable(self) -> Path:
        """One expert a token and no constants, which stock classes can hold."""
        changes = {"extract.top_k": "1", "extract.num_experts": "8", "recover.constants": "false"}
        return self.converted("lowerable", **changes)

    def layerwise(self, selector: str) -> Path:
        """A linear router in every layer; of mean gate rows it has no biases."""
        changes = {"route.kind": "layerwise", "route.selector": selector}
        changes |= {"recover.constants": "false", "recover.train_router": "false"}
        return self.converted(f"layerwise_{selector}", **changes)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def server(command: Sequence[str], port: int, log: Path, **more: str) -> Iterator[str]:
    """A server while it runs: its address, once it answers."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | more
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True
        )
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(300):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(1)
            yield address
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def post(address: str, **body: Any) -> dict[str, Any]:
    """Answer of a JSON endpoint."""
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return dict(json.load(answer))


def gaps(model: Any, prompts: list[list[int]], answer: Any) -> tuple[float, float]:
    """How far an engine is from transformers, both given the engine's own tokens.

    Returns:
        The largest lead in logits of transformers' best token over the engine's, and the largest
        difference of the chosen tokens' log-probabilities (0 where the engine tells none).
    """
    lead = difference = 0.0
    for i, (prompt, tokens) in enumerate(zip(prompts, answer.tokens, strict=True)):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0]
        logits_TV = logits[len(prompt) - 1 : -1].double()
        chosen_T = logits_TV.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        lead = max(lead, float((logits_TV.max(-1).values - chosen_T).max()))
        if answer.logprobs is not None:
            own_T = chosen_T - logits_TV.logsumexp(-1)
            told_T = torch.tensor(answer.logprobs[i], dtype=torch.float64)
            difference = max(difference, float((own_T - told_T).abs().max()))
    return lead, difference
