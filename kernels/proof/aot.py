"""Compile Triton kernels ahead of time, without a GPU, and read what the compiler made of them.

The report of a kernel counts the instructions of its machine code: registers spilled, tensor-core
instructions, the width of copies, and the instructions of the inner loop per weight, which decide
whether a low-bit kernel can keep up with memory.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "gfx942")


@dataclass(frozen=True)
class Report:
    """What the machine code of one kernel holds.

    Attributes:
        target: "sm_80", "sm_90" or "gfx942".
        registers: a thread.
        spills: stores and loads of registers to local memory, in instructions.
        stack: bytes of local memory a thread.
        shared: bytes of shared memory a block.
        tensor_cores: matrix instructions.
        wide_copies: loads of 128 bits, asynchronous ones included.
        loop: instructions of the longest innermost loop.
        threads: of a block.
        opcodes: instructions by name.
    """

    target: str
    registers: int
    spills: int
    stack: int
    shared: int
    tensor_cores: int
    wide_copies: int
    loop: int
    threads: int
    opcodes: Mapping[str, int]

    def per_weight(self, weights: int) -> float:
        """Instructions of the loop for each of the `weights` that a block unpacks in one turn."""
        return self.loop / (weights / self.threads)


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    target: str,
    *,
    unaligned: Sequence[str] = (),
    warps: int = 4,
    stages: int = 3,
) -> Report:
    """Compile one kernel and count its instructions.

    Args:
        kernel: a `triton.jit` function.
        signature: type of every parameter that is no constant, as Triton writes them ("*bf16").
        constants: values of the compile-time parameters.
        target: one of `TARGETS`.
        unaligned: parameters that are not multiples of 16. The launcher finds this out from real
            arguments; without it the compiler would make narrower copies than on a GPU.
        warps: of a block.
        stages: of the software pipeline.

    Raises:
        ValueError: `target` is not one of `TARGETS`.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    known = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
    if target not in known:
        raise ValueError(f"target {target!r}, accepted: {', '.join(known)}")
    names = list(kernel.arg_names)
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = [n for n in names if n not in constants and n not in unaligned]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=types,
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options: dict[str, object] = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(
        source, target=GPUTarget(*known[target]), options={**options, "enable_fp_fusion": True}
    )
    read = _amd if known[target][0] == "hip" else _nvidia
    return read(target, compiled, warps)


def _nvidia(target: str, compiled: Any, warps: int) -> Report:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output([str(tools / "cuobjdump"), "--dump-resource-usage", file.name])
        code = _output([str(tools / "nvdisasm"), "-c", file.name])
    lines = list(instructions(code))
    count = Counter(name for name, _ in lines if name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Report(
        target=target,
        registers=int(found[1]),
        spills=sum(n for name, n in count.items() if name.split(".")[0] in ("STL", "LDL")),
        stack=int(found[2]),
        shared=compiled.metadata.shared,
        tensor_cores=sum(n for k, n in count.items() if k.split(".")[0] in ("HMMA", "HGMMA")),
        wide_copies=sum(n for k, n in count.items() if k.startswith("LDG") and ".128" in k),
        loop=longest_loop(lines),
        threads=32 * warps,
        opcodes=count,
    )


def _amd(target: str, compiled: Any, warps: int) -> Report:
    code = compiled.asm["amdgcn"]
    body = re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", code, re.MULTILINE)
    count = Counter(body)

    def stated(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", code)
        return int(found[1]) if found else 0

    return Report(
        target=target,
        registers=stated("vgpr_count"),
        spills=stated("vgpr_spill_count") + stated("sgpr_spill_count"),
        stack=stated("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        tensor_cores=sum(n for name, n in count.items() if name.startswith("v_mfma")),
        wide_copies=sum(
            n
            for k, n in count.items()
            if re.match(r"(global|buffer)_load_(dwordx4|lds_dwordx4)", k)
        ),
        loop=longest_loop(amd_instructions(code)),
        threads=64 * warps,
        opcodes=count,
    )


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(code: str) -> list[tuple[str, str]]:
    """Lines of a disassembly: (opcode, operands) of instructions, ("", name) of labels."""
    found = []
    for line in code.splitlines():
        text = line.strip()
        if label := re.match(r"(\.L_\w+):", text):
            found.append(("", label[1]))
        elif body := re.match(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", text):
            found.append((body[1], body[2]))
    return found


def amd_instructions(code: str) -> list[tuple[str, str]]:
    """The same of an AMD assembly."""
    found = []
    for line in code.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            found.append(("", label[1]))
        elif body := re.match(r"\s+([a-z]+_[a-z0-9_]+)(.*)", line):
            found.append((body[1], body[2]))
    return found


def longest_loop(lines: Sequence[tuple[str, str]]) -> int:
    """Instructions of the longest loop that holds no other loop; 0 without loops."""
    labels = {name: i for i, (opcode, name) in enumerate(lines) if not opcode}
    loops = []
    for i, (opcode, operands) in enumerate(lines):
        branches = opcode.startswith(("BRA", "s_cbranch", "s_branch"))
        target = re.search(r"(\.L\w+)", operands) if branches else None
        if target and labels.get(target[1], i) < i:
            loops.append((labels[target[1]], i))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [sum(1 for opcode, _ in lines[first:last] if opcode) + 1 for first, last in inner]
    # A branch to itself ends every kernel; it is no loop.
    return max((body for body in bodies if body > 1), default=0)
