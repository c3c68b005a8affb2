"""Tensors of our own artifacts: routed and bit-nested, derived from config.json alone."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fissile.errors import CorruptCheckpoint
from fissile.families.base import Dims, Family
from fissile.families.names import attention_and_norms
from fissile.families.table import dims_of

Expected = tuple[str | None, tuple[int, ...]]
"""Dtype (None: any float) and shape of a tensor."""

PLANE_BITS = {2: 2, 3: 1, 4: 1, 6: 2, 8: 2}
"""Bits of a code that each plane adds: plane_2 holds the two most significant ones."""
_NESTED_BITS = 4  # of the code that 6 and 8 bits add a second one to


def mlp_shapes(
    routing: Mapping[str, Any] | None, layer: int, hidden: int, ffn: int
) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's FFN tensors, by name within `mlp`.

    Args:
        routing: the artifact's routing, None for a dense FFN.
        layer: index of the layer.
        hidden: model width D.
        ffn: FFN width F of the dense model.
    """

    def gated(prefix: str, size: int) -> dict[str, tuple[int, ...]]:
        shapes = {
            "gate_proj": (size, hidden),
            "up_proj": (size, hidden),
            "down_proj": (hidden, size),
        }
        return {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}

    if routing is None:
        return gated("shared", ffn)
    found: dict[str, tuple[int, ...]] = {}
    shared, experts = routing["shared_sizes"][layer], routing["num_experts"]
    if shared:
        found |= gated("shared", shared)
        if routing.get("shared_bias"):
            found["shared.down_proj.bias"] = (hidden,)
        if routing.get("shared_gate"):
            found["shared_gate.weight"] = (1, hidden)
    if routing["kind"] == "layerwise":
        found |= selector_shapes(routing, hidden)
    if routing["kind"] == "static":
        return found
    if routing.get("restore"):
        found["restore"] = (experts, hidden)
    if routing["layout"] == "membership":
        return found | gated("pool", sum(size for size, _ in routing["blocks"][layer]))
    size = routing["expert_sizes"][layer]
    found["experts.gate_up_proj"] = (experts, 2 * size, hidden)
    found["experts.down_proj"] = (experts, hidden, size)
    return found


def router_shapes(family: Family, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the pre-gating router's tensors by name within `model.router`; may be empty."""
    routing = config.get("routing")
    if routing is None or routing["kind"] != "pregate":
        return {}
    dims, router = dims_of(family, config), routing["router"]
    heads = dims.layers if routing["per_layer"] else 1
    choices, inner = heads * routing["num_experts"], router["inner_dim"]
    found: dict[str, tuple[int, ...]] = {}
    if routing.get("selection_bias"):
        found["balance"] = (heads, routing["num_experts"])
    if router.get("block") == "readme":
        return found | _readme_shapes(router, dims, choices)
    joint, block = dims.hidden, router.get("block", "attention")
    if block not in ("attention", "token"):
        raise ValueError(f"router block {block!r}")
    if block == "attention":
        outputs, joint = router["attention_dim"], dims.hidden + router["attention_dim"]
        heads = router.get("query_heads")
        query = dims.kv_width if heads is None else heads * dims.head_dim
        widths = {"q": query, "k": dims.kv_width, "v": dims.kv_width}
        found["norm_in"] = (dims.hidden,)
        for name, width in widths.items():
            found[f"layers.{dims.layers}.{name}_proj.weight"] = (width, dims.hidden)
        found[f"layers.{dims.layers}.o_proj.weight"] = (outputs, query)
    return found | {
        "norm_out": (joint,),
        "gate_proj.weight": (inner, joint),
        "up_proj.weight": (inner, joint),
        "down_proj.weight": (choices, inner),
    }


def selector_shapes(routing: Mapping[str, Any], hidden: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer-wise router's tensors by name within `mlp`."""
    experts, kind = routing["num_experts"], routing.get("selector", "linear")
    if kind == "linear":
        found = {"selector.weight": (experts, hidden), "selector.bias": (experts,)}
    elif kind == "softmax":
        found = {"selector.weight": (experts, hidden)}
    elif kind in ("glu", "spectral"):
        rows = (experts * routing.get("selector_rank", 1), hidden)
        found = {"selector.gate": rows, "selector.up": rows}
    else:
        raise ValueError(f"selector {kind!r}")
    if routing.get("selection_bias"):
        found["selector.balance"] = (experts,)
    return found


def _readme_shapes(
    router: Mapping[str, Any], dims: Dims, choices: int
) -> dict[str, tuple[int, ...]]:
    width, inner = router["width"], router["inner_dim"]
    query = router.get("query_heads", 4) * dims.head_dim
    found: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (dims.vocab, width)}
    found |= {f"norm_{where}": (width,) for where in ("in", "mid", "out")}
    linears = {f"layers.{dims.layers}.{name}_proj": (query, width) for name in "qkv"}
    linears[f"layers.{dims.layers}.o_proj"] = (width, query)
    linears |= {"up_proj": (inner, width), "down_proj": (width, inner), "head": (choices, width)}
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found


def nested_parts(
    shape: tuple[int, ...], widths: tuple[int, ...], group_size: int, tied: bool = False
) -> dict[str, Expected]:
    """Planes and floats that stand for one nested weight of `shape` (..., N, K), in load order."""
    *lead, inputs = shape
    theta: Expected = ("I16", (*lead, inputs // group_size, 2))
    found: dict[str, Expected] = {}
    base = tied_base(widths) if tied else None
    for width, bits in PLANE_BITS.items():
        if width <= max(widths):
            found[f"plane_{width}"] = ("U8", (*lead, inputs * bits // 8))
        if base is not None and width == min(PLANE_BITS):
            found[f"theta_{base}"] = theta
        if width in widths and base is not None and width < base:
            found[f"tied_{width}"] = ("I16", (*lead, 3))
        elif width in widths and width != base:
            found[f"theta_{width}"] = theta
    return found


def tied_base(widths: Sequence[int]) -> int:
    """The width that keeps floats of groups where those of narrower ones are tied to them."""
    return max(width for width in widths if width <= _NESTED_BITS)


def is_loaded(part: str, bits: int, widths: Sequence[int], tied: bool = False) -> bool:
    """Whether a `bits`-wide load reads a part ("plane_2", "theta_4" ...) of a nested weight.

    Planes are cumulative, floats belong to one width; 6 and 8 bits add to 4.
    """
    kind, _, width = part.partition("_")
    if kind == "plane":
        return int(width) <= bits
    shared = tied_base(widths) if tied or bits > _NESTED_BITS else bits
    return int(width) == bits or (kind == "theta" and int(width) == shared)


def float_shapes(
    family: Family, config: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor of an artifact as if no weight were nested.

    Raises:
        CorruptCheckpoint: `routing` in config.json is malformed.
    """
    dims, routing = dims_of(family, config), config.get("routing")
    yield "model.embed_tokens.weight", (dims.vocab, dims.hidden)
    with _well_formed("routing"):
        for name, shape in router_shapes(family, config).items():
            yield f"model.router.{name}", shape
        for layer in range(dims.layers):
            for name, shape in attention_and_norms(family, config).items():
                yield f"model.layers.{layer}.{name}", shape
            for name, shape in mlp_shapes(routing, layer, dims.hidden, dims.ffn).items():
                yield f"model.layers.{layer}.mlp.{name}", shape
    yield "model.norm.weight", (dims.hidden,)
    if not dims.tied:
        yield "lm_head.weight", (dims.vocab, dims.hidden)


def artifact_tensors(family: Family, config: Mapping[str, Any]) -> Iterator[tuple[str, Expected]]:
    """Every stored tensor of an artifact with its dtype and shape.

    Raises:
        CorruptCheckpoint: `routing` or `nested` in config.json is malformed.
    """
    with _well_formed("nested"):
        nested = config.get("nested") or {}
        modules, groups = set(nested.get("modules", ())), nested.get("groups", {})
        mixed = nested.get("mixed", {})
        tied = bool(nested.get("tied"))
        if tied and mixed:
            raise CorruptCheckpoint("config.json: nested.mixed beside nested.tied")
        for name, shape in float_shapes(family, config):
            if name not in modules:
                yield name, (None, shape)
                continue
            group = groups.get(name, nested["group_size"])
            _check_widths(name, mixed.get(name, nested["widths"][0]), nested["widths"], shape)
            parts = nested_parts(shape, tuple(nested["widths"]), group, tied)
            for part, expected in parts.items():
                yield f"{name}.{part}", expected


def _check_widths(name: str, found: object, stored: list[int], shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a plan gives a weight a stored width, or each expert of a stack."""
    widths = found if isinstance(found, list) else [found]
    if widths is found and (len(shape) != 3 or len(widths) != shape[0]):
        raise ValueError(f"mixed of {name}: {len(widths)} widths, the shape is {shape}")
    if any(width not in stored for width in widths):
        raise ValueError(f"mixed of {name}: {found}, stored are {stored}")


def plan_summary(config: Mapping[str, Any]) -> dict[str, str] | None:
    """How many weights and experts of an artifact a plan gives which width; None without a plan.

    Args:
        config: contents of config.json.

    Returns:
        "weights", and "experts" where those of some stack differ, to text such as "2b 14, 3b 9".
        An expert counts once, with its down projection.
    """
    mixed = (config.get("nested") or {}).get("mixed")
    if not mixed or config.get("bits") is not None:
        return None
    weights = [widths for widths in mixed.values() if isinstance(widths, int)]
    downs = [
        own for name, own in mixed.items() if isinstance(own, list) and name.endswith("down_proj")
    ]
    found = {"weights": weights, "experts": [width for own in downs for width in own]}
    return {
        what: ", ".join(f"{k}b {n}" for k, n in sorted(Counter(widths).items()))
        for what, widths in found.items()
        if widths
    }


@contextlib.contextmanager
def _well_formed(field: str) -> Iterator[None]:
    """Turn what reading an odd value raises into an error that names the field."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ZeroDivisionError) as err:
        what = f"{type(err).__name__}: {err}"
        raise CorruptCheckpoint(f"config.json: {field} is malformed ({what})") from None
