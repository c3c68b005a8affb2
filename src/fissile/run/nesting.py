"""Solvers of the quantize stage, and how its units become an artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod

import torch
from torch import Tensor

from fissile.config import Baseline, Quantize
from fissile.io.hub import describe_source
from fissile.io.manifest import Origin
from fissile.io.units import UnitStore
from fissile.kernels.layout import LAYOUT_VERSION, STORED_BITS, loaded_bytes
from fissile.models.build import with_nested
from fissile.models.configuration_fissile import FissileConfig
from fissile.models.source import MemorySource
from fissile.models.stream import StateSource
from fissile.quant.allocate import Choice, allocate, budget_bytes
from fissile.quant.baselines import gptaq, gptq, rtn
from fissile.quant.decouple import choose_companding, probed_rows, solve
from fissile.quant.decoupleq import decoupleq
from fissile.quant.layers import QuantizedLayer, final_layer
from fissile.quant.nested import NestedWeight
from fissile.quant.sensitivity import choices, expert_name, sharing
from fissile.quant.solvers import Evidence, Solver, by_width, float_targets
from fissile.run.context import RunContext


def origin_of(context: RunContext) -> Origin:
    """Where the artifact of a run came from."""
    return Origin(
        source=describe_source(context.source.headers),
        seed=context.recipe.seed,
        recipe_sha256=context.recipe.sha256(),
    )


def nested_solver(settings: Quantize, seed: int) -> Solver:
    """The recipe's own solver: all widths in one code, or decoupleQ."""
    if settings.method == "decoupleq":
        return _decoupleq(settings, settings.widths[0], seed)
    widths = tuple(k for k in settings.widths if k <= STORED_BITS)

    def run(
        weight: Tensor, evidence: Evidence, group: int, companding: float | None
    ) -> NestedWeight:
        targets = _targets(weight, evidence, settings, widths)
        return solve(
            weight if targets is None else targets[widths[-1]],
            evidence.hessian,
            widths=widths,
            group_size=group,
            omega=settings.omega,
            effort=settings.effort,
            companding=companding or settings.companding,
            damp=settings.damp,
            seed=seed,
            targets=targets,
            tied=settings.tied,
        )

    def table(weight: Tensor, evidence: Evidence, group: int) -> float:
        probe = weight[..., probed_rows(weight.shape[-2]), :]
        targets = _targets(probe, evidence, settings, widths)
        shape = (-1, *probe.shape[-2:])
        weight_BOI = probe.reshape(shape)
        if targets is not None:
            weight_BOI = torch.stack([targets[k].reshape(shape) for k in widths])
        hessian_BII = evidence.hessian.reshape(-1, *evidence.hessian.shape[-2:])
        return choose_companding(
            weight_BOI, hessian_BII, widths, settings.omega, group, settings.damp
        )

    residual = settings.widths[len(widths) :]
    # Norms serve all widths: what helps 2 bits would cost 8.
    block = settings.block.model_copy(update={"norm_rate": 0.0} if residual else {})
    return Solver(
        widths,
        settings.blend > 0,
        run,
        block,
        seed,
        residual,
        settings.budget is not None,
        table if settings.companding is None else None,
    )


def _targets(
    weight: Tensor, evidence: Evidence, settings: Quantize, widths: tuple[int, ...]
) -> dict[int, Tensor] | None:
    """What each width shall come near; None if that is the weight for all."""
    if evidence.drift:
        return float_targets(weight, evidence, settings.blend, settings.damp)
    if weight.dim() == evidence.hessian.dim():
        return None
    return by_width(weight, evidence, widths)


def _decoupleq(settings: Quantize, bits: int, seed: int) -> Solver:
    """decoupleQ: its alternation, then scales, zeros and norms against the block's output."""

    def run(weight: Tensor, evidence: Evidence, group: int, _: float | None) -> NestedWeight:
        return decoupleq(weight, evidence.hessian, bits, group, damp=settings.damp)

    block = settings.block.model_copy(update={"weight_rate": 0.0})
    return Solver((bits,), False, run, block, seed)


def baseline_solver(kind: Baseline, bits: int, settings: Quantize, seed: int) -> Solver:
    """A solver for one width alone, to compare the nested code with."""
    single = settings.model_copy(update={"widths": (bits,), "tied": False})
    if kind == "dedicated":
        return nested_solver(single, seed)
    if kind == "decoupleq":
        return _decoupleq(settings, bits, seed)

    def run(weight: Tensor, evidence: Evidence, group: int, _: float | None) -> NestedWeight:
        if kind == "gptq":
            return gptq(weight, evidence.hessian, bits, group, settings.damp)
        if kind == "gptaq":
            drift = evidence.drift[bits]
            return gptaq(weight, evidence.hessian, drift, bits, group, settings.damp)
        return rtn(weight, bits, group)

    return Solver((bits,), kind == "gptaq", run)


def width_choices(
    config: FissileConfig, store: UnitStore
) -> tuple[dict[str, list[Choice]], dict[str, list[str]], int]:
    """What every weight costs at every width, of a stack every expert by itself.

    Args:
        config: of the model.
        store: units that `quantize_model` left.

    Returns:
        Choices by the name of the first of the weights that share a width, or by `expert_name` of
        it; all weights that share one, by the first; and how many numbers there are.
    """
    table: dict[str, list[Choice]] = {}
    members: dict[str, list[str]] = {}
    weights = 0
    for i in range(config.num_base_layers):
        layer, prefix = final_layer(store, i), f"model.layers.{i}."
        for names in sharing(list(layer.groups), config.backbone["attention"]):
            # A plane of two bits a weight has a quarter of its inputs.
            planes = [layer.parts[f"{name}.plane_2"].shape for name in names]
            shapes = [(*shape[:-1], 4 * shape[-1]) for shape in planes]
            weights += sum(prod(shape) for shape in shapes)
            groups = [layer.groups[name] for name in names]
            first = prefix + names[0]
            members[first] = [prefix + name for name in names]
            if len(shapes[0]) < 3:
                sizes = list(zip(shapes, groups, strict=True))
                table[first] = choices(layer.sensitivity[names[0]], sizes)
                continue
            sizes = [(shape[1:], group) for shape, group in zip(shapes, groups, strict=True)]
            for e in range(shapes[0][0]):
                errors = layer.sensitivity[expert_name(names[0], e)]
                table[expert_name(first, e)] = choices(errors, sizes)
    return table, members, weights


def mixed_widths(
    config: FissileConfig, store: UnitStore, settings: Quantize
) -> dict[str, int | list[int]] | None:
    """Width of every weight under the recipe's budget; None without one.

    A stack of experts has a list of widths, one for each, unless all are the same.

    Args:
        config: of the model.
        store: units that `quantize_model` left.
        settings: of the quantization.

    Raises:
        UsageError: the budget cannot be met.
    """
    if settings.budget is None:
        return None
    table, members, weights = width_choices(config, store)
    found = allocate(table, budget_bytes(settings.budget, weights)).bits
    return {name: _width(found, first) for first, names in members.items() for name in names}


def _width(bits: dict[str, int], name: str) -> int | list[int]:
    """Width of a weight, or those of a stack's experts if they differ."""
    if name in bits:
        return bits[name]
    several: list[int] = []
    while (key := expert_name(name, len(several))) in bits:
        several.append(bits[key])
    return several if len(set(several)) > 1 else several[0]


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
        mixed = mixed_widths(source.config, store, settings)
        groups: dict[str, int] = {}
        companding: dict[str, float] = {}
        for i in range(config.num_base_layers):
            own, prefix = final_layer(store, i), f"model.layers.{i}."
            groups |= {prefix + name: group for name, group in own.groups.items()}
            companding |= {prefix + name: ratio for name, ratio in own.companding.items()}
        nested = {
            "layout": LAYOUT_VERSION,
            "widths": list(settings.widths),
            "group_size": settings.group_size,
            "groups": {n: g for n, g in groups.items() if g != settings.group_size},
            "modules": list(groups),
        }
        if companding:
            nested["companding"] = companding
        if settings.tied:
            nested["tied"] = True
        if mixed is not None:
            nested["mixed"] = mixed
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
                layer = final_layer(store, int(index))
                cache[int(index)] = layer.kept | layer.parts
        return cache[int(index)][rest]

    return config, provide


def decoded(
    source: StateSource,
    layers: Iterator[QuantizedLayer],
    bits: int | Mapping[str, int | list[int]] | None = None,
) -> MemorySource:
    """A quantized model as float weights.

    Args:
        source: the model before quantization.
        layers: what became of it.
        bits: width of all weights, or of each, as `mixed_widths` has them; the widest that was
            solved without it.
    """
    state: dict[str, Tensor] = dict(source.outer_state())
    for i, layer in enumerate(layers):
        prefix = f"model.layers.{i}."
        state |= {prefix + name: tensor for name, tensor in layer.kept.items()}
        for name in layer.groups:
            own = bits[prefix + name] if isinstance(bits, Mapping) else bits
            state[prefix + name] = _decoded(layer, name, own)
    return MemorySource(source.config, state)


def _decoded(layer: QuantizedLayer, name: str, bits: int | list[int] | None) -> Tensor:
    """One weight at its width, a stack at those of its experts."""
    if not isinstance(bits, list):
        return layer.decode(name, bits)
    parts = {width: layer.decode(name, width) for width in set(bits)}
    return torch.stack([parts[width][e] for e, width in enumerate(bits)])


def loaded_bits(
    layers: Iterable[QuantizedLayer], bits: int | Mapping[str, int | list[int]]
) -> float:
    """Bits per weight of what was quantized, as a load at these widths holds it, floats included.

    Args:
        layers: what was quantized, in order.
        bits: as for `decoded`.
    """
    cost = weights = 0
    for i, layer in enumerate(layers):
        for name, group in layer.groups.items():
            shape = layer.nested(name).codes.shape
            own = bits[f"model.layers.{i}.{name}"] if isinstance(bits, Mapping) else bits
            several = own if isinstance(own, list) else [own]
            each = shape[1:] if isinstance(own, list) else shape
            cost += 8 * sum(loaded_bytes(each, group, width) for width in several)
            weights += prod(shape)
    return cost / weights
