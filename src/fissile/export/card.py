"""Model card of an export: what it is, what it cost, how each engine loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fissile import __version__

_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
```"""


def stock_card(config: Mapping[str, Any], cost: Mapping[str, Any], source: str) -> str:
    """Markdown with front matter for a folder of a stock class.

    Args:
        config: contents of its config.json.
        cost: of the export, see `Lowered`.
        source: name of the folder that was exported.
    """
    tags = ["fissile", "mixture-of-experts"] if "num_experts_per_tok" in config else ["fissile"]
    if quantization := config.get("quantization_config"):
        tags.append(quantization["quant_method"])
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    front += [*(f"- {tag}" for tag in tags), "---"]
    rows = ["| | |", "|---|---|"]
    rows += [f"| {name.replace('_', ' ')} | {value} |" for name, value in cost.items()]
    parts = [
        "\n".join(front),
        f"# {source}, as {config['architectures'][0]}",
        "A stock class of transformers: no remote code and no plug-in are needed.",
        "\n".join(rows),
        "## Load",
        _LOAD,
        "```bash\nvllm serve DIR\ntransformers serve DIR\n```",
        "## Limits",
        *_limits(config, cost),
        f"Written by fissile {__version__}. `fissile.json` lists the sha256 of every file; `fissile"
        " verify` checks them.",
    ]
    return "\n\n".join(parts) + "\n"


def gguf_card(config: Mapping[str, Any], cost: Mapping[str, Any], source: str) -> str:
    """Markdown for a folder with a GGUF file; arguments as `stock_card`."""
    rows = ["| | |", "|---|---|"]
    rows += [f"| {name.replace('_', ' ')} | {value} |" for name, value in cost.items()]
    parts = [
        "---\nlibrary_name: gguf\npipeline_tag: text-generation\ntags:\n- fissile\n---",
        f"# {source}, for llama.cpp",
        "\n".join(rows),
        "## Load",
        "```bash\nllama-cli -m model.gguf -p 'Once upon a time'\n```",
        "## Limits",
        "- llama.cpp rounds activations to 8 bits before it multiplies them with Q4_1 weights: the"
        " weights are exact, products are not.",
        *_limits(config, cost),
        f"Written by fissile {__version__}.",
    ]
    return "\n\n".join(parts) + "\n"


def _limits(config: Mapping[str, Any], cost: Mapping[str, Any]) -> list[str]:
    lines = []
    if cost.get("extra_dimensions"):
        lines.append(
            "- Float16 is too narrow for the router's layer; serve in float32 or bfloat16. In"
            " bfloat16 a choice between nearly equal experts can differ from float32's."
        )
    if cost.get("empty_experts"):
        lines.append(
            "- Beside every routed expert stands an empty one whose score decides, so that weights"
            " are exactly equal; routed experts take twice the memory. A choice between nearly"
            " equal scores can differ."
        )
    if cost.get("weights_exact") is False and "quantization_config" not in config:
        lines.append(
            "- Chosen experts weigh one up to some ten-thousandths, and a choice between nearly"
            " equal scores can differ."
        )
    if "quantization_config" in config:
        lines.append("- Integer zero points cost some accuracy against the nested format.")
    return [*lines, "- Biases, errors and licence terms of the dense model carry over."]
