"""The kernels compiled ahead of time for GPUs that are not here: what their machine code holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from fissile.kernels.proof.aot import Report, instructions, longest_loop
from fissile.kernels.proof.gates import SMALL, Variant, compile_small, misses, variants


@pytest.fixture(autouse=True, scope="module")
def _fresh_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    pytest.importorskip("triton")
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    yield
    patch.undo()


def name(variant: Variant) -> str:
    kind = "act" if variant.act >= 0 else "plain"
    dtype = "fp16" if variant.fp16 else "bf16"
    return (
        f"{variant.kernel}-{variant.target}-{variant.bits}bit-m{variant.block_m}"
        f"-g{variant.group}-{kind}-{dtype}"
    )


@pytest.mark.parametrize("variant", variants(), ids=name)
def test_machine_code_passes_its_gates(variant: Variant) -> None:
    assert misses(variant, variant.compile()) == []


@pytest.mark.parametrize("kernel", SMALL)
def test_small_kernels_keep_to_their_registers(kernel: str) -> None:
    report = compile_small(kernel, "sm_90")
    assert (report.spills, report.stack) == (0, 0)


FAILURES = [
    # Two accumulators of 128 tokens do not fit the registers of four warps.
    (Variant("decode", "sm_90", 4, block_m=128), "spill"),
    # Without PTX every code costs its own shift, mask and join.
    (Variant("decode", "sm_80", 2, portable=True, cap=1.7), "instructions a weight"),
    # Eight tokens are fewer than the matrix instruction of this target takes.
    (Variant("decode", "gfx942", 4, block_m=8, portable=True, stages=2), "no tensor-core"),
    (Variant("decode", "sm_90", 4, unaligned=("x_ptr", "code_ptr")), "no load of 128 bits"),
]


@pytest.mark.parametrize(("variant", "said"), FAILURES, ids=[said for _, said in FAILURES])
def test_every_gate_can_fail(variant: Variant, said: str) -> None:
    assert any(said in miss for miss in misses(variant, variant.compile()))


def test_stack_is_a_miss() -> None:
    report = Report("sm_90", 32, 0, 16, 0, 1, 1, 100, 128, {})
    variant = Variant("decode", "sm_90", 4)
    assert misses(variant, report) == ["16 bytes of stack a thread"]
    assert misses(variant, replace(report, stack=0)) == []


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
