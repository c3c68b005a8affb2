"""Write a described model as one GGUF file, for llama.cpp.

Weights are float32 or bfloat16, or keep their integer codes as Q4_1: blocks of 32 weights d*q + m
with 4-bit q and float16 d and m, which is exactly an affine code whose groups 32 divides.

Shapes: N rows, K inputs, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fissile.errors import UnsupportedModel, UsageError
from fissile.export.gguf_names import (
    architecture_of,
    metadata,
    place_of,
    rope_heads,
    rope_type,
)
from fissile.export.gguf_tokenizer import tokenizer_metadata
from fissile.export.pieces import Lowered, Target, aligned, materialise
from fissile.export.weights import BLOCK, Coded, Weights

Kind = Literal["F32", "BF16", "Q4_1"]
_FILE_TYPES = {"F32": 0, "BF16": 32, "Q4_1": 3}
_BLOCK_BYTES = 20


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: one target, or the same of all experts."""

    name: str
    targets: tuple[Target, ...]
    kind: Kind
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in elements."""
        own = self.targets[0].shape
        if self.name.endswith("_inp_shexp.weight"):
            own = own[1:]
        return (len(self.targets), *own) if self.stacked else own


def write_gguf(
    path: Path, lowered: Lowered, weights: Weights, *, dtype: str, codes: bool, name: str
) -> dict[str, int]:
    """Write a GGUF file.

    Args:
        path: of the file.
        lowered: a model for whose configuration `gguf_problems` finds nothing.
        weights: what it consists of.
        dtype: "float32" or "bfloat16", of matrices that keep no codes.
        codes: keep integer codes where they fit bit for bit.
        name: of the model, for the metadata.

    Returns:
        Number of tensors of every kind.

    Raises:
        UsageError: the package `gguf` is not installed.
        UnsupportedModel: a tokenizer that llama.cpp has no name for.
    """
    gguf = load_gguf()
    tensors = list(_tensors(lowered, weights, "BF16" if dtype == "bfloat16" else "F32", codes))
    writer = gguf.GGUFWriter(path, architecture_of(lowered.config))
    _write_metadata(gguf, writer, lowered, weights, name)
    kinds = {kind: sum(t.kind == kind for t in tensors) for kind in _FILE_TYPES}
    main = max(("Q4_1", "BF16", "F32"), key=lambda k: (kinds[k] > 0, k == "Q4_1", k == "BF16"))
    writer.add_file_type(_FILE_TYPES[main])
    for tensor in tensors:
        count = math.prod(tensor.shape)
        size = {"F32": 4 * count, "BF16": 2 * count, "Q4_1": count // BLOCK * _BLOCK_BYTES}
        # The dtype only decides what is derived from it when no kind is given.
        raw = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.uint16), size[tensor.kind], raw
        )
    rope = _rope_factors(lowered.config)
    if rope is not None:
        writer.add_tensor_info("rope_freqs.weight", rope.shape, rope.dtype, rope.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(_data(tensor, lowered, weights))
    if rope is not None:
        writer.write_tensor_data(rope)
    writer.close()
    return {kind: count for kind, count in kinds.items() if count}


def load_gguf() -> Any:
    """The package `gguf`.

    Raises:
        UsageError: it is not installed; the message says how to install it.
    """
    try:
        import gguf
    except ImportError:
        raise UsageError("GGUF files need the package gguf: pip install 'fissile[gguf]'") from None
    return gguf


def _write_metadata(gguf: Any, writer: Any, lowered: Lowered, weights: Weights, name: str) -> None:
    writer.add_name(name)
    arch = architecture_of(lowered.config)
    vocab = lowered.config["vocab_size"]
    pairs = {f"{arch}.{k}": v for k, v in metadata(lowered.config).items()}
    pairs |= {
        f"tokenizer.{k}": v for k, v in tokenizer_metadata(weights.source.folder, vocab).items()
    }
    for key, value in pairs.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _tensors(lowered: Lowered, weights: Weights, kind: Kind, codes: bool) -> Iterator[_Tensor]:
    """Targets gathered into the file's tensors, experts stacked."""
    gathered: dict[str, list[Target]] = {}
    stacked = set()
    for target in lowered.targets:
        place = place_of(target.name)
        gathered.setdefault(place.name, []).append(target)
        if place.expert is not None:
            stacked.add(place.name)
    for name, targets in gathered.items():
        fits = codes and all(_fits_q4_1(target, weights) for target in targets)
        exact = _stays_float32(name, targets)
        chosen: Kind = "F32" if exact else "Q4_1" if fits else kind
        yield _Tensor(name, tuple(targets), chosen, name in stacked)


def _stays_float32(name: str, targets: list[Target]) -> bool:
    """Vectors, routers, and the router that became a layer: its numbers span many magnitudes."""
    sources = [piece.source for target in targets for piece in target.pieces]
    lowered_router = any(source.startswith("model.router.") for source in sources)
    return len(targets[0].shape) == 1 or "ffn_gate_inp" in name or lowered_router


def _fits_q4_1(target: Target, weights: Weights) -> bool:
    pieces = target.pieces
    if not pieces or not aligned(target, BLOCK):
        return False
    doubled = all(math.log2(piece.factor).is_integer() for piece in pieces)
    return doubled and all(weights.is_coded(piece.source) for piece in pieces)


def _data(tensor: _Tensor, lowered: Lowered, weights: Weights) -> np.ndarray[Any, Any]:
    """Bytes of a tensor in file order."""
    parts = []
    for target in tensor.targets:
        heads = rope_heads(target.name, lowered.config)
        if tensor.kind == "Q4_1":
            parts.append(pack_q4_1(_coded(target, weights, heads)))
        else:
            weight = _interleaved(materialise(target, weights.fetch), heads)
            if tensor.kind == "BF16":
                parts.append(weight.to(torch.bfloat16).contiguous().view(torch.uint8).numpy())
            else:
                parts.append(weight.float().contiguous().numpy())
    joined = np.stack(parts) if tensor.stacked else parts[0]
    return np.ascontiguousarray(joined).reshape(-1)


def _coded(target: Target, weights: Weights, heads: int | None) -> Coded:
    """Codes, scales and zeros of a target, one scale per 32 columns."""

    def build(part: int) -> Tensor:
        unit = BLOCK if part else 1
        found = materialise(
            target, lambda name: weights.coded(name)[part], unit=unit, scaled=part > 0
        )
        return _interleaved(found, heads)

    return Coded(build(0), build(1), build(2))


def _interleaved(weight: Tensor, heads: int | None) -> Tensor:
    """Rows of every head from [first halves | second halves] to pairs, as `llama` rotates them."""
    if heads is None:
        return weight
    halves = weight.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def pack_q4_1(coded: Coded) -> np.ndarray[Any, Any]:
    """Q4_1 blocks, uint8 (N, K / 32 * 20): d, m, then 16 bytes with weight i and i + 16 in one.

    Raises:
        UnsupportedModel: a scale or zero is not a float16 number.
    """
    halves = []
    for value in (coded.scale, coded.zero):
        half = value.to(torch.float16)
        if not torch.equal(half.float(), value):
            raise UnsupportedModel("a scale or zero is too large for Q4_1; export with floats")
        halves.append(half.unsqueeze(-1).view(torch.uint8))
    low, high = coded.codes.unflatten(-1, (-1, 2, BLOCK // 2)).unbind(-2)
    blocks = torch.cat([*halves, low | (high << 4)], dim=-1)
    return blocks.flatten(-2).contiguous().numpy()


def _rope_factors(config: dict[str, Any]) -> np.ndarray[Any, Any] | None:
    """Llama 3's factors: what each rotary frequency is divided by."""
    if rope_type(config) != "llama3":
        return None
    rope = config["rope_parameters"]
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    exponents = np.arange(0, size, 2, dtype=np.float64) / size
    lengths = 2 * math.pi * float(rope["rope_theta"]) ** exponents
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
    smooth = np.clip((original / lengths - low) / (high - low), 0.0, 1.0)
    # A frequency becomes (1 - smooth) / factor + smooth times itself.
    return (1.0 / ((1 - smooth) / factor + smooth)).astype(np.float32)
