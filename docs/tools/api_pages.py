"""Pages of the public Python names, for mkdocstrings to fill from docstrings.

The tables of `fissile.__init__` are the public API. A page is a room; names that are used together
get a page of their own, so that none grows long.
"""

from __future__ import annotations

import fissile

ROOMS = {
    "fissile": "Whole jobs: load an artifact, run a recipe, evaluate, verify.",
    "fissile.quant": "Bit-nested quantization as functions on tensors and models.",
    "fissile.refactor": "Dense to mixture of experts: statistics, experts, conversion.",
    "fissile.eval": "Text, windows and scores.",
    "fissile.kernels": "The packed layout of nested codes.",
}
GROUPS = {
    "fissile.quant": {
        "models": (
            "Quantizing a model layer by layer.",
            ("HessianAccumulator", "quantize_model", "shrink"),
        ),
    },
    "fissile.refactor": {
        "experts": (
            "Dividing a layer's neurons.",
            (
                "Partition",
                "partition_neurons",
                "random_partition",
                "refine_experts",
                "align_experts",
                "split_gated_mlp",
                "domain_masks",
                "membership_partition",
                "overlap",
            ),
        ),
        "routers": (
            "Oracle, routers and what their choices have in common.",
            (
                "expert_norms",
                "measure_oracle",
                "distill_router",
                "ridge_selector",
                "mean_gate_selector",
                "layer_redundancy",
                "routing_redundancy",
                "routing_of",
            ),
        ),
        "recovery": (
            "Making up for the neurons that a token does not compute.",
            ("mean_restore", "refit_layers", "train_to_teacher"),
        ),
    },
}
CONTRACTS = {
    "errors": ("Errors", "What a user can meet, with its exit code.", ("fissile.errors",)),
    "families": (
        "Model families",
        "The data that describes a family.",
        ("fissile.families.base",),
    ),
    "solvers": (
        "Solvers",
        "The contract between a way to quantize and the pipeline.",
        ("fissile.quant.solvers",),
    ),
    "exports": (
        "Exports",
        "Checking a model against a target, then writing it.",
        ("fissile.export.api", "fissile.export.pieces"),
    ),
}
"""Modules that an extension meets, beyond the public tables."""


def pages() -> dict[str, str]:
    """Path below docs/ to Markdown."""
    tables = {"fissile": fissile._OWN, **fissile._ROOMS}
    found = {}
    for room, table in tables.items():
        left = dict(table)
        short = room.removeprefix("fissile.")
        for group, (text, names) in GROUPS.get(room, {}).items():
            chosen = [left.pop(name) for name in names if name in left]
            found[f"python/{short}-{group}.md"] = _page(f"{room}: {group}", text, chosen)
        found[f"python/{short}.md"] = _page(room, ROOMS[room], list(left.values()))
    for name, (title, text, modules) in CONTRACTS.items():
        found[f"python/{name}.md"] = _page(title, text, list(modules))
    return found


def _page(title: str, text: str, targets: list[str]) -> str:
    parts = [f"# {title}", text]
    parts += [f"::: {target.replace(':', '.')}" for target in targets]
    return "\n\n".join(parts) + "\n"
