"""The model card of an artifact: README.md with front matter that the Hugging Face hub reads.

It is written with the artifact, before the held-out measurements, and says only what is known then.
The same run gives the same text: no dates, no durations, no paths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fissile import __version__
from fissile.errors import CorruptCheckpoint
from fissile.families.artifact import plan_summary
from fissile.run.ledger import Ledger
from fissile.run.metrics import finite

_KINDS = {
    "pregate": "a pre-gating router: a small causal network that reads the token ids and chooses"
    " the experts of every layer before layer 0 runs",
    "layerwise": "a linear router inside each layer",
    "static": "no router: the same neurons for every token",
}


def model_card(folder: Path, run: Path | None = None, source: Path | None = None) -> str:
    """Text of the model card.

    Args:
        folder: the artifact; its config.json and safetensors are there already.
        run: the run folder, for recipe, ledger and losses; None for an artifact on its own.
        source: folder of the dense model, for its name and the licence in its own card.

    Returns:
        Markdown with YAML front matter.

    Raises:
        CorruptCheckpoint: config.json is absent or not JSON.
    """
    config = _json(folder / "config.json")
    if config is None:
        raise CorruptCheckpoint(f"{folder / 'config.json'}: not readable JSON")
    base = source.name if source is not None else None
    front = {
        **({"base_model": base} if base else {}),
        "library_name": "transformers",
        "license": _licence(source) or "unknown",
        "pipeline_tag": "text-generation",
        "tags": ["fissile", *_tags(config)],
    }
    title = f"{base}, converted by Fissile" if base else "A model converted by Fissile"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=True, allow_unicode=True)}---",
        f"# {title}",
        *_description(config, folder),
        "## Load",
        *_loading(config),
        *_losses(run),
        *_exceptions(run),
        "## Limits",
        *_limits(config),
        *_recipe(run),
        f"Written by fissile {__version__}. `fissile.json` lists the sha256 of every file; `fissile"
        " verify` checks them.",
    ]
    return "\n\n".join(parts) + "\n"


def _tags(config: dict[str, Any]) -> Iterator[str]:
    if (routing := config.get("routing")) is not None:
        yield "pruned" if routing["kind"] == "static" else "mixture-of-experts"
    if (nested := config.get("nested")) is not None:
        yield "quantized"
        yield from (f"{width}-bit" for width in nested["widths"])


def _description(config: dict[str, Any], folder: Path) -> Iterator[str]:
    size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    rows = [
        (
            "backbone",
            f"{(config.get('backbone') or {}).get('family', 'unknown')},"
            f" {config.get('num_base_layers')} layers, width {config.get('hidden_size')}",
        ),
        ("weight files", f"{size:,} bytes"),
    ]
    routing, nested = config.get("routing"), config.get("nested")
    if routing is not None:
        shared, experts = routing["shared_sizes"], routing["expert_sizes"]
        total, chosen, number = (
            config["intermediate_size"],
            routing["top_k"],
            routing["num_experts"],
        )
        rows.append(("routing", _KINDS[routing["kind"]]))
        rows.append(("always computed", f"{_span(shared)} of {total} FFN neurons per layer"))
        if routing["kind"] != "static":
            rows.append(("experts", f"{number} of {_span(experts)} neurons, {chosen} per token"))
    if nested is not None:
        widths = ", ".join(map(str, nested["widths"]))
        default = f"default {config.get('bits')} bits"
        if (plan := plan_summary(config)) is not None:
            default = "by default " + "; ".join(f"{what} {text}" for what, text in plan.items())
        rows.append(
            (
                "weights",
                f"one integer code serves {widths} bits, groups of"
                f" {nested['group_size']}; {default}",
            )
        )
    lines = ["| | |", "|---|---|", *(f"| {_cell(k)} | {_cell(v)} |" for k, v in rows)]
    yield "\n".join(lines)


def _loading(config: dict[str, Any]) -> Iterator[str]:
    widths = (config.get("nested") or {}).get("widths")
    bits = f", bits={widths[0]}" if widths else ""
    yield (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True{bits})\n'
        'tokenizer = AutoTokenizer.from_pretrained("DIR", trust_remote_code=True)\n'
        "```"
    )
    yield (
        "The modeling files lie beside the weights and do not need fissile; `trust_remote_code`"
        " lets transformers run them."
        + (
            f" `bits` is one of {', '.join(map(str, widths))}; fewer bits read less of the files."
            if widths
            else ""
        )
    )
    width = f" --hf-overrides '{{\"bits\": {widths[0]}}}'" if widths else ""
    yield f"```bash\nvllm serve DIR{width}\n```"
    yield (
        "vLLM finds the plug-in of an installed fissile, which keeps nested weights packed and"
        " reads one width; without it add `--trust-remote-code`."
    )


def _losses(run: Path | None) -> Iterator[str]:
    record = _json(run / "journal" / "quantize.json") if run is not None else None
    rows = (record or {}).get("layers") or []
    widths = sorted({width for row in rows for width in row["loss"]}, key=int)
    if not widths:
        return
    yield "## Quantization loss"
    lines = ["| bits | mean | largest | of tensor |", "|---:|---:|---:|---|"]
    for width in widths:
        found = [(row["loss"][width] or 0.0, row) for row in rows if width in row["loss"]]
        worst, where = max(found, key=lambda pair: pair[0])
        mean = sum(value for value, _ in found) / len(found)
        name = f"layer {where['layer']} {where['tensor']}"
        lines.append(f"| {width} | {100 * mean:.2f} % | {100 * worst:.2f} % | {_cell(name)} |")
    yield "\n".join(lines)
    yield (
        "Relative to the output of each quantized tensor on calibration text. Held-out perplexity,"
        " beside the controls, is in the run's `report.html`."
    )


def _exceptions(run: Path | None) -> Iterator[str]:
    if run is None:
        return
    counts = Ledger.from_csv(run / "ledger.csv").counts()
    yield "## Exceptions"
    if not counts:
        yield "None: the ledger of the run is empty."
        return
    rows = [f"| {_cell(kind)} | {count} |" for kind, count in counts.items()]
    yield "\n".join(["| kind | events |", "|---|---:|", *rows])


def _limits(config: dict[str, Any]) -> Iterator[str]:
    found = [
        "Calibration text decides which neurons are shared and how weights are rounded: on text of"
        " other kinds the loss can be larger than what was measured.",
        "Biases, errors and licence terms of the dense model carry over.",
    ]
    if config.get("nested") is not None:
        found.append("Fewer bits save memory and reading time; arithmetic is in floats.")
    if (config.get("routing") or {}).get("kind") in ("pregate", "layerwise"):
        found.append("Routing saves arithmetic, not memory: all experts are loaded.")
    yield "\n".join(f"- {line}" for line in found)


def _recipe(run: Path | None) -> Iterator[str]:
    path = run / "recipe.yaml" if run is not None else None
    if path is None or not path.is_file():
        return
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section in recipe.values():
        if isinstance(section, dict) and section.get("data"):
            # A card is made to be published, folders of the machine are not.
            section["data"] = Path(section["data"]).name
    yield "## Recipe"
    yield f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()}\n```"


def _licence(source: Path | None) -> str | None:
    """The `license` of the source's own card, if it has one that says so."""
    path = source / "README.md" if source is not None else None
    if path is None or not path.is_file():
        return None
    match = re.match(r"---\n(.*?)\n---\n", path.read_text(encoding="utf-8", errors="replace"), re.S)
    try:
        front = yaml.safe_load(match.group(1)) if match else None
    except yaml.YAMLError:
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else None


def _span(sizes: list[int]) -> str:
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low} to {high}"


def _cell(text: str) -> str:
    """Text that cannot break a table or start markup."""
    return re.sub(r"([|<>`\[\]])", r"\\\1", " ".join(text.split()))


def _json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return finite(data) if isinstance(data, dict) else None
