"""The order in which kernels read a bit-nested weight, made of one width when it is loaded.

A row tile is 128 rows; a block is the weights of a row that one step of a kernel reads. In a tile
every row has 32 words of 16 bits, and code e of word i belongs to input `32 e + i`: the words are
loaded once, and each code position meets a contiguous slice of 32 inputs. One step of a kernel
reads one contiguous piece of memory, and k bits are k/8 bytes a weight; only 6 are held as 8.

    width  block  codes                         extra
    2      256    8 codes of 2 bits a word      none
    3      512    8 codes of 3 bits, 2 tiles    8 of their 24 bits, both tiles: see `fields.places`
    4      128    4 codes of 4 bits a word      none
    6, 8   128    codes of the 4-bit weight     codes of the residual, 4 bits each

Inputs are padded to whole blocks and rows to whole tiles with codes 0, scale 0 and zero 0.

Shapes: E experts, N rows, F neurons, K inputs, R row tiles, B blocks, G groups, P groups with the
padding's, H main tiles a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from fissile.kernels.fields import BYTE, SLICE, STEEP, block_codes, codes_per_word, halves, places
from fissile.kernels.layout import (
    STORED_BITS,
    dequantize,
    pack,
    pack_residual,
    unpack,
    unpack_residual,
    with_own_floats,
)

TILE_ROWS = 128
PAIR = 8  # gate rows, then as many up rows: a thread of a matrix instruction holds both
BITS = (2, 3, 4, 6, 8)
GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, eq=False)
class TiledWeight:
    """One weight, or a stack of experts' weights, in the order of the kernels.

    Attributes:
        codes: int16 (E, R, B, H, 128, 32), words of the main plane.
        extra: int16 (E, R, B, 128, 32), the rest of the codes at 3 bits, the residual's codes at 8;
            else None.
        theta: int32 (E, R, P, 128), fp16 scale in the low half and fp16 zero in the high half; at 8
            bits those of the 4-bit weight.
        theta_extra: the same of the residual at 8 bits, else None.
        bits: 2, 3, 4, 6 or 8.
        group_size: 32, 64 or 128.
        shape: (E, N, K) without padding.
        paired: rows are gate and up projections of N/2 neurons, interleaved by eight.
        companding: of the values, 1 where codes are values, see `fissile.kernels.layout`.
    """

    codes: Tensor
    extra: Tensor | None
    theta: Tensor
    theta_extra: Tensor | None
    bits: int
    group_size: int
    shape: tuple[int, int, int]
    paired: bool
    companding: float = 1.0

    @property
    def kernel_bits(self) -> int:
        """Width of the kernel that reads it: 6 bits are a residual of small codes."""
        return 8 if self.bits > STORED_BITS else self.bits

    @property
    def steep(self) -> int:
        """How codes become values, see `fissile.kernels.fields.STEEP`."""
        return STEEP[self.companding]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes in memory, padding included."""
        return sum(part.nbytes for part in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by attribute."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: part for name, part in found.items() if isinstance(part, Tensor)}

    def expert(self, index: int) -> TiledWeight:
        """One matrix of a stack, as a view."""
        views: dict[str, Any] = {k: v[index : index + 1] for k, v in self.tensors().items()}
        return replace(self, shape=(1, *self.shape[1:]), **views)

    def to(self, device: torch.device | str) -> TiledWeight:
        """The same weight on another device."""
        moved: dict[str, Any] = {name: part.to(device) for name, part in self.tensors().items()}
        return replace(self, **moved)


def check_tile(bits: int, group_size: int, companding: float = 1.0) -> None:
    """Raise ValueError, saying why, unless kernels exist for such a weight."""
    if bits not in BITS:
        raise ValueError(f"bits {bits}: the kernels take {', '.join(map(str, BITS))}")
    if group_size not in GROUP_SIZES:
        raise ValueError(
            f"group_size {group_size}: the kernels take {', '.join(map(str, GROUP_SIZES))}"
        )
    if companding not in STEEP:
        raise ValueError(f"companding {companding}: the kernels take {', '.join(map(str, STEEP))}")


def tile(
    parts: Mapping[str, Tensor], bits: int, *, paired: bool = False, companding: float = 1.0
) -> TiledWeight:
    """Bring a stored weight into the order of the kernels.

    Args:
        parts: planes and floats of `bits` as `fissile.kernels.layout` stores them, (N, K) or
            (E, N, K).
        bits: 2, 3, 4, 6 or 8.
        paired: the N rows are N/2 gate rows, then N/2 up rows, of one gated MLP.
        companding: of this weight, see `fissile.kernels.layout`.

    Raises:
        ValueError: no kernels for this width, group size or companding, a part is missing, or N
            is odd in a paired weight.
    """
    own = with_own_floats(parts, bits)
    stacked = {k: v if v.dim() == 3 + k.startswith("theta") else v[None] for k, v in own.items()}
    codes = unpack(stacked, min(bits, 4))
    experts, rows, inputs = codes.shape
    group_size = inputs // stacked[f"theta_{bits}"].shape[2]
    check_tile(bits, group_size, companding)
    if paired and rows % 2:
        raise ValueError(f"{rows} rows are no pairs of gate and up rows")
    order = row_order(rows, paired).to(codes.device)
    width = 8 if bits > STORED_BITS else bits
    padding = -inputs % block_codes(width)
    padded = torch.nn.functional.pad(_gather(codes, order), (0, padding))
    groups = padded.shape[-1] // group_size
    extra = theta_extra = None
    if bits > STORED_BITS:
        residual = _gather(unpack_residual(stacked, bits), order)
        extra = _words(torch.nn.functional.pad(residual, (0, padding)), 8)[0].squeeze(3)
        theta_extra = _tile_theta(stacked[f"theta_{bits}"], order, groups)
    words, rest = _words(padded, width)
    return TiledWeight(
        codes=words,
        extra=extra if rest is None else rest,
        theta=_tile_theta(stacked[f"theta_{min(bits, STORED_BITS)}"], order, groups),
        theta_extra=theta_extra,
        bits=bits,
        group_size=group_size,
        shape=(experts, rows, inputs),
        paired=paired,
        companding=companding if bits > 2 else 1.0,  # at 2 bits a code is its own value
    )


def stored_parts(weight: TiledWeight) -> dict[str, Tensor]:
    """Exact inverse of `tile`: what `fissile.kernels.layout.segment_names` lists, (E, N, K).

    Floats that were tied come back as the width's own.
    """
    order = _stored_order(weight)
    codes = _codes(weight.codes, weight.extra, weight.kernel_bits)
    width = min(weight.bits, STORED_BITS)
    planes = pack(_untiled(codes, weight, order) << (STORED_BITS - width))
    parts = {name: plane for name, plane in planes.items() if int(name[-1]) <= width}
    parts[f"theta_{width}"] = _stored_theta(weight.theta, weight, order)
    if weight.bits > STORED_BITS:
        assert weight.extra is not None
        assert weight.theta_extra is not None
        residual = _untiled(_codes(weight.extra.unsqueeze(3), None, 8), weight, order)
        residual = residual << (2 * STORED_BITS - weight.bits)
        planes = pack_residual(residual)
        parts |= {name: plane for name, plane in planes.items() if int(name[-1]) <= weight.bits}
        parts[f"theta_{weight.bits}"] = _stored_theta(weight.theta_extra, weight, order)
    return parts


def untile(weight: TiledWeight) -> Tensor:
    """Decode to float32 (E, N, K) in the stored order of rows; bit-equal to the stored weight."""
    return dequantize(stored_parts(weight), weight.bits, weight.companding)


def row_order(rows: int, paired: bool) -> Tensor:
    """Stored row of every resident row, -1 in the padding: int64, a multiple of 128 long."""
    size = rows // 2 if paired else rows
    step = TILE_ROWS // 2 if paired else TILE_ROWS
    padded = -(-size // step) * step
    index = torch.arange(padded)
    index[size:] = -1
    if not paired:
        return index
    up = torch.where(index < 0, index, index + size)
    return torch.stack([index.view(-1, PAIR), up.view(-1, PAIR)], dim=1).flatten()


def _gather(values: Tensor, order: Tensor) -> Tensor:
    """Rows (E, N, ...) in resident order, zeros in the padding."""
    taken = values[:, order.clamp(min=0)]
    taken[:, order < 0] = 0
    return taken


def _to_int16(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)


def _tiles(codes: Tensor, bits: int) -> Tensor:
    """(E, R*128, K) to (E, R, B, H, 128, code of the word, 32)."""
    experts, rows, inputs = codes.shape
    shape = (experts, rows // TILE_ROWS, TILE_ROWS, inputs // block_codes(bits), halves(bits))
    return codes.view(*shape, codes_per_word(bits), SLICE).permute(0, 1, 3, 4, 2, 5, 6)


def _words(codes: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Words (E, R, B, H, 128, 32) and, at 3 bits, extra words (E, R, B, 128, 32)."""
    lanes = _tiles(codes, bits).int()
    words = torch.zeros_like(lanes[..., 0, :])
    extra = torch.zeros_like(words)
    for code, pieces in enumerate(places(bits)):
        for in_extra, bit, size, low in pieces:
            part = (lanes[..., code, :] >> low & (1 << size) - 1) << bit
            (extra if in_extra else words).bitwise_or_(part)
    if bits != 3:
        return _to_int16(words).contiguous(), None
    both = extra[:, :, :, 0] | extra[:, :, :, 1] << BYTE
    return _to_int16(words).contiguous(), _to_int16(both).contiguous()


def _codes(words: Tensor, extra: Tensor | None, bits: int) -> Tensor:
    """Inverse of `_words`: uint8 (E, R*128, K)."""
    main, other = words.int(), words.int()
    if bits == 3:
        assert extra is not None
        other = torch.stack([extra.int(), extra.int() >> BYTE], dim=3)
    codes = []
    for pieces in places(bits):
        parts = (
            ((other if in_extra else main) >> bit & (1 << size) - 1) << low
            for in_extra, bit, size, low in pieces
        )
        codes.append(torch.stack([*parts]).sum(0).to(torch.uint8))
    return _rows_of(torch.stack(codes, dim=-2))


def _rows_of(tiles: Tensor) -> Tensor:
    """(E, R, B, H, 128, code, 32) to (E, R*128, K)."""
    rows_first = tiles.permute(0, 1, 4, 2, 3, 5, 6)
    return rows_first.flatten(3).flatten(1, 2)


def _tile_theta(theta: Tensor, order: Tensor, groups: int) -> Tensor:
    pairs = _gather(theta, order).int()  # (E, R*128, G, 2)
    words = pairs[..., 1] << 16 | pairs[..., 0] & 0xFFFF
    words = torch.nn.functional.pad(words, (0, groups - words.shape[-1]))
    return words.unflatten(1, (-1, TILE_ROWS)).transpose(2, 3).contiguous()


def _stored_order(weight: TiledWeight) -> Tensor:
    """Resident row of every stored row, int64 (N,)."""
    order = row_order(weight.shape[1], weight.paired).to(weight.device)
    kept = torch.nonzero(order >= 0).squeeze(1)
    return torch.empty_like(kept).scatter_(0, order[kept], kept)


def _untiled(codes: Tensor, weight: TiledWeight, order: Tensor) -> Tensor:
    return codes[:, order, : weight.shape[2]]


def _stored_theta(theta: Tensor, weight: TiledWeight, order: Tensor) -> Tensor:
    """(E, R, P, 128) words to int16 (E, N, G, 2)."""
    rows = theta.transpose(2, 3).flatten(1, 2)[:, order, : weight.shape[2] // weight.group_size]
    return rows.contiguous().view(torch.int16).unflatten(-1, (-1, 2))
