"""Which variants of the kernels are compiled without a GPU, and what their machine code must hold.

The instructions per weight of the inner loop decide whether a low-bit product keeps up with memory:
a multiprocessor issues 128 lanes a clock, so that 3 TB/s on 132 of them at 1.75 GHz leave 5.3
instructions for a weight of 4 bits, 4.0 for 3 bits and 2.8 for 2 bits, at full issue.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fissile.kernels.defaults import (
    Arch,
    Kind,
    LaunchConfig,
    config_of,
    decode_blocks,
    narrow_config,
    prefill_blocks,
)
from fissile.kernels.fields import block_codes, halves
from fissile.kernels.proof.aot import Report, compile_kernel
from fissile.kernels.tiles import GROUP_SIZES, TILE_ROWS

DECODE_CAPS = {2: 1.7, 3: 2.5, 4: 2.6}
# Twice as many floats a weight: at 2 and 4 bits the caps above do not hold.
DECODE_CAPS_32 = {2: 2.4, 3: 2.5, 4: 3.0}
COMPANDED_CAP = 4.0
WIDTHS = (2, 3, 4, 8)
NVIDIA: tuple[Arch, ...] = ("sm_80", "sm_90")
# Bytes of shared memory that one block of threads can have.
SHARED = {"sm_80": 166_912, "sm_90": 232_448, "gfx942": 65_536}
# 32-bit registers of a multiprocessor, and lanes of a warp.
REGISTERS = {"sm_80": (65_536, 32), "sm_90": (65_536, 32), "gfx942": (4 * 512 * 64, 64)}
# Every one of the four schedulers of a multiprocessor has a warp.
LEAST_WARPS = 4
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
        routed: rows of experts, else of one matrix, with a bias.
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
    routed: bool = True

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
            "ROUTED": self.routed,
            "GATHER": self.routed and self.act >= 0,
            "SCATTER": self.routed and self.act < 0,
            "TOP_K": 2,
            "ACT": self.act,
            "BIAS": not self.routed,
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


def shipped(target: Arch, groups: Sequence[int] = GROUP_SIZES) -> Iterator[Variant]:
    """The products as they are cut by default on a target, at every width and tile.

    Args:
        target: of the compiler.
        groups: group sizes.
    """
    for bits in WIDTHS:
        for group in groups:
            for block in decode_blocks(target):
                config = config_of("decode", bits, block, group, target)
                yield _default("decode", target, bits, group, config)
            for rows in (64, 32) if target in NVIDIA else ():
                # Gate and up rows of few tokens are cut into narrow tiles.
                config = narrow_config(bits, group, rows)
                yield _default("decode", target, bits, group, config, act=0)
            for block in prefill_blocks(target):
                config = config_of("prefill", bits, block, group, target)
                yield _default("prefill", target, bits, group, config, act=0)


def _default(
    kind: Kind, target: Arch, bits: int, group: int, config: LaunchConfig, act: int = -1
) -> Variant:
    caps = DECODE_CAPS_32 if group == 32 else DECODE_CAPS
    capped = kind == "decode" and config.block_m == 8 and target in NVIDIA
    return Variant(
        kind,
        target,
        bits,
        block_m=config.block_m,
        act=act,
        group=group,
        block_n=config.block_n,
        warps=config.num_warps,
        stages=config.num_stages,
        portable=target not in NVIDIA,
        cap=caps.get(bits) if capped else None,
    )


def variants() -> list[Variant]:
    """What continuous integration compiles; `every_variant` are all.

    Decoding by default at groups of 64 and 128, prefill at groups of 64 and its tallest tile, and
    one of each of the forms that a product can take besides.
    """
    found = [v for target in NVIDIA for v in shipped(target, (64, 128)) if v.kernel == "decode"]
    for target in NVIDIA:
        tallest = prefill_blocks(target)[-1]
        found += [
            v for v in shipped(target, (64,)) if v.kernel == "prefill" and v.block_m == tallest
        ]
    found += shipped("gfx942", (64,))
    return list(dict.fromkeys([*found, *_forms()]))


def every_variant() -> list[Variant]:
    """Every shipped default of every target at every group size, and the forms besides."""
    targets: tuple[Arch, ...] = (*NVIDIA, "gfx942")
    found = [v for target in targets for v in shipped(target)]
    found += [replace(v, padded=True, cap=None) for v in found]
    found += [
        Variant("dequantize", target, bits, group=group, warps=8, portable=target not in NVIDIA)
        for target in targets
        for bits in WIDTHS
        for group in GROUP_SIZES
    ]
    return list(dict.fromkeys([*found, *_forms()]))


def _forms() -> Iterator[Variant]:
    """float16, activations, ends within a block, dense rows, companded codes, decoding."""
    caps = DECODE_CAPS
    yield Variant("decode", "sm_90", 2, warps=2, fp16=True, cap=caps[2])
    yield Variant("decode", "sm_90", 4, warps=2, fp16=True, act=2, cap=caps[4])
    yield Variant("decode", "sm_90", 3, block_n=64, warps=2, act=1, fp16=True, cap=caps[3])
    for target in NVIDIA:
        # Inputs of experts are seldom multiples of the 512 that a block of 3 bits has.
        config = config_of("decode", 3, 8, 64, target)
        yield replace(_default("decode", target, 3, 64, config), padded=True)
    yield Variant("decode", "sm_80", 4, group=64, warps=2, routed=False, cap=caps[4])
    yield Variant("decode", "sm_90", 4, block_m=64, warps=8, stages=2)
    yield Variant("decode", "sm_80", 3, steep=2, block_n=64, warps=2, cap=COMPANDED_CAP)
    yield Variant("decode", "sm_90", 4, steep=3, warps=2, cap=COMPANDED_CAP)
    yield Variant("prefill", "sm_90", 4, block_m=128, warps=8, stages=2, steep=3)
    yield Variant("prefill", "sm_80", 2, block_m=128, warps=8, stages=2, routed=False, fp16=True)
    for bits in WIDTHS:
        yield Variant("dequantize", "sm_90", bits, group=64, warps=8)
    yield Variant("dequantize", "sm_80", 3, group=64, warps=8)
    yield Variant("dequantize", "gfx942", 4, group=64, warps=8, portable=True)


def resident_warps(report: Report) -> int:
    """Warps that the registers and the shared memory of one multiprocessor hold."""
    registers, lanes = REGISTERS[report.target]
    warps = report.threads // lanes
    taken = -(-max(report.registers, 1) // 8) * 8 * report.threads
    # A block takes 1 KB besides its own, and a multiprocessor has as much more than one block.
    by_memory = (SHARED[report.target] + 1024) // (report.shared + 1024)
    return min(registers // taken, by_memory) * warps


def misses(variant: Variant, report: Report) -> list[str]:
    """What the machine code of a variant lacks; empty when it passes."""
    found = general_misses(report)
    if variant.kernel != "dequantize":
        if not report.tensor_cores:
            found.append("no tensor-core instruction")
        if not report.loop:
            found.append("no loop was found, so its instructions were not counted")
    if not report.wide_copies:
        found.append("no load of 128 bits")
    # Narrow tiles are for grids that do not fill the GPU.
    least = LEAST_WARPS if variant.block_n == TILE_ROWS else variant.warps
    if (warps := resident_warps(report)) < least:
        found.append(f"{warps} warps fit a multiprocessor, at least {least}")
    if variant.cap is not None and report.per_weight(variant.weights) > variant.cap:
        count = report.per_weight(variant.weights)
        found.append(f"{count:.2f} instructions a weight, at most {variant.cap}")
    return found


def general_misses(report: Report) -> list[str]:
    """What no kernel may have: spilled registers, a stack, too much shared memory."""
    found = []
    if report.spills:
        found.append(f"{report.spills} instructions spill registers")
    if report.stack:
        found.append(f"{report.stack} bytes of stack a thread")
    if report.shared > SHARED[report.target]:
        found.append(f"{report.shared} bytes of shared memory, at most {SHARED[report.target]}")
    if not resident_warps(report):
        found.append(f"{report.registers} registers a thread do not fit a block")
    return found
