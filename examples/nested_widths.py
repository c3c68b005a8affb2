"""One file, several widths: quantize a model once, then serve it at 2, 3 and 4 bits.

    python examples/nested_widths.py --out runs/nested

takes about a minute on two CPU cores with the demo model.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import textwrap
from pathlib import Path

import torch
from transformers import AutoTokenizer

import fissile
from fissile.config import Quantize

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "def area(width, height):"
CONTEXT = 512


def main() -> None:
    """Write one artifact, load it at every width, print what each costs and says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "recipes" / "demo" / "model"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the artifact")
    parser.add_argument("--data", type=Path, help="calibration text, JSONL")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration")
    args = parser.parse_args()

    settings = Quantize(widths=(2, 3, 4), effort="fast", tokens=args.tokens)
    made = fissile.quantize_checkpoint(
        args.model, args.out, quantize=settings, data=args.data, overwrite=True
    )
    print(f"{args.out}: {made['bytes'] / 1e6:.1f} MB on disk, all widths")

    tokenizer = AutoTokenizer.from_pretrained(args.out, trust_remote_code=True)
    # Any text that the model was not calibrated on.
    text = tokenizer(inspect.getsource(textwrap), return_tensors="pt").input_ids[:, :CONTEXT]
    prompt = tokenizer(PROMPT, return_tensors="pt")
    stored = json.loads((args.out / "config.json").read_text(encoding="utf-8"))["nested"]["widths"]
    for bits in stored:
        # Only the leading bits of every code, and this width's scales and zeros, are loaded.
        model = fissile.load(args.out, bits=bits)
        held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        with torch.no_grad():
            nll = float(model(input_ids=text, labels=text).loss)
            written = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        said = tokenizer.decode(written[0, prompt.input_ids.shape[1] :])
        print(f"{bits} bits: {held / 1e6:.2f} MB in memory, ppl {math.exp(nll):.2f}, {said!r}")


if __name__ == "__main__":
    main()
