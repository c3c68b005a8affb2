"""Start an engine in a process of its own and let it continue token ids greedily.

An engine that is not installed is not an error of the folder: `available` says why it was left out.
vLLM and llama.cpp may live in environments of their own, which variables name.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fissile.errors import UnsupportedModel

NODE_FOLDER = "FISSILE_NODE_LLAMA_CPP"
"""Environment variable: folder with node_modules/node-llama-cpp."""

VLLM_PYTHON = "FISSILE_VLLM_PYTHON"
"""Environment variable: the Python interpreter of an environment with vLLM."""


@dataclass(frozen=True)
class Answer:
    """What an engine appended.

    Attributes:
        tokens: ids by prompt.
        logprobs: natural logarithms of their probabilities, where the engine tells.
        prompt_logprobs: the same of the prompts' tokens but the first.
        nested_bytes: memory of nested weights, where the engine tells.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]] | None = None
    prompt_logprobs: list[list[float]] | None = None
    nested_bytes: int | None = None


_TRANSFORMERS = """
import json, sys
sys.modules["fissile"] = None
import torch
from transformers import AutoModelForCausalLM
folder, request, answer = sys.argv[1:]
asked = json.load(open(request))
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
    trust_remote_code=asked["remote"]).eval()
# Goes on after the end of a text, as the other engines do. A least length would forbid the token.
model.generation_config.eos_token_id = None
found = []
for ids in asked["prompts"]:
    prompt = torch.tensor([ids])  # whole: without a mask, tokens that pad elsewhere are left out
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt),
        max_new_tokens=asked["count"], do_sample=False, pad_token_id=0)
    found.append(out[0, len(ids):].tolist())
json.dump(found, open(answer, "w"))
"""
_LLAMA_PYTHON = """
import json, sys
import numpy as np
from llama_cpp import Llama
path, request, answer = sys.argv[1:]
asked = json.load(open(request))
most = max(map(len, asked["prompts"])) + asked["count"]
model = Llama(path, n_ctx=most + 8, n_gpu_layers=0, n_threads=1, type_k=0, type_v=0,
    logits_all=False, verbose=False)
found = []
for ids in asked["prompts"]:
    model.reset()
    model.eval(ids)
    out = []
    for _ in range(asked["count"]):
        out.append(int(np.argmax(model._scores[-1])))
        model.eval(out[-1:])
    found.append(out)
json.dump(found, open(answer, "w"))
"""
_LLAMA_NODE = """
import fs from "node:fs";
import {pathToFileURL} from "node:url";
const [home, path, request, answer] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(home + "/node_modules/node-llama-cpp/dist/index.js"));
const asked = JSON.parse(fs.readFileSync(request));
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1});
const model = await llama.loadModel({modelPath: path, useMmap: false});
const most = Math.max(...asked.prompts.map(p => p.length)) + asked.count;
const found = [];
for (const ids of asked.prompts) {
  const context = await model.createContext({contextSize: most + 8,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"});
  const out = [];
  for await (const token of context.getSequence().evaluate(ids, {temperature: 0})) {
    out.push(token);
    if (out.length >= asked.count) break;
  }
  found.push(out);
  await context.dispose();
}
fs.writeFileSync(answer, JSON.stringify(found));
process.exit(0);
"""


def available(engine: str) -> str | None:
    """None if the engine can be started here, else why not."""
    if engine == "transformers":
        return None
    if engine == "vllm":
        if _vllm_python():
            return None
        return f"vllm is not installed, and {VLLM_PYTHON} names no interpreter that has it"
    if importlib.util.find_spec("llama_cpp") or _node_home():
        return None
    return (
        f"neither llama-cpp-python is installed nor does {NODE_FOLDER} name a folder with"
        " node-llama-cpp"
    )


def greedy(
    engine: str,
    path: Path,
    prompts: Sequence[Sequence[int]],
    count: int,
    *,
    bits: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> Answer:
    """Greedy continuations.

    Args:
        engine: "transformers" (a folder, loaded without fissile), "vllm" (a folder, all prompts at
            once) or "llama.cpp" (a GGUF file).
        path: what it loads.
        prompts: token ids.
        count: tokens to append to each; the end of a text is not looked for.
        bits: width of an artifact's nested weights, for vLLM; default the one in its config.json.
        options: more arguments of `vllm.LLM`.

    Raises:
        UnsupportedModel: the engine failed; the message is its last line.
    """
    with tempfile.TemporaryDirectory() as work:
        request, answer = f"{work}/request.json", f"{work}/answer.json"
        remote = (path / "config.json").is_file() and "auto_map" in (
            path / "config.json"
        ).read_text("utf-8")
        asked = {"prompts": [list(p) for p in prompts], "count": count, "remote": remote}
        asked["options"] = {**({"hf_overrides": {"bits": bits}} if bits else {}), **(options or {})}
        Path(request).write_text(json.dumps(asked))
        command = _command(engine, work, str(path.resolve()), request, answer)
        private = {
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": f"{work}/modules",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        done = subprocess.run(
            command, env={**os.environ, **private}, capture_output=True, text=True, check=False
        )
        if done.returncode != 0 or not Path(answer).is_file():
            lines = done.stderr.strip().splitlines() or ["no output"]
            last = next((line for line in reversed(lines) if "Error" in line), lines[-1])
            raise UnsupportedModel(f"{engine} failed with exit code {done.returncode}: {last}")
        found = json.loads(Path(answer).read_text())
    return Answer(**found) if isinstance(found, dict) else Answer(found)


def _command(engine: str, work: str, path: str, request: str, answer: str) -> list[str]:
    if engine == "transformers":
        return [sys.executable, "-I", "-c", _TRANSFORMERS, path, request, answer]
    if engine == "vllm":
        script = str(Path(__file__).with_name("run_vllm.py"))
        return [_vllm_python() or sys.executable, script, path, request, answer]
    if home := _node_home():
        # A file: the processes that node-llama-cpp starts would inherit the flags of `node -e`.
        module = Path(work) / "run.mjs"
        module.write_text(_LLAMA_NODE)
        return ["node", str(module), home, path, request, answer]
    return [sys.executable, "-c", _LLAMA_PYTHON, path, request, answer]


def _vllm_python() -> str | None:
    named = os.environ.get(VLLM_PYTHON)
    if named and Path(named).is_file():
        return named
    return sys.executable if importlib.util.find_spec("vllm") else None


def _node_home() -> str | None:
    home = os.environ.get(NODE_FOLDER)
    if not home or shutil.which("node") is None:
        return None
    return home if (Path(home) / "node_modules" / "node-llama-cpp").is_dir() else None
