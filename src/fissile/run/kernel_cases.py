"""What the kernel benchmark measures: shapes, weights, and every implementation of one product.

An implementation is a function that builds, for one case, the calls to be timed on distinct weights
and one call whose result is compared with float64. One that is not installed, or refuses a case,
says so in the row.

Shapes: M tokens, N rows, K inputs, F neurons of an expert, E experts, G groups.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fissile.errors import FissileError
from fissile.kernels import dispatch, ops
from fissile.kernels.defaults import LaunchConfig
from fissile.kernels.layout import NESTED, part_shape, segment_names
from fissile.kernels.tiles import TiledWeight, tile, untile

Kind = Literal["linear", "experts"]
Call = Callable[[], Tensor]
DENSE = ("bf16", "grouped_mm")  # implementations on float weights, measured once for all widths


class Unavailable(FissileError):
    """An implementation that is not installed, or that does not take the case."""


@dataclass(frozen=True)
class Shape:
    """A product of a model.

    Attributes:
        name: e.g. "gate_up".
        kind: one matrix, or the gated MLP of chosen experts.
        rows: N; of experts D, the model's width.
        inputs: K; of experts D too.
        neurons: F of each expert.
        experts: E; 1 for a matrix.
        top_k: experts chosen per token.
    """

    name: str
    kind: Kind
    rows: int
    inputs: int
    neurons: int = 0
    experts: int = 1
    top_k: int = 1

    def held(self) -> int:
        """Weights that are held."""
        if self.kind == "linear":
            return self.rows * self.inputs
        return 3 * self.neurons * self.inputs * self.experts

    def flops(self, tokens: int) -> int:
        """Operations of the product, two a weight and token."""
        if self.kind == "linear":
            return 2 * tokens * self.rows * self.inputs
        return 6 * tokens * self.top_k * self.neurons * self.inputs

    def smaller(self, factor: int) -> Shape:
        """The same shape for the dry mode; sizes stay multiples of 128."""

        def cut(size: int) -> int:
            return max(128, size // factor // 128 * 128) if size else 0

        sizes = cut(self.rows), cut(self.inputs), cut(self.neurons)
        return Shape(self.name, self.kind, *sizes, self.experts, self.top_k)


LLAMA_3_8B = (
    Shape("gate_up", "linear", 28672, 4096),
    Shape("down", "linear", 4096, 14336),
    Shape("q or o", "linear", 4096, 4096),
    Shape("k or v", "linear", 1024, 4096),
    Shape("square 8192", "linear", 8192, 8192),
    Shape("experts 8 top 2", "experts", 4096, 4096, 1792, 8, 2),
    Shape("experts 8 top 1", "experts", 4096, 4096, 1792, 8, 1),
)
"""FFN and attention of Llama-3-8B, its FFN cut into eight experts, and a common square."""


@dataclass(frozen=True)
class Case:
    """One row: a shape, tokens, width and group size, on a device."""

    shape: Shape
    tokens: int
    bits: int
    group_size: int
    device: str
    sets: int
    seed: int

    def rng(self, salt: int = 0) -> torch.Generator:
        """A generator of this case on its device."""
        return torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + salt)

    def activations(self) -> Tensor:
        """bfloat16 (M, K)."""
        size = self.tokens, self.shape.inputs
        x = torch.randn(size, generator=self.rng(), device=self.device)
        return x.to(torch.bfloat16)

    def route(self) -> tuple[Tensor, Tensor]:
        """Chosen experts (M, top_k), without repetition, and weights of one."""
        size = self.tokens, self.shape.experts
        scores = torch.rand(size, generator=self.rng(1), device=self.device)
        index = scores.topk(self.shape.top_k, dim=-1).indices
        return index, torch.ones(index.shape, device=self.device, dtype=torch.bfloat16)

    def chosen(self) -> int:
        """Experts that the route of this case chooses; the others are not read."""
        return len(self.route()[0].unique()) if self.shape.kind == "experts" else 1

    def weights_read(self) -> int:
        """Weights that one product reads."""
        return self.shape.held() // self.shape.experts * self.chosen()

    def parts(self, size: tuple[int, ...], salt: int) -> dict[str, Tensor]:
        """Random stored parts of a weight; scales keep outputs near one."""
        rng, found = self.rng(salt), {}
        widths = (*NESTED, 8) if self.bits > max(NESTED) else NESTED
        for name in segment_names(self.bits, widths):
            where = part_shape(name, size, self.group_size)
            if name.startswith("plane"):
                found[name] = torch.randint(
                    0, 256, where, dtype=torch.uint8, device=self.device, generator=rng
                )
                continue
            step = size[-1] ** -0.5 / (4 if name == "theta_8" else 1)
            floats = torch.rand(where, device=self.device, generator=rng) * step * 0.2
            floats[..., 1] -= 0.1 * step
            found[name] = floats.to(torch.float16).view(torch.int16)
        return found

    def weight(self, size: tuple[int, ...], salt: int, paired: bool = False) -> TiledWeight:
        """A random weight in the kernels' order."""
        return tile(self.parts(size, salt), self.bits, paired=paired)

    def pair(self, salt: int) -> tuple[TiledWeight, TiledWeight]:
        """Stacks of gate-and-up and of down projections."""
        s = self.shape
        wide = self.weight((s.experts, 2 * s.neurons, s.inputs), 2 * salt, paired=True)
        return wide, self.weight((s.experts, s.inputs, s.neurons), 2 * salt + 1)


@dataclass(frozen=True)
class Built:
    """What an implementation made of a case.

    Attributes:
        calls: one for each weight.
        truth: float64 result of the first call, None where weights are its own.
        read_bytes: of weights, by one call.
        how: which kernels run and how they are cut, where that is ours to say.
    """

    calls: list[Call]
    truth: Tensor | None
    read_bytes: float
    how: str | None = None


def packed_bytes(case: Case, weights: int) -> float:
    """Bytes of codes and of a 16-bit scale and zero a group, without padding."""
    floats = 32 / case.group_size * (2 if case.bits > 4 else 1)
    return weights * (case.bits + floats) / 8


def tiled_bytes(case: Case, weights: Sequence[TiledWeight]) -> float:
    """Bytes that one product reads of packed weights, padding to whole blocks and tiles included.

    At 3 bits a block is 512 inputs: 1792 of them take what 2048 do, 14 % more than 3/8 a weight.
    """
    return sum(weight.nbytes / weight.shape[0] for weight in weights) * case.chosen()


def build_fissile(case: Case) -> Built:
    """The packed weight under `fissile.kernels.dispatch`."""
    x, s = case.activations(), case.shape
    if s.kind == "linear":
        held = [case.weight((s.rows, s.inputs), 2 + i) for i in range(case.sets)]
        calls: list[Call] = [partial(dispatch.linear, x, w, None) for w in held]
        truth = x.double() @ untile(held[0])[0].double().T
        method, config = ops.how_linear(len(x), held[0])
        how = _said(case, method, [] if config is None else [config])
        return Built(calls, truth, tiled_bytes(case, held[:1]), how)
    route = case.route()
    pairs = [case.pair(2 + i) for i in range(case.sets)]
    truth = experts_truth(x, route, pairs[0])
    calls = [partial(dispatch.experts, x, route, *pair, "silu") for pair in pairs]
    bits = pairs[0][0].kernel_bits
    plan = ops.split_plan(ops.plan_table(*route, s.experts, bits), route[1], s.experts, bits)
    method, configs = ops.how_gated(x, *pairs[0], plan)
    how = _said(case, method, configs or ())
    return Built(calls, truth, tiled_bytes(case, pairs[0]), how)


def _said(case: Case, method: str, configs: Sequence[LaunchConfig]) -> str:
    if case.device != "cuda":
        return "float32 reference"
    cuts = (
        f"{c.block_n}x{c.block_m} warps {c.num_warps} stages {c.num_stages} split {c.split}"
        for c in configs
    )
    return "; ".join([method, *cuts])


def experts_truth(
    x: Tensor, route: tuple[Tensor, Tensor], pair: Sequence[TiledWeight] | Sequence[Tensor]
) -> Tensor:
    """The experts' sum in float64, (M, D); one expert is decoded at a time."""
    index, _ = route
    y = torch.zeros(len(x), x.shape[1], dtype=torch.float64, device=x.device)

    def matrix(stack: TiledWeight | Tensor, expert: int) -> Tensor:
        own = stack[expert] if isinstance(stack, Tensor) else untile(stack.expert(expert))[0]
        return own.double()

    for expert in index.unique().tolist():
        token = torch.where((index == expert).any(-1))[0]
        gate, up = (x[token].double() @ matrix(pair[0], expert).T).chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * up
        y.index_add_(0, token, h @ matrix(pair[1], expert).T)
    return y


def build_bf16(case: Case) -> Built:
    """Dense bf16 weights under torch's matrix product (cuBLAS); of experts the chosen ones."""
    x, s = case.activations(), case.shape
    read = 2 * case.weights_read()
    if s.kind == "linear":
        held = [_floats(case, (s.rows, s.inputs), i) for i in range(case.sets)]
        return Built(
            [partial(torch.matmul, x, w.T) for w in held], x.double() @ held[0].double().T, read
        )
    index, _ = case.route()
    tokens = [torch.where((index == e).any(-1))[0] for e in range(s.experts)]
    pairs = [_float_pair(case, i) for i in range(case.sets)]
    chosen = [e for e, token in enumerate(tokens) if len(token)]

    def run(wide: Tensor, narrow: Tensor) -> Tensor:
        # The tokens of each expert are known beforehand here: no router, no sorting is counted.
        y = torch.zeros_like(x)
        for e in chosen:
            gate, up = (x[tokens[e]] @ wide[e].T).chunk(2, dim=-1)
            y.index_add_(0, tokens[e], (torch.nn.functional.silu(gate) * up) @ narrow[e].T)
        return y

    truth = experts_truth(x, case.route(), pairs[0])
    return Built([partial(run, *pair) for pair in pairs], truth, read)


def build_grouped_mm(case: Case) -> Built:
    """Dense bf16 experts under torch's grouped product, sorted by expert in every layer."""
    s = case.shape
    if s.kind != "experts":
        raise Unavailable("only for experts")
    x, (index, _) = case.activations(), case.route()
    pairs = [_float_pair(case, i) for i in range(case.sets)]

    def run(wide: Tensor, narrow: Tensor) -> Tensor:
        slot = torch.argsort(index.flatten(), stable=True)
        counts = torch.zeros(s.experts, dtype=torch.int64, device=x.device)
        counts = counts.scatter_add(0, index.flatten(), torch.ones_like(index.flatten()))
        ends = counts.cumsum(0).int()
        rows = x[slot // s.top_k]
        gate, up = torch._grouped_mm(rows, wide.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        h = torch.nn.functional.silu(gate) * up
        y = torch._grouped_mm(h, narrow.transpose(1, 2), offs=ends)
        return torch.zeros_like(x).index_add_(0, slot // s.top_k, y)

    truth = experts_truth(x, case.route(), pairs[0])
    read = 2 * case.weights_read()
    return Built([partial(run, *pair) for pair in pairs], truth, read)


def build_gemlite(case: Case) -> Built:
    """gemlite on random codes of its own; it has no 3 bits and no experts."""
    s = case.shape
    if s.kind != "linear" or case.bits == 3:
        raise Unavailable("gemlite has no such product")
    gemlite = _module("gemlite", case)
    gemlite.set_autotune("fast")
    size, groups = (s.rows, s.inputs), (s.rows, s.inputs // case.group_size)

    def layer(salt: int) -> Any:
        made = gemlite.GemLiteLinear(
            case.bits,
            group_size=case.group_size,
            in_features=s.inputs,
            out_features=s.rows,
            input_dtype=gemlite.DType.BF16,
            output_dtype=gemlite.DType.BF16,
        )
        rng, where = case.rng(salt), case.device
        codes = torch.randint(0, 2**case.bits, size, dtype=torch.uint8, device=where, generator=rng)
        scale = torch.rand(groups, device=where, generator=rng) * 0.01
        zero = torch.rand(groups, device=where, generator=rng) * 2**case.bits
        made.pack(codes, scale.to(torch.bfloat16), zero.to(torch.bfloat16), None)
        return made

    return _rival(case, layer)


def build_humming(case: Case) -> Built:
    """humming, which compiles with nvcc when it first runs, on weights that it quantizes itself."""
    s = case.shape
    if s.kind != "linear":
        raise Unavailable("measured here on matrices only")
    humming = _module("humming.layer", case)

    def layer(salt: int) -> Any:
        form = {"dtype": f"uint{case.bits}", "group_size": case.group_size}
        form |= {"has_zero_point": True, "is_fp_zero_point": True}
        made = humming.HummingLayer(
            shape_n=s.rows, shape_k=s.inputs, weight_config=form, torch_dtype=torch.bfloat16
        ).to(case.device)
        made.load_from_unquantized(_floats(case, (s.rows, s.inputs), salt))
        made.transform()
        return made

    return _rival(case, layer)


IMPLEMENTATIONS: dict[str, Callable[[Case], Built]] = {
    "fissile": build_fissile,
    "bf16": build_bf16,
    "grouped_mm": build_grouped_mm,
    "gemlite": build_gemlite,
    "humming": build_humming,
}
"""Name in the rows to the function that builds the calls."""


def _rival(case: Case, layer: Callable[[int], Any]) -> Built:
    """Calls of another library's layers; what it raises while it is built is the row's note."""
    x = case.activations()
    try:
        layers = [layer(2 + i) for i in range(case.sets)]
        layers[0](x)
    except (RuntimeError, ValueError, TypeError, AssertionError, OSError) as err:
        raise Unavailable(f"{type(err).__name__}: {' '.join(str(err).split())[:200]}") from err
    calls: list[Call] = [partial(made, x) for made in layers]
    return Built(calls, None, packed_bytes(case, case.weights_read()))


def _module(name: str, case: Case) -> Any:
    if case.device != "cuda":
        raise Unavailable(f"{name} needs a GPU")
    try:
        return importlib.import_module(name)
    except ImportError as err:
        raise Unavailable(f"{name} is not installed ({err})") from err


def _floats(case: Case, size: tuple[int, ...], salt: int) -> Tensor:
    rng = case.rng(100 + salt)
    w = torch.randn(size, device=case.device, generator=rng, dtype=torch.bfloat16)
    return w * size[-1] ** -0.5


def _float_pair(case: Case, salt: int) -> tuple[Tensor, Tensor]:
    s = case.shape
    wide = _floats(case, (s.experts, 2 * s.neurons, s.inputs), 2 * salt)
    return wide, _floats(case, (s.experts, s.inputs, s.neurons), 2 * salt + 1)
