"""Tables of time and memory, of stored results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stored_results import ROOT, number, stored, table

KERNELS = "<!-- kernels: from fissile bench kernels -->"


def mmlu_speed() -> str:
    """MMLU beside lm-evaluation-harness's own model class."""
    rows = stored("mmlu_speed")["rows"]
    lines = [
        [
            str(row["shots"]),
            f"{row['n_items']:,}",
            f"{row['fissile']['seconds']:.1f}",
            f"{row['lm_eval']['seconds']:.1f}",
            f"{row['fissile']['peak_bytes'] / 1e6:.0f}",
            f"{row['lm_eval']['peak_bytes'] / 1e6:.0f}",
            f"{100 * row['same_choices']:g} %",
        ]
        for row in rows
    ]
    head = [
        "shots",
        "questions",
        "seconds",
        "harness, seconds",
        "MB",
        "harness, MB",
        "same answers",
    ]
    how = rows[0]["conditions"]
    return table(head, lines) + (
        f"\n\nConditions: the demo model, {how['dtype']}, {how['threads']} CPU thread,"
        f" lm-evaluation-harness {how['versions']['lm_eval']}. Clock: {how['clock']}."
        f" Memory: {how['memory']}."
    )


def layer_7b() -> str:
    """Conversion of one layer of the shape of a 7B model."""
    data = stored("layer_7b")
    how = data["conditions"]
    rows = [[name, f"{seconds:.2f}"] for name, seconds in data["by_step"].items()]
    rows.append(["all", f"{data['seconds']:.2f}"])
    return table(["step", "seconds"], rows) + (
        f"\n\nConditions: {how['tokens']:,} tokens, width {how['width']}, {how['neurons']} neurons,"
        f" {how['experts']} experts, {how['threads']} CPU threads; peak memory"
        f" {data['peak_rss_bytes'] / 1e9:.2f} GB. Counted: {how['counted']}."
    )


def decode() -> str:
    """A token on the CPU: packed weights beside dense ones and torch's own int4 operator."""
    models = {"dense model": "decode", "converted model": "decode_routed"}
    rows = [
        [
            model,
            row["implementation"],
            *(number(row[key], 2) for key in ("ms_per_token", "dense_over_this")),
            f"{row['weights_bytes'] / 1e6:.1f}",
        ]
        for model, name in models.items()
        for row in stored(name)["rows"]
    ]
    how = stored("decode")["conditions"]
    return table(["", "weights", "ms a token", "times as fast", "MB of weights"], rows) + (
        f"\n\nConditions: demo model, batch 1, the least of {how['repeats']} repeats of"
        f" {how['steps']} tokens, {how['torch_threads']} thread, torch"
        f" {how['versions']['torch']}. The converted model is compared with the dense one: it has"
        f" a router to run and many small products, and at this size is no faster."
    )


def ranks() -> str:
    """Quantization shared by processes beside one process on one core."""
    data = stored("ranks")
    how = data["conditions"]
    rows = [
        [label, *(f"{data[key][unit]:.1f}" for unit in ("seconds", "processor_seconds"))]
        for label, key in (("one process", "one"), (f"{how['processes']} processes", "shared"))
    ]
    return table(["", "seconds", "processor seconds of the busiest"], rows) + (
        f"\n\n{data['speedup']:.2f} times as fast. Conditions: {how['layers']} layer of width"
        f" {how['width']} with {how['neurons']} neurons, {how['tokens']:,} tokens, effort"
        f" {how['effort']}, one thread a process; largest difference of a weight's loss"
        f" {data['loss_difference']:.2%}."
    )


def solver() -> str:
    """Our solver on one layer beside decoupleQ's reference algorithm."""
    data = stored("solver")
    joint = "; ".join(
        f"2, 3 and 4 bits jointly at effort {effort} take {row['time_ratio']:.2f} times as long as"
        " one after the other"
        for effort, row in data["joint"].items()
    )
    return f"{_solver(data)} {joint}."


def solver_efforts() -> str:
    """The same on fewer rows and more tokens, at every effort."""
    return _solver(stored("solver_efforts"))


def _solver(data: dict[str, Any]) -> str:
    how, systems = data["conditions"], {"decoupleQ's algorithm": data["reference"]}
    systems |= {f"ours, {effort}": row for effort, row in data["ours"].items()}
    rows = [
        [name, f"{row['seconds']:.1f}", f"{row['loss']:.4f}", f"{row['held_out']:.4f}"]
        for name, row in systems.items()
    ]
    return table(["", "seconds", "loss", "on other inputs"], rows) + (
        f"\n\nConditions: one made-up layer of {how['outputs']:,} x {how['inputs']:,} weights,"
        f" {how['bits']} bits, groups of {how['group_size']}, {how['tokens']:,} tokens, in one"
        f" process with {how['threads']} thread; other work ran beside it (load"
        f" {how['load_average']['after']:.1f} on {how['cores']} cores at the end)."
    )


def solver_memory() -> str:
    """The most memory that solving a linear takes, for every shape of a 7B model."""
    results = stored("solver_memory")["results"]
    rows = []
    for one in results:
        how = one["conditions"]
        cells = [f"{how['outputs']:,} x {how['inputs']:,}"]
        for row in (one["ours"]["fast"], one["joint"]["fast"]):
            cells += [f"{row['memory_ratio']:.2f}", f"{row['seconds']:.0f}"]
        rows.append(cells)
    how = results[0]["conditions"]
    load = max(one["conditions"]["load_average"]["after"] for one in results)
    head = ["", f"{how['bits']} bits", "seconds", "2, 3 and 4 bits in one code", "seconds"]
    return table(head, rows) + (
        "\n\nMost memory in use during the solve, weight and Hessian included, in units of these"
        f" two in float32. Conditions: made-up layers, effort fast, groups of {how['group_size']},"
        f" {how['threads']} thread; other work ran beside it (load up to {load:.1f} on"
        f" {how['cores']} cores)."
    )


def billion() -> str:
    """A model of 1.1 billion weights, layer by layer."""
    data = stored("billion")
    how, made = data["conditions"], data["checkpoint"]
    row = [
        f"{data['peak_rss_bytes'] / 1e9:.2f}",
        f"{data['quantize_seconds'] / 60:.0f}",
        f"{data['seconds'] / 60:.0f}",
        f"{data['artifact_bytes'] / 1e9:.2f}",
    ]
    head = ["peak memory, GB", "minutes of quantizing", "with export and verify", "artifact, GB"]
    return table(head, [row]) + (
        f"\n\nConditions: random {made['dtype']} weights ({made['weights']:,}), widths 2, 3 and 4,"
        f" effort fast, 10,240 tokens, {how['threads']} thread; {how['beside']}; memory is the"
        f" largest resident set of the whole command; commit {how['commit']}, {how['date']}."
    )


def kernels() -> str:
    """First product of the table that `bench kernels --set readme=docs/results.md` writes."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    inner = text.partition(KERNELS)[2].partition("<!-- end of kernels -->")[0]
    return "\n".join(inner.strip().splitlines()[:5])


TABLES: dict[str, Callable[[], str]] = {
    "mmlu-speed": mmlu_speed,
    "layer-7b": layer_7b,
    "decode": decode,
    "ranks": ranks,
    "solver": solver,
    "solver-efforts": solver_efforts,
    "solver-memory": solver_memory,
    "billion": billion,
    "kernels": kernels,
}
