"""Fissile: dense language models to router-decoupled mixtures of experts with bit-nested weights.

Importing this package loads no torch. `fissile.quant`, `fissile.refactor`, `fissile.eval` and
`fissile.kernels` offer the functions named below, each imported when it is first asked for:

    from fissile import quant
    nested = quant.solve(weight_OI, hessian_II, widths=(2, 3, 4), group_size=64)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

__version__ = "0.1.0"

_OWN = {
    "load": "fissile.models:load",
    "load_recipe": "fissile.recipe_files:load_recipe",
    "run_recipe": "fissile.run.pipeline:run_recipe",
    "quantize_checkpoint": "fissile.run.pipeline:quantize_checkpoint",
    "evaluate": "fissile.eval.run:evaluate",
    "verify": "fissile.export.verify:verify",
}
_ROOMS: dict[str, dict[str, str]] = {
    "fissile.quant": {
        "HessianAccumulator": "fissile.quant.hessian:HessianAccumulator",
        "NestedWeight": "fissile.quant.nested:NestedWeight",
        "gptq": "fissile.quant.baselines:gptq",
        "quantize_model": "fissile.quant.layers:quantize_model",
        "rtn": "fissile.quant.baselines:rtn",
        "shrink": "fissile.quant.hessian:shrink",
        "solve": "fissile.quant.decouple:solve",
    },
    "fissile.refactor": {
        "ConvertedSource": "fissile.refactor.convert:ConvertedSource",
        "NeuronStatistics": "fissile.refactor.statistics:NeuronStatistics",
        "Partition": "fissile.refactor.partition:Partition",
        "Windows": "fissile.refactor.calibrate:Windows",
        "align_experts": "fissile.refactor.align:align_experts",
        "distill_router": "fissile.refactor.router:distill_router",
        "domain_masks": "fissile.refactor.domains:domain_masks",
        "expert_norms": "fissile.refactor.oracle:expert_norms",
        "gather_statistics": "fissile.refactor.calibrate:gather_statistics",
        "layer_redundancy": "fissile.refactor.redundancy:layer_redundancy",
        "mean_gate_selector": "fissile.refactor.layerwise:mean_gate_selector",
        "mean_restore": "fissile.refactor.compensate:mean_restore",
        "measure_oracle": "fissile.refactor.calibrate:measure_oracle",
        "membership_partition": "fissile.refactor.domains:membership_partition",
        "overlap": "fissile.refactor.domains:overlap",
        "partition_neurons": "fissile.refactor.partition:partition_neurons",
        "random_partition": "fissile.refactor.partition:random_partition",
        "refine_experts": "fissile.refactor.sample:refine_experts",
        "refit_layers": "fissile.refactor.refit:refit_layers",
        "ridge_selector": "fissile.refactor.layerwise:ridge_selector",
        "routing_redundancy": "fissile.refactor.redundancy:routing_redundancy",
        "routing_of": "fissile.refactor.convert:routing_of",
        "split_gated_mlp": "fissile.refactor.split:split_gated_mlp",
        "train_to_teacher": "fissile.refactor.recover:train_to_teacher",
    },
    "fissile.eval": {
        "build_corpus": "fissile.eval.corpus:build_corpus",
        "evaluate": "fissile.eval.run:evaluate",
        "read_documents": "fissile.eval.documents:read_documents",
        "sample_windows": "fissile.eval.windows:sample_windows",
    },
    "fissile.kernels": {
        "dequantize": "fissile.kernels.layout:dequantize",
        "pack": "fissile.kernels.layout:pack",
        "unpack": "fissile.kernels.layout:unpack",
    },
}

__all__ = ["__version__", *_OWN]


def _lazy(module: str, table: Mapping[str, str]) -> Callable[[str], Any]:
    """A module-level `__getattr__` that imports the target of a name."""

    def find(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        target, _, attribute = table[name].partition(":")
        return getattr(importlib.import_module(target), attribute)

    return find


__getattr__ = _lazy(__name__, _OWN)

for _room, _table in _ROOMS.items():
    # These folders have no __init__.py (CONTRIBUTING.md says why), so their names are put here.
    importlib.import_module(_room).__dict__["__getattr__"] = _lazy(_room, _table)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
