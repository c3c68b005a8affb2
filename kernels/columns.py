"""Products with a bit-nested weight on the CPU, for few tokens and for many, in float32.

A weight (N, K) is held as K columns: row k of a table is the N codes that meet input k, packed at
2 or 4 bits. Torch's quantized embedding bag sums such rows with the inputs as weights, in vector
instructions and straight from the packed bytes, so a group's partial product is one bag, and the
affine floats are factored out of the groups:

    y = sum_g scale_g * (sum_{k in g} x_k q_k) + zero_g * sum_{k in g} x_k

Rows of all experts lie in one table, so one call serves any mix of experts. For many tokens a slice
of columns is decoded at a time and multiplied as floats. Torch alone is needed: the file is copied
into artifacts.

Shapes: N output rows, K inputs, G groups along the inputs, E experts (1 for a plain matrix), R rows
of activations; a row is a token, or a token and one of its experts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fissile.kernels.layout import (
    COMPANDED,
    STORED_BITS,
    pack,
    pack_residual,
    segment_names,
    unpack,
    unpack_residual,
    values,
    with_own_floats,
)

FEW_ROWS = 16
"""Rows per weight up to which bags are faster than decoding (measured on x86 with AVX-512)."""
_SCRATCH = 1 << 21  # weights decoded at a time, 8 MB of float32
_SUMS = 1 << 23  # sums of groups held at a time, 32 MB of float32
_PART = 1 << 21  # multiplications that are worth a thread of their own
_ENTRIES = (2, 4)
_WEIGHTS = {(1.5, 3): (1, 16), (1.5, 4): (2, 23), (2.0, 3): (1, 16), (2.0, 4): (1, 16)}
"""By companding and width: weights of the digits, 0..15 and 0..3, that sum up to every value."""


@dataclass(frozen=True, eq=False)
class Columns:
    """A weight at one width as columns of codes.

    Attributes:
        tables: uint8 (E*K, bytes): the code, or the two digits of a companded value, then the
            residual's code at 6 and 8 bits. A row holds N entries, padded to whole bytes, and the
            scale 1 and bias 0 of its bag.
        digits: (bits of an entry, its weight in the value, index in `thetas`) of each table.
        thetas: float16 (2, E, G, N), scale and zero of the value and of the residual.
        bits: the width.
        companding: of the weight, see `layout.COMPANDED`.
        shape: (E, N, K).
        groups: G.
        stacked: whether the weight had a leading dimension of experts.
    """

    tables: tuple[Tensor, ...]
    digits: tuple[tuple[int, int, int], ...]
    thetas: tuple[Tensor, ...]
    bits: int
    companding: float
    shape: tuple[int, int, int]
    groups: int
    stacked: bool

    def tensors(self) -> dict[str, Tensor]:
        """Everything that takes memory, by name."""
        tables = {f"table_{i}": table for i, table in enumerate(self.tables)}
        return tables | {f"theta_{i}": theta for i, theta in enumerate(self.thetas)}


def unavailable() -> str | None:
    """Why this torch cannot multiply columns; None when it can."""
    for entry in _ENTRIES:
        for kind in ("rowwise_offsets", "unpack"):
            if not hasattr(torch.ops.quantized, _operator(entry, kind)):
                return f"torch {torch.__version__} has no quantized::{_operator(entry, kind)}"
    return None


def to_columns(parts: Mapping[str, Tensor], bits: int, companding: float = 1.0) -> Columns:
    """Rearrange the stored parts of one width; nothing is rounded.

    Args:
        parts: what `segment_names` lists for `bits`, of a weight (N, K) or (E, N, K), on the CPU.
        bits: 2, 3, 4, 6 or 8.
        companding: of the weight.

    Raises:
        ValueError: a part is missing.
    """
    stacked = parts["plane_2"].ndim == 3
    own = with_own_floats(parts, bits)
    stack = {k: v if stacked else v.unsqueeze(0) for k, v in own.items()}
    width = min(bits, STORED_BITS)
    codes = unpack(stack, width)
    pieces = [(codes, (2 if bits == 2 else 4, 1, 0))]
    if companding != 1 and bits > 2:
        low, high = _WEIGHTS[companding, width]
        value = values(codes, width, companding).int()
        top = _top_digit(value, low, high)
        pieces = [((value - high * top) // low, (4, low, 0)), (top, (2, high, 0))]
    names = [f"theta_{width}"]
    if bits > STORED_BITS:
        pieces.append((unpack_residual(stack, bits), (bits - STORED_BITS, 1, 1)))
        names.append(f"theta_{bits}")
    experts, outputs, quarter = stack["plane_2"].shape
    return Columns(
        tuple(
            torch.cat([_pack_columns(one.to(torch.uint8), digit[0]) for one in codes_ENK])
            for codes_ENK, digit in pieces
        ),
        tuple(digit for _, digit in pieces),
        tuple(stack[name].view(torch.float16).permute(3, 0, 2, 1).contiguous() for name in names),
        bits,
        companding,
        (experts, outputs, quarter * 4),
        stack[names[0]].shape[2],
        stacked,
    )


def from_columns(columns: Columns) -> dict[str, Tensor]:
    """Inverse of `to_columns`: the parts, bit for bit, in file order; never tied floats."""
    experts, outputs, inputs = columns.shape
    codes = [
        table_values(columns, term)[:, :outputs].to(torch.uint8).view(experts, inputs, outputs)
        for term in range(len(columns.thetas))
    ]
    base_ENK = codes[0].transpose(1, 2).contiguous()
    width = min(columns.bits, STORED_BITS)
    if columns.companding != 1 and width > 2:
        known = torch.tensor(COMPANDED[columns.companding][width], dtype=torch.uint8)
        base_ENK = torch.searchsorted(known, base_ENK).to(torch.uint8)
    parts = pack(base_ENK << (STORED_BITS - width))
    if columns.bits > STORED_BITS:
        residual = codes[1].transpose(1, 2).contiguous() << (2 * STORED_BITS - columns.bits)
        parts |= pack_residual(residual)
    for theta, name in zip(columns.thetas, (width, columns.bits), strict=False):
        parts[f"theta_{name}"] = theta.permute(1, 3, 2, 0).contiguous().view(torch.int16)
    names = segment_names(columns.bits, (width, columns.bits))
    return {name: parts[name] if columns.stacked else parts[name][0] for name in names}


def multiply(x_RK: Tensor, columns: Columns, experts_R: Tensor | None = None) -> Tensor:
    """Return x W^T in float32, (R, N), from the packed codes; the cost grows with R.

    Args:
        x_RK: activations of any float dtype.
        columns: the weight.
        experts_R: int64, whose rows of the stack each activation meets; None for the first.

    Raises:
        ValueError: K of `x` and of the weight differ.
    """
    _, outputs, inputs = columns.shape
    if x_RK.shape[-1] != inputs:
        raise ValueError(f"x has K {x_RK.shape[-1]}, the weight has K {inputs}")
    if x_RK.dtype is not torch.float32:
        x_RK = x_RK.float()
    rows, most = len(x_RK), max(1, _SUMS // (columns.groups * outputs))
    if rows > most:
        pieces = x_RK.split(most)
        chosen = (None,) * len(pieces) if experts_R is None else experts_R.split(most)
        pairs = zip(pieces, chosen, strict=True)
        return torch.cat([multiply(x, columns, experts) for x, experts in pairs])
    # A bag runs on one thread. Large weights are cut along their groups, whatever the rows, so that
    # a row's sums have the same order in every batch; of small weights the rows are shared out.
    threads = 1 if torch.compiler.is_compiling() else torch.get_num_threads()
    by_group = max(1, min(threads, columns.groups, outputs * inputs // _PART))
    if by_group > 1:
        cuts = [columns.groups * i // by_group for i in range(by_group + 1)]
        jobs = [(x_RK, experts_R, *pair) for pair in pairwise(cuts)]
        return torch.stack(_share(columns, jobs)).sum(0)
    by_row = max(1, min(threads, rows, rows * outputs * inputs // _PART))
    if by_row > 1:
        pieces = x_RK.tensor_split(by_row)
        chosen = (None,) * by_row if experts_R is None else experts_R.tensor_split(by_row)
        jobs = [(*pair, 0, columns.groups) for pair in zip(pieces, chosen, strict=True)]
        return torch.cat(_share(columns, jobs))
    return _partial(x_RK, columns, experts_R, 0, columns.groups)


def multiply_decoded(x_RK: Tensor, columns: Columns, expert: int = 0) -> Tensor:
    """Return x W^T in the dtype of x, (R, N), a slice of decoded columns at a time.

    Args:
        x_RK: activations.
        columns: the weight.
        expert: which matrix of the stack.
    """
    size, total = columns.shape[2] // columns.groups, None
    step = max(1, _SCRATCH // (size * columns.shape[1]))
    for begin in range(0, columns.groups, step):
        end = min(begin + step, columns.groups)
        weight_KN = decode(columns, expert, begin, end).to(x_RK.dtype)
        y = x_RK[:, begin * size : end * size] @ weight_KN
        if end - begin == columns.groups:
            return y
        total = y.float() if total is None else total + y
    assert total is not None
    return total.to(x_RK.dtype)


def decode(columns: Columns, expert: int, begin: int, end: int) -> Tensor:
    """Columns of the groups begin .. end of one matrix: float32 (K', N), the weight transposed."""
    _, outputs, inputs = columns.shape
    size = inputs // columns.groups
    rows = slice(expert * inputs + begin * size, expert * inputs + end * size)
    total: Tensor | None = None
    for term, theta in enumerate(columns.thetas):
        codes = table_values(columns, term, rows)
        if codes.shape[1] != outputs:
            codes = codes[:, :outputs].contiguous()
        codes_GSN = codes.view(end - begin, size, outputs)
        scale, zero = theta[:, expert, begin:end, None].float().unbind(0)
        codes_GSN.mul_(scale).add_(zero)  # rounds as layout.affine does
        total = codes_GSN if total is None else total.add_(codes_GSN)
    assert total is not None
    return total.view(-1, outputs)


def table_values(columns: Columns, term: int, rows: slice = slice(None)) -> Tensor:
    """Values (0) or residual codes (1) of rows of the tables as float32, padding included."""
    total: Tensor | None = None
    for table, (entry, weight, own) in zip(columns.tables, columns.digits, strict=True):
        if own == term:
            part = getattr(torch.ops.quantized, _operator(entry, "unpack"))(table[rows])
            if total is None:
                total = part if weight == 1 else part.mul_(weight)
            else:
                width = min(total.shape[1], part.shape[1])  # padded to bytes of other sizes
                total = total[:, :width].add_(part[:, :width], alpha=weight)
    assert total is not None
    return total


def _share(
    columns: Columns, jobs: Sequence[tuple[Tensor, Tensor | None, int, int]]
) -> list[Tensor]:
    """Partial products, each on a thread of its own."""
    inference = torch.is_inference_mode_enabled()

    def run(job: tuple[Tensor, Tensor | None, int, int]) -> Tensor:
        x_RK, experts_R, begin, end = job
        with torch.inference_mode(inference), torch.no_grad():  # both are a thread's own
            return _partial(x_RK, columns, experts_R, begin, end)

    return list(_pool(len(jobs), os.getpid()).map(run, jobs))


def _partial(
    x_RK: Tensor, columns: Columns, experts_R: Tensor | None, begin: int, end: int
) -> Tensor:
    """The groups begin .. end of the product, (R, N)."""
    rows, inputs = x_RK.shape
    size, outputs = inputs // columns.groups, columns.shape[1]
    if (begin, end) != (0, columns.groups):
        x_RK = x_RK[:, begin * size : end * size]
    find = _bags if torch.compiler.is_compiling() else _kept_bags
    index, offsets = find(rows, size, begin, end)
    if experts_R is not None:
        index = index.view(rows, x_RK.shape[1]) + (experts_R * inputs).to(torch.int32).unsqueeze(1)
        index = index.view(-1)
    x = x_RK.reshape(-1)
    sums = x.view(rows, end - begin, size).sum(-1)
    products: list[Tensor | None] = [None] * len(columns.thetas)
    for table, (entry, weight, own) in zip(columns.tables, columns.digits, strict=True):
        p = _bag(entry)(table, index, offsets, False, 0, False, x, None, False)
        p = p.view(rows, end - begin, p.shape[-1])
        if p.shape[-1] != outputs:
            p = p[..., :outputs]
        before = products[own]
        if before is not None:
            products[own] = before.add_(p, alpha=weight)
        else:
            products[own] = p if weight == 1 else p.mul_(weight)
    total: Tensor | None = None
    for product, theta in zip(products, columns.thetas, strict=True):
        assert product is not None
        if experts_R is not None:
            theta = theta[:, experts_R, begin:end]
        elif theta.shape[1] > 1 or end - begin < columns.groups:
            theta = theta[:, :1, begin:end]
        scale, zero = theta.float().unbind(0)
        # Elementwise, so that a row's result does not depend on how many rows there are.
        y = product.mul_(scale).addcmul_(sums.unsqueeze(-1), zero).sum(1)
        total = y if total is None else total.add_(y)
    assert total is not None
    return total


def _top_digit(value: Tensor, low: int, high: int) -> Tensor:
    """The digit h of value = low * l + high * h for which l is a whole number from 0 to 15."""
    top = torch.zeros_like(value)
    for digit in range(3, 0, -1):
        rest = value - high * digit
        fits = (rest >= 0) & (rest % low == 0) & (rest <= 15 * low)
        top = torch.where((top == 0) & fits, digit, top)
    return top


def _pack_columns(codes_NK: Tensor, entry: int) -> Tensor:
    """Rows of a table, uint8 (K, bytes)."""
    lanes = 8 // entry
    codes_KN = torch.nn.functional.pad(codes_NK.T, (0, -len(codes_NK) % lanes))
    packed = codes_KN[:, ::lanes].contiguous()
    for lane in range(1, lanes):
        packed |= codes_KN[:, lane::lanes] << (entry * lane)
    tail = torch.tensor([1.0, 0.0], dtype=torch.float16).view(torch.uint8)
    return torch.cat([packed, tail.expand(len(packed), -1)], dim=1)


def _operator(entry: int, kind: str) -> str:
    return f"embedding_bag_{entry}bit_{kind}"


@lru_cache
def _bag(entry: int) -> Any:
    return getattr(torch.ops.quantized, _operator(entry, "rowwise_offsets")).default


def _bags(rows: int, size: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Table rows of every activation, and where each group's bag begins; int32."""
    own = torch.arange(begin * size, end * size, dtype=torch.int32)
    return own.repeat(rows), torch.arange(0, rows * len(own), size, dtype=torch.int32)


@lru_cache(maxsize=256)
def _kept_bags(rows: int, size: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
    # A tensor that is made in inference mode could not be used outside it later.
    with torch.inference_mode(False):
        return _bags(rows, size, begin, end)


@lru_cache(maxsize=4)
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Threads of this process; a forked child makes its own."""
    return ThreadPoolExecutor(threads, thread_name_prefix="fissile-columns")
