"""The kernels compiled ahead of time for GPUs that are not here: what their machine code holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tests.kernels.needs import needs_triton

from fissile.kernels import layout, tiles
from fissile.kernels.defaults import Arch, decode_blocks, default_config, narrowed, prefill_blocks
from fissile.kernels.proof.aot import TARGETS, Report, amd_instructions, instructions, longest_loop
from fissile.kernels.proof.gates import (
    SMALL,
    Variant,
    compile_small,
    every_variant,
    general_misses,
    misses,
    resident_warps,
    shipped,
    variants,
)


@pytest.fixture(autouse=True, scope="module")
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    needs_triton()
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    yield
    patch.undo()


def name(variant: Variant) -> str:
    kind = "act" if variant.act >= 0 else "plain"
    dtype = "fp16" if variant.fp16 else "bf16"
    return (
        f"{variant.kernel}-{variant.target}-{variant.bits}bit-m{variant.block_m}-n{variant.block_n}"
        f"-g{variant.group}-{kind}-{dtype}-steep{variant.steep}{'-padded' * variant.padded}"
    )


@pytest.mark.parametrize("variant", variants(), ids=name)
def test_machine_code_passes_its_gates(variant: Variant) -> None:
    assert misses(variant, variant.compile()) == []


@pytest.mark.slow
@pytest.mark.parametrize("variant", sorted({*every_variant()} - {*variants()}, key=repr), ids=name)
def test_machine_code_of_every_other_default(variant: Variant) -> None:
    assert misses(variant, variant.compile()) == []


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", SMALL)
def test_small_kernels_keep_to_their_registers(kernel: str, target: str) -> None:
    assert general_misses(compile_small(kernel, target)) == []


FAILURES = [
    # Two accumulators of 128 tokens do not fit the registers of four warps.
    (Variant("decode", "sm_90", 4, block_m=128), "spill"),
    # Without PTX every code costs its own shift, mask and join.
    (Variant("decode", "sm_80", 2, portable=True, cap=1.7), "instructions a weight"),
    # Eight tokens are fewer than the matrix instruction of this target takes.
    (Variant("decode", "gfx942", 4, block_m=8, portable=True, stages=2), "no tensor-core"),
    (Variant("decode", "sm_90", 4, unaligned=("x_ptr", "code_ptr")), "no load of 128 bits"),
    (Variant("decode", "sm_80", 2, stages=16, warps=2), "bytes of shared memory, at most 166912"),
    (Variant("decode", "sm_80", 2, stages=10, warps=2), "2 warps fit a multiprocessor"),
]


@pytest.mark.parametrize(("variant", "said"), FAILURES, ids=[said for _, said in FAILURES])
def test_every_gate_can_fail(variant: Variant, said: str) -> None:
    assert any(said in miss for miss in misses(variant, variant.compile()))


def test_stack_is_a_miss() -> None:
    report = Report("sm_90", 32, 0, 16, 0, 1, 1, 100, 128, {})
    variant = Variant("decode", "sm_90", 4)
    assert misses(variant, report) == ["16 bytes of stack a thread"]
    assert misses(variant, replace(report, stack=0)) == []


def test_registers_that_fit_no_block_are_a_miss() -> None:
    report = Report("sm_90", 255, 0, 0, 0, 1, 1, 100, 512, {})
    assert general_misses(report) == ["255 registers a thread do not fit a block"]
    assert resident_warps(replace(report, threads=256)) == 8
    assert resident_warps(replace(report, registers=128)) == 16
    assert resident_warps(replace(report, registers=64, shared=100_000)) == 2 * 16
    assert resident_warps(Report("gfx942", 512, 0, 0, 0, 1, 1, 1, 256, {})) == 4


def test_a_loop_that_was_not_found_is_a_miss() -> None:
    report = Report("sm_90", 32, 0, 0, 0, 1, 1, 0, 128, {})
    variant = Variant("decode", "sm_90", 4, cap=2.6)
    assert misses(variant, report) == ["no loop was found, so its instructions were not counted"]


def test_what_is_compiled_is_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every choice that the operators can make without a table is among the gates' variants."""
    proved = {
        (v.kernel, v.target, v.bits, v.group, v.block_m, v.block_n, v.warps, v.stages)
        for v in every_variant()
    }
    weight = tiles.tile(stored_weight(), 4)
    targets: tuple[Arch, ...] = ("sm_80", "sm_90", "gfx942")
    for target in targets:
        monkeypatch.setattr("fissile.kernels.defaults.current_arch", lambda t=target: t)
        for bits in (2, 3, 4, 8):
            for group in tiles.GROUP_SIZES:
                held = replace(weight, bits=bits, group_size=group)
                chosen = [
                    (kind, default_config(kind, bits, rows, group))
                    for kind in ("decode", "prefill")
                    for rows in (1, 8, 9, 16, 17, 33, 64, 65, 4096)
                ]
                few = default_config("decode", bits, 1, group)
                chosen += [("decode", narrowed(few, held, 1, count)) for count in (1, 2, 99)]
                for kind, c in chosen:
                    cut = (c.block_m, c.block_n, c.num_warps, c.num_stages)
                    assert (kind, target, bits, group, *cut) in proved
        assert {v.block_m for v in shipped(target) if v.kernel == "decode"} == {
            *decode_blocks(target)
        }
        assert {v.block_m for v in shipped(target) if v.kernel == "prefill"} == {
            *prefill_blocks(target)
        }


def stored_weight() -> dict[str, torch.Tensor]:
    codes = torch.zeros(16, 128, dtype=torch.uint8)
    floats = torch.ones(16, 1)
    return layout.pack(codes) | {"theta_4": layout.encode_theta(floats, floats)}


def test_the_longest_inner_loop_is_counted() -> None:
    code = """
    .L_x_0:
        /*0000*/ MOV R1, c[0x0] ;
    .L_x_1:
        /*0010*/ @P0 FADD R1, R1, R2 ;
        /*0020*/ LDG.E.128 R4, [R2] ;
        /*0030*/ @!P1 BRA `(.L_x_1) ;
        /*0040*/ FADD R1, R1, R2 ;
        /*0050*/ @P2 BRA `(.L_x_0) ;
    .L_x_2:
        /*0060*/ BRA `(.L_x_2) ;
    """
    lines = instructions(code)
    assert [opcode for opcode, _ in lines if opcode].count("LDG.E.128") == 1
    assert longest_loop(lines) == 3
    code = """
.LBB0_1:
    s_mov_b32 s0, 1
.LBB0_2:
    v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], 0
    s_cbranch_scc1 .LBB0_2
    s_endpgm
    """
    lines = amd_instructions(code)
    assert longest_loop(lines) == 2
    assert longest_loop(lines[:3]) == 0
