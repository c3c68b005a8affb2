"""Make Triton's interpreter fit to prove kernels: bfloat16, inline PTX, bounds, races, traffic.

The interpreter runs kernels on CPU tensors with numpy when TRITON_INTERPRET=1 is set before Triton
is imported. By itself it computes on the bit patterns of bfloat16, knows no inline assembly and
reads whatever memory an address points to. `install` mends the first two; `Guard` watches the last.

What is emulated is checked, not trusted: bfloat16 operations that are not emulated raise, and the
elements that inline assembly packs into one register are paired at random, so that a kernel that
relied on the pairing would fail.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

Words = np.ndarray


def bf16_to_float(bits: Words) -> Words:
    """uint16 patterns to float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(values: Words) -> Words:
    """float32 to uint16 patterns, to nearest, ties to even; any NaN becomes the quiet one."""
    single = np.ascontiguousarray(values, dtype=np.float32)
    bits = single.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)


def install(seed: int = 0) -> None:
    """Mend the interpreter of this process; calling it again changes nothing.

    Args:
        seed: of the pairing of elements that share a register.

    Raises:
        RuntimeError: Triton was imported without TRITON_INTERPRET=1.
    """
    from triton import knobs

    interpreter = _interpreter_module()
    if not knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before Triton is imported")
    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "fissile_mended"):
        return
    builder.fissile_mended = True
    _mend_bf16(interpreter, builder)
    _mend_splat(interpreter, builder)
    _mend_index(interpreter)
    rng = np.random.default_rng(seed)

    def inline_asm(
        self: Any, asm: str, constraints: str, args: Any, types: Any, pure: bool, pack: int
    ) -> Any:
        return _inline_asm(interpreter, rng, asm, constraints, args, types, pack)

    builder.create_inline_asm = inline_asm


def _mend_bf16(interpreter: Any, builder: Any) -> None:
    import triton.language as tl

    handle = interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def patterns(value: Any) -> bool:
        return value.dtype.scalar == tl.bfloat16

    def as_float(value: Any) -> Words:
        return bf16_to_float(value.data) if patterns(value) else value.data

    def mended_cast(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or tl.bfloat16 not in (source, target):
            return cast(self, src, dst_type)
        if target == tl.bfloat16:
            return handle(float_to_bf16(src.data.astype(np.float32)), target)
        number = bf16_to_float(src.data).astype(interpreter._get_np_dtype(target))
        return handle(number, target)

    def mended_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if not patterns(a) and not patterns(b):
            return dot(self, a, b, d, *rest)
        product = np.matmul(as_float(a), as_float(b), dtype=np.float32)
        return handle(product + d.data, d.dtype.scalar)

    def refuse(original: Callable[..., Any]) -> Callable[..., Any]:
        def checked(self: Any, first: Any, *rest: Any) -> Any:
            if patterns(first):
                raise TypeError("bfloat16 arithmetic is not emulated: cast to float32 first")
            return original(self, first, *rest)

        return checked

    builder.cast_impl = mended_cast
    builder.create_fp_to_fp = lambda self, src, dst_type, mode: mended_cast(self, src, dst_type)
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(builder, f"create_{name}", mended_cast)
    builder.create_dot = mended_dot
    for name in ("binary_op", "unary_op", "create_fma"):
        setattr(builder, name, refuse(getattr(builder, name)))
    builder.get_bf16 = lambda self, value: handle(
        float_to_bf16(np.array([value], np.float32)), tl.bfloat16
    )


def _mend_splat(interpreter: Any, builder: Any) -> None:
    """Keep the result of a scalar comparison a truth value when it becomes the mask of a tile."""
    splat = builder.create_splat

    def mended_splat(self: Any, shape: Any, value: Any) -> Any:
        if value.data.dtype != np.bool_:
            return splat(self, shape, value)
        mask = np.full(shape.shape, value.data.item())
        return interpreter.TensorHandle(mask, value.dtype.scalar)

    builder.create_splat = mended_splat


def _mend_index(interpreter: Any) -> None:
    """Let `range` take scalars that numpy holds as arrays of one element."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _inline_asm(
    interpreter: Any,
    rng: np.random.Generator,
    asm: str,
    constraints: str,
    args: Any,
    types: Any,
    pack: int,
) -> Any:
    kinds = [text.strip() for text in constraints.split(",")]
    assert all(kind in ("r", "=r", "=&r") for kind in kinds), constraints
    outputs = sum(kind.startswith("=") for kind in kinds)
    assert outputs == len(types)
    assert len(kinds) == outputs + len(args)
    shape = np.broadcast_shapes(*(arg.data.shape for arg in args))
    count = int(np.prod(shape))
    order = rng.permutation(count)
    registers = {}
    for i, arg in enumerate(args):
        assert arg.data.dtype.itemsize * pack == 4, "operands must fill a register of 32 bits"
        flat = np.broadcast_to(arg.data, shape).reshape(-1)[order]
        registers[f"${outputs + i}"] = np.ascontiguousarray(flat).view(np.uint32)
    results = run_ptx(asm, registers, outputs)
    handles = []
    for words, kind in zip(results, types, strict=True):
        dtype = interpreter._get_np_dtype(kind.scalar)
        flat = np.empty(count, dtype)
        flat[order] = words.view(dtype)
        handles.append(interpreter.TensorHandle(flat.reshape(shape), kind.scalar))
    return _Results(handles)


class _Results:
    """What the code generator asks an assembly call for."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def get_result(self, i: int) -> Any:
        return self._handles[i]


def run_ptx(asm: str, registers: Mapping[str, Words], outputs: int) -> list[Words]:
    """Execute straight-line PTX on arrays of 32-bit words.

    Args:
        asm: statements of lop3, shl, shr, mov and min, max, fma.rn of (b)f16x2.
        registers: "$i" to uint32 arrays of equal length: the inputs.
        outputs: how many of "$0", "$1" … are returned.

    Raises:
        ValueError: another instruction.
    """
    state = dict(registers)
    size = len(next(iter(registers.values())))

    def value(text: str) -> Words:
        if text in state:
            return state[text]
        return np.full(size, int(text, 0), np.uint32)

    for statement in asm.strip().strip("{}").split(";"):
        words = statement.split(None, 1)
        if not words or words[0] == ".reg":
            continue
        target, *operands = (part.strip() for part in words[1].split(","))
        state[target] = _execute(words[0], [value(operand) for operand in operands])
    return [state[f"${i}"] for i in range(outputs)]


def _execute(name: str, operands: list[Words]) -> Words:
    if name == "mov.b32":
        return operands[0]
    if name == "shr.b32":
        return operands[0] >> operands[1]
    if name == "shl.b32":
        return operands[0] << operands[1]
    if name == "lop3.b32":
        a, b, c, table = operands
        out = np.zeros_like(a)
        for i in range(8):
            if int(table[0]) >> i & 1:
                out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return out
    if found := re.fullmatch(r"fma\.rn\.(b?f16)x2", name):
        return _fma(found[1], operands)
    if found := re.fullmatch(r"(min|max)\.(b?f16)x2", name):
        return _extreme(found[1], found[2], operands)
    raise ValueError(f"no emulation of the PTX instruction {name}")


def _extreme(which: str, kind: str, operands: list[Words]) -> Words:
    """The smaller or larger of two lanes."""
    a, b = (operand.view(np.uint16) for operand in operands)
    first, second = (
        bf16_to_float(lane) if kind == "bf16" else lane.view(np.float16) for lane in (a, b)
    )
    return np.where((first < second) == (which == "min"), a, b).view(np.uint32)


def _fma(kind: str, operands: list[Words]) -> Words:
    """a * b + c of two lanes, rounded once (float64 holds products of both formats exactly)."""
    lanes = [operand.view(np.uint16) for operand in operands]
    if kind == "f16":
        a, b, c = (lane.view(np.float16).astype(np.float64) for lane in lanes)
        return (a * b + c).astype(np.float16).view(np.uint32)
    a, b, c = (bf16_to_float(lane).astype(np.float64) for lane in lanes)
    exact = a * b + c
    # Rounding to float32 first must not make a tie: go to odd where it was inexact.
    near = exact.astype(np.float32)
    away = np.where(near.astype(np.float64) != exact, np.uint32(1), np.uint32(0))
    low = np.abs(near.astype(np.float64)) > np.abs(exact)
    bits = near.view(np.uint32) - np.where(low, np.uint32(1), np.uint32(0))
    return float_to_bf16((bits | away).view(np.float32)).view(np.uint32)


def _interpreter_module() -> Any:
    import triton.runtime.interpreter as interpreter

    return interpreter


class GuardError(AssertionError):
    """A kernel left its tensors, or two programs wrote one address."""


class Guard:
    """Watch every access of the kernels that run inside the `with` block.

    Attributes:
        read: bytes loaded, by the name of the tensor.
        written: bytes stored or added, likewise.

    Args:
        tensors: all tensors that the kernels may touch, by name; views of one storage share it.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        spans: dict[int, tuple[int, str]] = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            if storage.nbytes():
                spans.setdefault(storage.data_ptr(), (storage.nbytes(), name))
        starts = sorted(spans)
        self._starts = np.array(starts, np.uint64)
        self._ends = np.array([start + spans[start][0] for start in starts], np.uint64)
        self._names = [spans[start][1] for start in starts]
        self._owners: dict[int, tuple[int, ...]] = {}
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()

    def __enter__(self) -> Guard:
        self._module = _interpreter_module()
        self._real = self._module._interpreter
        self._module._interpreter = _Watched(self, self._real)
        return self

    def __exit__(self, *raised: object) -> None:
        self._module._interpreter = self._real

    def see(self, kind: str, pointers: Words, mask: Words, size: int) -> None:
        """Note one access of `size` bytes at each address that the mask leaves.

        Raises:
            GuardError: an address outside all tensors, or one that another program stored to.
        """
        pointers, mask = np.broadcast_arrays(pointers, mask)
        address = pointers[mask.astype(bool)].astype(np.uint64)
        if not address.size:
            return
        owner = np.searchsorted(self._starts, address, side="right").astype(np.int64) - 1
        outside = (owner < 0) | (address + np.uint64(size) > self._ends[owner])
        program = tuple(self._module.interpreter_builder.grid_idx)
        if outside.any():
            first = int(np.argmax(outside))
            near = self._names[max(int(owner[first]), 0)]
            raise GuardError(
                f"program {program}: {kind} of {int(outside.sum())} addresses outside all tensors, "
                f"the first {int(address[first]) - int(self._starts[max(int(owner[first]), 0)])} "
                f"bytes after the begin of {near}"
            )
        for i, count in zip(*np.unique(owner, return_counts=True), strict=True):
            counter = self.read if kind == "load" else self.written
            counter[self._names[i]] += int(count) * size
        if kind == "store":
            for one in address.tolist():
                if self._owners.setdefault(one, program) != program:
                    raise GuardError(
                        f"programs {self._owners[one]} and {program} store to one place"
                    )


class Launches(TorchDispatchMode):
    """What a GPU would be asked to run inside the `with` block, in order.

    Attributes:
        names: of Triton kernels and of torch's operations that are not views or allocations. A read
            by the host shows as `_local_scalar_dense`.
        grids: of the Triton kernels.
    """

    _FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.grids: list[tuple[int, ...]] = []

    def __enter__(self) -> Launches:
        self._executor = _interpreter_module().GridExecutor
        self._run = run = self._executor.__call__

        def counted(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.names.append(executor.fn.__name__)
            self.grids.append(tuple(executor.grid))
            with _disable_current_modes():  # the interpreter's own copies
                return run(executor, *args, **kwargs)

        self._executor.__call__ = counted
        return super().__enter__()

    def __exit__(self, *raised: object) -> None:
        self._executor.__call__ = self._run
        super().__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in self._FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class _Watched:
    """The interpreter's memory with a guard in front."""

    def __init__(self, guard: Guard, real: Any) -> None:
        self._guard, self._real = guard, real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def load(self, pointers: Words, mask: Words, other: Words, dtype: Any) -> Any:
        self._guard.see("load", pointers, mask, np.dtype(dtype).itemsize)
        return self._real.load(pointers, mask, other, dtype)

    def store(self, pointers: Words, value: Words, mask: Words) -> Any:
        self._guard.see("store", pointers, mask, value.dtype.itemsize)
        return self._real.store(pointers, value, mask)

    def atomic_rmw(self, op: Any, pointers: Words, value: Words, mask: Words, sem: Any) -> Any:
        self._guard.see("atomic", pointers, mask, value.dtype.itemsize)
        return self._real.atomic_rmw(op, pointers, value, mask, sem)
