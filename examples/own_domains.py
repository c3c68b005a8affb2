"""Convert a model with labelled text of your own, and read the scores of each domain.

    python examples/own_domains.py --out runs/own

takes about two minutes on two CPU cores with the demo model. Without --calibration and --heldout
the text is made here: invoices and log lines, of which no document is in both files.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import yaml

import fissile

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "recipes" / "demo" / "moe-nested.yaml"


def invoice(rng: random.Random) -> str:
    """One document of the first domain."""
    item = rng.choice(("paper", "ink", "a chair", "two lamps", "a desk", "cables"))
    place = rng.choice(("the office", "the workshop", "the library", "the store room"))
    return (
        f"Invoice {rng.randrange(10_000)}. We delivered {item} to {place} on day"
        f" {rng.randrange(1, 29)}. Please pay {rng.randrange(10, 900)} within"
        f" {rng.choice((14, 30, 60))} days. Thank you for your order."
    )


def log_line(rng: random.Random) -> str:
    """One line of a document of the second domain."""
    part = rng.choice(("disk", "network", "scheduler", "cache"))
    what = rng.choice(("ready", "slow", "restarted", "timed out after 30 s"))
    return f"{rng.randrange(24):02d}:{rng.randrange(60):02d} {part}[{rng.randrange(900)}]: {what}"


def write_text(path: Path, seed: int, documents: int) -> None:
    """Write documents of both domains, a JSON object a line."""
    rng, rows = random.Random(seed), []
    for _ in range(documents):
        rows.append({"domain": "invoices", "text": "\n".join(invoice(rng) for _ in range(12))})
        rows.append({"domain": "logs", "text": "\n".join(log_line(rng) for _ in range(40))})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Make the text where none is given, convert, print perplexity by domain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(ROOT / "recipes" / "demo" / "model"))
    parser.add_argument("--out", type=Path, required=True, help="run folder")
    parser.add_argument("--calibration", type=Path, help="JSONL of text and domain")
    parser.add_argument("--heldout", type=Path, help="the same, from other documents")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()

    work = args.out.parent
    work.mkdir(parents=True, exist_ok=True)
    calibration = args.calibration or work / "own_calibration.jsonl"
    heldout = args.heldout or work / "own_heldout.jsonl"
    if args.calibration is None:
        write_text(calibration, seed=0, documents=60)
    if args.heldout is None:
        write_text(heldout, seed=1, documents=20)

    # A recipe says only what differs from the one that it extends.
    settings = {
        "extends": str(BASE),
        "name": "own-domains",
        "calibrate": {"data": str(calibration.resolve()), "tokens": 16384, "context": 256},
        "route": {"steps": 50},
        "recover": {"method": "none", "refit_tokens": 8192},
        "quantize": {"tokens": 8192},
        "evaluate": {
            "data": str(heldout.resolve()),
            "tokens": 4096,
            "context": 256,
            "choices": 0,
            "controls": ["static"],
            "baselines": [],
        },
        "limits": {"max_ppl_ratio": None},
    }
    recipe_file = work / "own_domains.yaml"
    recipe_file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    recipe = fissile.load_recipe(recipe_file, args.set)
    summary = fissile.run_recipe(recipe, args.model, args.out, overwrite=True)

    metrics = json.loads((args.out / "metrics.json").read_text(encoding="utf-8"))
    print(f"{'':24s}" + "".join(f"{name:>12s}" for name in metrics["dense"]["by_domain"]))
    rows = {"dense": metrics["dense"]["by_domain"]}
    for variant in metrics["variants"]:
        if variant["recovery"] != "none":
            rows[f"{variant['name']}, {variant['recovery']}"] = variant["by_domain"]
    for width in metrics["widths"]:
        if width["method"] == "nested" and width["of"] == "converted":
            rows[f"nested, {width['bits']} bits"] = width["by_domain"]
    for name, scores in rows.items():
        print(f"{name:24s}" + "".join(f"{ppl:12.2f}" for ppl in scores.values()))
    print(f"exceptions: {summary.ledger or 'none'}")
    print(f"report: {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
