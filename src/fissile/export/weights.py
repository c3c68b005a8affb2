"""What an export reads: float weights layer by layer, integer codes, and facts about both.

Shapes: V vocabulary, D model width, L layers, E experts, H router heads, C = H*E, N rows, K inputs,
G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fissile.export.hosts import Host, Known
from fissile.export.lowering import CODE_GAIN, CODE_SCALE, Measured
from fissile.io.reader import TensorReader
from fissile.kernels.layout import NESTED, decode_theta, unpack, with_own_floats
from fissile.models.configuration_fissile import FissileConfig
from fissile.models.source import LAYER, CheckpointSource
from fissile.models.stream import StreamedModel

BLOCK = 32
"""Inputs that share a scale and a zero in Q4_1 and Q5_1."""

SCORE_SPREAD = {"sigmoid": 2.0**-8, "softmax": 2.0**-11}
"""Spread of a layer-wise router's scores in a stock class, by how it makes weights of them. Behind
a sigmoid the score only decides, with an offset outside of it: larger, and the sigmoid bends;
smaller, and float32 tells fewer of them apart. Behind a softmax the chosen experts' weights differ
by some ten-thousandths, and float32 still tells apart scores that differ by as much of their
spread."""

FREE_SPREAD = 2.0**-2
"""The same behind a sigmoid without offsets: a bend that all experts share keeps their order."""

EQUAL_SCORE = 2.0**-4
"""What remains of one half, the score of every expert that computes something."""


class Coded(NamedTuple):
    """Integer codes (..., N, K) uint8 with float32 scale and zero (..., N, K / 32)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor


class Weights:
    """Tensors of an artifact, or of a dense checkpoint, under canonical names.

    Args:
        source: the checkpoint; nested weights are decoded at its width, or each at its own.

    Attributes:
        made: more tensors by name, for the pieces of a lowering.
    """

    def __init__(self, source: CheckpointSource) -> None:
        self.source, self.config = source, source.config
        self.made: dict[str, Callable[[], Tensor]] = {}
        self._reader = TensorReader(source.headers)
        self._outer: dict[str, Tensor] | None = None
        self._layer: tuple[int, dict[str, Tensor]] | None = None
        self._coded: dict[str, Coded] = {}

    def fetch(self, name: str) -> Tensor:
        """One tensor as float32; the layer that it belongs to stays in memory until another is."""
        if name.startswith("made."):
            return self.made[name]()
        if not name.startswith(LAYER):
            if self._outer is None:
                self._outer = self.source.outer_state()
            return self._outer[name]
        index, _, rest = name.removeprefix(LAYER).partition(".")
        if self._layer is None or self._layer[0] != int(index):
            self._layer = int(index), self.source.layer_state(int(index))
        return self._layer[1][rest]

    def read(self, name: str) -> Tensor:
        """One small stored tensor as float32, without the rest of its layer."""
        return self._reader.load(name, torch.float32)

    def is_coded(self, name: str) -> bool:
        """Whether a tensor is an affine image of codes 0..15 in groups that 32 divides."""
        nested = self.source.nested
        if nested is None or name not in nested["modules"]:
            return False
        widths = set(self._widths(name))
        group = nested.get("groups", {}).get(name, nested["group_size"])
        plain = widths == {2} or nested.get("companding", {}).get(name, 1.0) == 1.0
        return group % BLOCK == 0 and plain and widths <= set(NESTED)

    def coded(self, name: str) -> Coded:
        """Codes of a tensor for which `is_coded` holds, one scale and zero per 32 inputs."""
        if name not in self._coded:
            widths = self.source.width_of(name)
            assert widths is not None
            parts = self.source.served_parts(name, widths)
            if isinstance(widths, int):
                coded = _coded(parts, widths)
            else:
                # Experts have widths of their own; a code of fewer bits is a smaller number.
                own = [
                    _coded({suffix: part[e] for suffix, part in parts.items()}, bits)
                    for e, bits in enumerate(widths)
                ]
                coded = Coded(*(torch.stack(tensors) for tensors in zip(*own, strict=True)))
            self._coded.clear()
            self._coded[name] = coded
        return self._coded[name]

    def _widths(self, name: str) -> list[int]:
        """Width of a nested weight, or those of a stack's experts."""
        bits = self.source.width_of(name)
        assert bits is not None
        return [bits] if isinstance(bits, int) else bits


def _coded(parts: Mapping[str, Tensor], bits: int) -> Coded:
    scale, zero = decode_theta(with_own_floats(parts, bits)[f"theta_{bits}"])
    codes = unpack(parts, bits)
    repeats = codes.shape[-1] // scale.shape[-1] // BLOCK
    scale, zero = (theta.repeat_interleave(repeats, dim=-1) for theta in (scale, zero))
    return Coded(codes, scale, zero)


def open_weights(folder: Path, bits: int | None = None) -> Weights:
    """Open an artifact (at a width) or a dense checkpoint.

    Raises:
        UsageError, UnsupportedModel, CorruptCheckpoint: see `CheckpointSource`; a width that is not
            stored is an UnsupportedModel.
    """
    from fissile.errors import UnsupportedModel

    try:
        return Weights(CheckpointSource(folder, bits))
    except ValueError as err:
        raise UnsupportedModel(f"{folder}: {err}") from None


def measure(weights: Weights, host: Host | None = None) -> Measured:
    """Read what a lowering depends on: small tensors, the embeddings' size, codes of tokens.

    Args:
        weights: of a routed model.
        host: the class; without one only `Measured.known` holds.
    """
    config, routing = weights.config, weights.config.routing
    assert routing is not None
    known = Known(constants=has_constants(weights), selector_bias=_selector_bias(weights))
    if host is None:
        return Measured(known)
    if routing["kind"] == "pregate":
        embedding = weights.fetch("model.embed_tokens.weight")
        size = float(embedding.double().square().mean().sqrt())
        scale = CODE_SCALE * 2.0 ** round(math.log2(size)) if size > 0 else CODE_SCALE
        weights.made |= _pregate_made(weights, scale)
        return Measured(known, scale, made=weights.made)
    free = host.correction and not known.selector_bias
    spread = FREE_SPREAD if free else SCORE_SPREAD[host.scoring]
    # Of one expert a token the weight is one whatever its score; a correction wants small scores.
    exact = routing["top_k"] == 1 and not host.correction
    layers = range(config.num_base_layers)
    scales = tuple(1.0 if exact else _selector_scale(weights, i, spread) for i in layers)
    for i, scale in enumerate(scales):
        weights.made[f"made.correction.{i}"] = _correction(weights, i, scale)
    return Measured(known, CODE_SCALE, scales, weights.made)


def has_constants(weights: Weights) -> bool:
    """Whether some FFN adds a constant: a bias that is not zero, or what stands for experts."""
    routing = weights.config.routing or {}
    names = ["mlp.shared.down_proj.bias"] if routing.get("shared_bias") else []
    if routing.get("restore") and routing.get("kind") != "static":
        names.append("mlp.restore")
    layers = range(weights.config.num_base_layers)
    full = [f"{LAYER}{i}.{name}" for i in layers for name in names]
    present = [name for name in full if name in weights.source.headers.tensors]
    return any(bool(weights.read(name).any()) for name in present)


def _selector_bias(weights: Weights) -> bool:
    routing = weights.config.routing or {}
    if routing.get("kind") != "layerwise" or routing.get("selector", "linear") != "linear":
        return False
    layers = range(weights.config.num_base_layers)
    return any(bool((b := _offsets(weights, i)).max() != b.min()) for i in layers)


def _offsets(weights: Weights, layer: int) -> Tensor:
    """What is added to a layer-wise router's scores for the choice: bias and balance (E,)."""
    name = f"{LAYER}{layer}.mlp.selector"
    offset = weights.read(f"{name}.bias")
    routing = weights.config.routing or {}
    return offset + weights.read(f"{name}.balance") if routing.get("selection_bias") else offset


def _selector_scale(weights: Weights, layer: int, wanted: float) -> float:
    """Power of two that gives a router's scores about the wanted spread.

    The FFN's input has unit mean square per dimension before the norm's weights.
    """
    norm = weights.read(f"{LAYER}{layer}.{_mlp_norm(weights.config)}.weight")
    weight_ED = weights.read(f"{LAYER}{layer}.mlp.selector.weight") * norm
    spread = float((weight_ED - weight_ED.mean(0)).norm(dim=1).square().mean().sqrt())
    return 2.0 ** round(math.log2(wanted / spread)) if spread > 0 else 1.0


def _mlp_norm(config: FissileConfig) -> str:
    sandwich = config.backbone["norm_layout"] == "sandwich"
    return "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"


def _correction(weights: Weights, layer: int, scale: float) -> Callable[[], Tensor]:
    """The bias of the choice: sigmoid(s z) = 1/2 + s z / 4 up to a cube, so offsets are s b / 4.

    Less the half: near zero the sum of score and bias is not rounded. With several experts a token
    every other one computes nothing and has the score, see lowering.py.
    """
    routing = weights.config.routing or {}

    def made() -> Tensor:
        offset_E = _offsets(weights, layer).double() * (scale / 4) - 0.5
        if routing["top_k"] == 1:
            return offset_E.float()
        # Without offsets scores reach far: what computes must be above all of them.
        above = EQUAL_SCORE if bool((offset_E != offset_E[0]).any()) else 0.5
        equal_E = torch.full_like(offset_E, above - 0.5)
        return torch.stack([equal_E, offset_E], dim=1).flatten().float()

    return made


def _pregate_made(weights: Weights, scale: float) -> dict[str, Callable[[], Tensor]]:
    routing = weights.config.routing
    assert routing is not None
    experts = routing["num_experts"]
    heads = weights.config.num_base_layers if routing["per_layer"] else 1
    token = routing["router"].get("block", "attention") == "token"
    return {
        "made.ones": lambda: torch.ones(heads * experts),
        "made.gate": lambda: torch.eye(experts) * CODE_GAIN,
        "made.codes": lambda: (_token_codes if token else _balance_codes)(weights) * scale,
    }


def _balance_codes(weights: Weights) -> Tensor:
    """The balance as a part of every token's embedding (V, C)."""
    balance_C = weights.fetch("model.router.balance").flatten()
    return balance_C.expand(weights.config.vocab_size, -1)


@torch.no_grad()
def _token_codes(weights: Weights) -> Tensor:
    """One-hot choices of a router that reads the token alone, every head (V, C)."""
    model = StreamedModel(weights.source)
    assert model.router is not None
    ids_1V = torch.arange(weights.config.vocab_size)[None]
    logits_HVE = model.router(model.embed(ids_1V), ids_1V)
    if model.router.balance is not None:
        logits_HVE = logits_HVE + model.router.balance[:, None]
    codes_HVE = torch.nn.functional.one_hot(logits_HVE.argmax(-1), logits_HVE.shape[-1])
    return codes_HVE.transpose(0, 1).flatten(1).float()
