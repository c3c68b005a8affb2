"""Load an artifact as a stranger would and save its logits; run as a script, without fissile.

Usage: python reload.py FOLDER REQUEST.safetensors ANSWER.safetensors WIDTH[,WIDTH...]
REQUEST holds int64 `ids` (B, S); the answer holds float32 `logits_<width>` (B, S, V), width 0 for
float weights, or for those that a plan gives each weight.
"""

from __future__ import annotations

import sys


def main(folder: str, request: str, answer: str, widths: str) -> None:
    """Answer one request; see the module's docstring."""
    # An artifact must not need the package that wrote it: make importing it an error.
    sys.modules["fissile"] = None  # type: ignore[assignment]
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    ids = load_file(request)["ids"]
    logits = {}
    for width in (int(text) for text in widths.split(",")):
        chosen = {"bits": width} if width else {}
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32, **chosen
        )
        with torch.no_grad():
            logits[f"logits_{width}"] = model.eval()(input_ids=ids).logits.contiguous()
    save_file(logits, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
