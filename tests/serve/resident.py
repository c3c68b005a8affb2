"""The resident model, which everything else is held against."""

from __future__ import annotations

from pathlib import Path

import torch

from fissile import models
from fissile.io.headers import open_checkpoint_headers
from fissile.serve.reader import ExpertFiles


def half(folder: Path, bits: int | None) -> int:
    """Half of the bytes of all experts at a width."""
    files = ExpertFiles(open_checkpoint_headers(folder), () if bits is None else (bits,))
    files.close()
    return files.total_bytes() // 2


def resident_answer(
    folder: Path, bits: int | None, prompt: tuple[int, ...], count: int
) -> tuple[list[int], torch.Tensor]:
    """Tokens and logits of the model as transformers runs it, everything in memory."""
    out = models.load(folder, bits=bits).generate(
        torch.tensor([prompt]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)
