"""Solvers of the quantize stage, and how its units become an artifact."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fissile.config import Baseline, Quantize
from fissile.io.hub import describe_source
from fissile.io.manifest import Origin
from fissile.io.units import UnitStore
from fissile.kernels.layout import LAYOUT_VERSION
from fissile.models.build import with_nested
from fissile.models.configuration_fissile import FissileConfig
from fissile.models.stream import StateSource
from fissile.quant.baselines import gptq, rtn
from fissile.quant.decouple import solve
from fissile.quant.layers import Solver, read_layer
from fissile.quant.nested import NestedWeight
from fissile.run.context import RunContext


def origin_of(context: RunContext) -> Origin:
    """Where the artifact of a run came from."""
    return Origin(
        source=describe_source(context.source.headers),
        seed=context.recipe.seed,
        recipe_sha256=context.recipe.sha256(),
    )


def nested_solver(settings: Quantize, seed: int) -> Solver:
    """The recipe's own solver: all widths in one code."""

    def solver(weight: Tensor, hessian: Tensor, group_size: int) -> NestedWeight:
        return solve(
            weight,
            hessian,
            widths=settings.widths,
            group_size=group_size,
            omega=settings.omega,
            effort=settings.effort,
            damp=settings.damp,
            seed=seed,
        )

    return solver


def baseline_solver(kind: Baseline, bits: int, settings: Quantize, seed: int) -> Solver:
    """A solver for one width alone, to compare the nested code with."""
    single = settings.model_copy(update={"widths": (bits,)})
    if kind == "dedicated":
        return nested_solver(single, seed)
    if kind == "gptq":
        return lambda weight, hessian, group: gptq(weight, hessian, bits, group, damp=settings.damp)
    return lambda weight, _hessian, group: rtn(weight, bits, group)


def artifact_tensors_of(
    source: StateSource, store: UnitStore | None, settings: Quantize
) -> tuple[FissileConfig, Callable[[str], Tensor]]:
    """Configuration of the artifact and a provider of its tensors, asked for layer by layer.

    Args:
        source: the model before quantization.
        store: units that `quantize_model` left; None for float weights.
        settings: of the quantization.
    """
    config = with_nested(source.config, None, None)
    if store is not None:
        groups: dict[str, int] = {}
        for i in range(config.num_base_layers):
            own = read_layer(store, i).groups
            groups |= {f"model.layers.{i}.{name}": group for name, group in own.items()}
        nested = {
            "layout": LAYOUT_VERSION,
            "widths": list(settings.widths),
            "group_size": settings.group_size,
            "groups": {n: g for n, g in groups.items() if g != settings.group_size},
            "modules": list(groups),
        }
        config = with_nested(source.config, nested, settings.widths[-1])
    outer = source.outer_state()
    cache: dict[int, dict[str, Tensor]] = {}

    def provide(name: str) -> Tensor:
        if name in outer:
            return outer[name]
        index, _, rest = name.removeprefix("model.layers.").partition(".")
        if int(index) not in cache:
            cache.clear()
            if store is None:
                cache[int(index)] = source.layer_state(int(index))
            else:
                layer = read_layer(store, int(index))
                cache[int(index)] = layer.kept | layer.parts
        return cache[int(index)][rest]

    return config, provide
