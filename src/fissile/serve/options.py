"""What is to be generated, and how an artifact is served while it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fissile.errors import UsageError
from fissile.eval.documents import read_rows
from fissile.serve.order import Order
from fissile.serve.reader import ExpertFiles


@dataclass(frozen=True)
class Budget:
    """What the served planes of all experts may take.

    Args:
        amount: of bytes, or bits per weight of the experts, floats included.
        unit: which of the two.
    """

    amount: float
    unit: Literal["bytes", "bpw"]

    def bytes_for(self, files: ExpertFiles) -> int:
        """The budget in bytes."""
        return int(self.amount if self.unit == "bytes" else self.amount * files.weights / 8)


@dataclass(frozen=True)
class ServeOptions:
    """How an artifact is served.

    Args:
        memory: bytes of experts in memory; None for all that are served.
        bits: width of all experts; None for the artifact's. Not with `budget`.
        budget: widths by use instead, the experts used most getting more.
        policy: "lru", "lfu", "mrs" or "belady": what leaves memory.
        prefetch: read ahead of the computation.
        order: in which a layer's planes are read.
        readers: threads that read.
        keep_pages: leave what was read in the system's page cache.
        scheduler: "fcfs", "decode-first" or "expert-aware".
        batch_tokens: most tokens of a pass.
        batch_requests: most prompts of a pass.
        max_wait: passes after which a prompt that is ready goes first.
        horizon: passes after the current one that prefetch and eviction look at.
        device: of torch.
    """

    memory: int | None = None
    bits: int | None = None
    budget: Budget | None = None
    policy: str = "belady"
    prefetch: bool = True
    order: Order = "hottest"
    readers: int = 2
    keep_pages: bool = False
    scheduler: str = "expert-aware"
    batch_tokens: int = 512
    batch_requests: int = 16
    max_wait: int = 32
    horizon: int = 4
    device: str = "cpu"


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Args:
        temperature: 0 for the most likely token.
        seed: every prompt draws from a generator of its own, so that batching changes nothing.
    """

    temperature: float = 0.0
    seed: int = 0

    def picker(self) -> Callable[[int, Tensor], int]:
        """From (prompt, logits (V,)) to a token."""
        generators: dict[int, torch.Generator] = {}

        def pick(ident: int, logits_V: Tensor) -> int:
            if not self.temperature:
                return int(logits_V.argmax())
            if ident not in generators:
                seed = self.seed * 1_000_003 + ident
                generators[ident] = torch.Generator().manual_seed(seed)
            p_V = torch.softmax(logits_V.float().cpu() / self.temperature, -1)
            return int(torch.multinomial(p_V, 1, generator=generators[ident]))

        return pick


@dataclass(frozen=True)
class Prompt:
    """A text to continue by at most `tokens` tokens."""

    text: str
    tokens: int


def read_prompts(path: Path, tokens: int) -> list[Prompt]:
    """Prompts of a JSONL file: {"prompt": str, "tokens"?: int} a line.

    Args:
        path: UTF-8 file.
        tokens: to generate where a line does not say.

    Raises:
        UsageError: not readable, no lines, a line without a prompt.
    """
    found = []
    for number, row in read_rows(path):
        text, limit = row.get("prompt"), row.get("tokens", tokens)
        if not isinstance(text, str):
            raise UsageError(f"{path}: line {number}: no prompt")
        if type(limit) is not int or limit < 1:
            raise UsageError(f"{path}: line {number}: tokens {limit!r} is no positive integer")
        found.append(Prompt(text, limit))
    if not found:
        raise UsageError(f"{path}: holds no prompts")
    return found
