"""Which variants of the kernels are compiled without a GPU, and what their machine code must hold.

The instructions per weight of the inner loop decide whether a low-bit product keeps up with memory:
a multiprocessor issues 128 lanes a clock, so that 3 TB/s on 132 of them at 1.75 GHz leave 5.3
instructions for a weight of 4 bits, 4.0 for 3 bits and 2.8 for 2 bits, at full issue.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fissile.kernels.fields import block_codes, halves
from fissile.kernels.proof.aot import Report, compile_kernel

DECODE_CAPS = {2: 1.7, 3: 2.5, 4: 2.6}
COMPANDED_CAP = 4.0
# Bytes of shared memory that one block of threads can have.
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
_POINTERS = {
    "code_ptr": "*i16",
    "extra_ptr": "*i16",
    "theta_ptr": "*i32",
    "theta_extra_ptr": "*i32",
    "expert_ptr": "*i32",
    "begin_ptr": "*i32",
    "offsets_ptr": "*i32",
    "slot_ptr": "*i32",
}
# Sizes that real weights do not make multiples of 16.
_ODD = ("rows", "padded_groups", "row_tiles", "blocks", "split_blocks")


@dataclass(frozen=True)
class Variant:
    """One compilation.

    Attributes:
        kernel: "decode", "prefill" or "dequantize".
        target: see `fissile.kernels.proof.aot.TARGETS`.
        bits: width.
        block_m: tokens of a tile.
        act: -1 for a plain product, else the index of an activation of gate and up rows.
        group: weights of a group.
        fp16: activations in float16, else bfloat16.
        block_n: rows of a tile.
        warps: of a block of threads.
        stages: of the software pipeline.
        portable: plain operations instead of PTX, as on gfx942.
        padded: the inputs end within a block.
        steep: of a companded weight, see `fissile.kernels.fields.STEEP`.
        cap: most instructions a weight, or None.
        unaligned: pointers of which the compiler must not assume 16 bytes.
    """

    kernel: str
    target: str
    bits: int
    block_m: int = 8
    act: int = -1
    group: int = 128
    fp16: bool = False
    block_n: int = 128
    warps: int = 4
    stages: int = 3
    portable: bool = False
    padded: bool = False
    steep: int = 0
    cap: float | None = None
    unaligned: tuple[str, ...] = field(default=())

    @property
    def weights(self) -> int:
        """Weights that a block of threads unpacks in one turn of its loop."""
        tiles = halves(self.bits) if self.kernel == "prefill" else 1
        return self.block_n * block_codes(self.bits) // tiles

    def compile(self) -> Report:
        """Compile this variant and count its instructions."""
        kernel = _kernel(self.kernel)
        flags = {
            "BITS": self.bits,
            "GROUP": self.group,
            "BN": self.block_n,
            "BM": self.block_m,
            "FP16": self.fp16,
            "PTX": not self.portable,
            "PADDED": self.padded,
            "ROUTED": True,
            "GATHER": self.act >= 0,
            "SCATTER": self.act < 0,
            "TOP_K": 2,
            "ACT": self.act,
            "BIAS": False,
            "PAIRED": True,
            "STEEP": self.steep,
        }
        constants = {name: flags[name] for name in kernel.arg_names if name in flags}
        half = "*fp16" if self.fp16 else "*bf16"
        pointers = _POINTERS | {"x_ptr": half, "y_ptr": half, "bias_ptr": half}
        return compile_kernel(
            kernel,
            {name: pointers.get(name, "i32") for name in kernel.arg_names},
            constants,
            self.target,
            unaligned=[n for n in kernel.arg_names if n in (*_ODD, *self.unaligned)],
            warps=self.warps,
            stages=self.stages,
        )


def _kernel(name: str) -> Any:
    from fissile.kernels.triton_decode import decode_kernel
    from fissile.kernels.triton_prefill import dequantize_kernel, prefill_kernel

    return {
        "decode": decode_kernel,
        "prefill": prefill_kernel,
        "dequantize": dequantize_kernel,
    }[name]


SMALL: dict[str, dict[str, object]] = {
    "combine_neurons_kernel": {"ACT": 0},
    "combine_rows_kernel": {"TOP_K": 2, "WEIGHTED": True, "ADD": True, "CHUNK": 1024},
    "route_kernel": {"EXPERTS": 127, "BLOCK": 8, "ROWS": 256, "TILES": 256, "EXPERTS_PAD": 128},
}
"""Compile-time parameters of the kernels around the products, at their largest."""


def compile_small(name: str, target: str) -> Report:
    """Compile one of `SMALL`."""
    from fissile.kernels import triton_small

    kernel = getattr(triton_small, name)
    half = dict.fromkeys(("x_ptr", "h_ptr", "add_ptr", "y_ptr"), "*bf16")
    floats = dict.fromkeys(("part_ptr", "weight_ptr"), "*fp32")
    tables = dict.fromkeys(("tile_expert_ptr", "tile_begin_ptr", "offsets_ptr", "slot_ptr"), "*i32")
    types = half | floats | tables | {"index_ptr": "*i64"}
    return compile_kernel(
        kernel,
        {parameter: types.get(parameter, "i32") for parameter in kernel.arg_names},
        SMALL[name],
        target,
        unaligned=[n for n in kernel.arg_names if n not in types],
    )


def variants() -> Iterator[Variant]:
    """What continuous integration compiles."""
    for target in ("sm_80", "sm_90"):
        for bits, cap in DECODE_CAPS.items():
            yield Variant(
                "decode",
                target,
                bits,
                warps=4 if bits == 3 else 2,
                stages=2 if bits == 3 else 3,
                cap=cap,
            )
        yield Variant("decode", target, 4, act=0, warps=2, cap=DECODE_CAPS[4])
        yield Variant("prefill", target, 4, block_m=128, act=0, warps=8, stages=2)
        # Narrow tiles, which gate and up rows of few tokens are cut into.
        yield Variant("decode", target, 4, act=0, block_n=32, warps=1, stages=6, cap=2.6)
    yield Variant("decode", "sm_90", 2, act=0, block_n=32, warps=1, stages=6, cap=DECODE_CAPS[2])
    yield Variant("decode", "sm_90", 3, act=0, block_n=64, warps=2, cap=DECODE_CAPS[3])
    yield Variant("decode", "sm_90", 8, warps=2)
    yield Variant("decode", "sm_90", 2, warps=2, fp16=True, cap=DECODE_CAPS[2])
    yield Variant("decode", "sm_90", 4, warps=2, fp16=True, act=2, cap=DECODE_CAPS[4])
    yield Variant("decode", "sm_90", 2, group=32, padded=True)
    yield Variant("decode", "sm_90", 4, warps=2, group=64)
    yield Variant("decode", "sm_90", 4, block_m=16, act=0)
    yield Variant("decode", "sm_90", 3, block_m=32, warps=8, stages=2)
    yield Variant("decode", "sm_90", 4, block_m=64, warps=8, stages=2)
    yield Variant("decode", "sm_80", 3, steep=2, stages=2, cap=COMPANDED_CAP)
    yield Variant("decode", "sm_90", 4, steep=3, warps=2, cap=COMPANDED_CAP)
    for bits in (2, 3, 8):
        yield Variant("prefill", "sm_90", bits, block_m=128, warps=8, stages=2)
    yield Variant("prefill", "sm_90", 4, block_m=128, warps=8, stages=2, steep=3)
    yield Variant("dequantize", "sm_90", 3, warps=8)
    for bits in (2, 3, 4):
        stages = 1 if bits == 3 else 2
        yield Variant("decode", "gfx942", bits, block_m=16, portable=True, stages=stages)
    for bits in (3, 4):
        yield Variant("prefill", "gfx942", bits, block_m=64, portable=True, warps=8, stages=2)


def misses(variant: Variant, report: Report) -> list[str]:
    """What the machine code of a variant lacks; empty when it passes."""
    found = []
    if report.spills:
        found.append(f"{report.spills} instructions spill registers")
    if report.stack:
        found.append(f"{report.stack} bytes of stack a thread")
    if variant.kernel != "dequantize" and not report.tensor_cores:
        found.append("no tensor-core instruction")
    if not report.wide_copies:
        found.append("no load of 128 bits")
    if report.shared > SHARED[variant.target]:
        found.append(f"{report.shared} bytes of shared memory, at most {SHARED[variant.target]}")
    if variant.cap is not None and report.per_weight(variant.weights) > variant.cap:
        count = report.per_weight(variant.weights)
        found.append(f"{count:.2f} instructions a weight, at most {variant.cap}")
    return found
