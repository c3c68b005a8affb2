"""The redundancy of any mixture of experts (Read-ME, section 2): what `fissile routing` does."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fissile import __version__
from fissile.eval.documents import read_documents, sha256_files
from fissile.eval.result import machine, model_sha256, versions
from fissile.eval.routing import check_routers, collect_choices
from fissile.eval.run import load_model, model_folder, read_config
from fissile.eval.tokens import load_tokenizer, model_limits
from fissile.eval.windows import sample_windows
from fissile.io.publish import atomic_write_bytes, atomic_write_json
from fissile.refactor.redundancy import routing_redundancy
from fissile.run.figures import draw
from fissile.run.metrics import finite
from fissile.run.metrics_routing import Redundancy
from fissile.run.page import page, section
from fissile.run.plots_routing import REDUNDANCY, REDUNDANCY_CAPTIONS
from fissile.run.report_routing import redundancy_table

Progress = Callable[[str, int, int, str], None]


def analyse_routing(
    source: Path,
    data: Path,
    *,
    tokens: int = 16384,
    context: int = 512,
    batch_tokens: int = 8192,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run text through a mixture of experts and measure how its choices repeat.

    Args:
        source: an artifact, a run folder, or any mixture of experts that transformers knows, in
            safetensors; nothing is downloaded and no code from the folder is run.
        data: JSONL of documents.
        tokens: budget; text is packed into windows, split evenly over the domains.
        context: tokens per window.
        batch_tokens: tokens per forward pass.
        seed: of the documents' order and of the shuffled baselines.
        progress: called as ("routing", done, total, "").

    Returns:
        "model", "decides", "redundancy" (see `routing_redundancy`), "seconds" and "conditions".

    Raises:
        UsageError: unreadable data, too little text.
        UnsupportedModel: a dense model, or one that transformers does not know.
        CorruptCheckpoint: weights that are missing or damaged.
    """
    folder = model_folder(source)
    config = read_config(folder)
    check_routers(folder, config)
    # Text first: a mistake in the data should not cost the time of loading a model.
    documents, tokenizer = read_documents(data), load_tokenizer(folder)
    model = load_model(folder, config)
    context = min(context, model_limits(model.config)[1] or context)
    ids_NS, _, domains = sample_windows(
        documents, tokenizer, tokens, context, seed, config=model.config
    )
    began = time.perf_counter()
    found = collect_choices(
        model, ids_NS, where=str(folder), batch_tokens=batch_tokens, progress=progress
    )
    redundancy = routing_redundancy(
        found.index,
        found.sequence_T,
        num_experts=found.num_experts,
        layers=found.layers,
        seed=seed,
    )
    return {
        "model": {"name": folder.resolve().name, "type": config.get("model_type")},
        "decides": found.decides,
        "redundancy": finite(redundancy),
        "seconds": time.perf_counter() - began,
        "conditions": {"context": context, "domains": domains, "seed": seed}
        | _conditions(folder, data),
    }


def _conditions(folder: Path, data: Path) -> dict[str, Any]:
    return {
        "data": {"file": data.name, "sha256": sha256_files([data])},
        "model_sha256": model_sha256(folder),
        "versions": versions(),
        **machine(),
    }


def summary_lines(found: dict[str, Any]) -> list[str]:
    """The numbers as lines for a terminal.

    Args:
        found: from `analyse_routing`.
    """
    rows = Redundancy.model_validate(found["redundancy"])
    pairs = {pair.later: pair for pair in rows.pairs}
    lines = [
        f"{rows.tokens} tokens, {rows.top_k:.3g} of {rows.num_experts} experts per token, "
        + ("one decision before the first layer" if len(rows.layers) == 1 else found["decides"]),
        "layer   sets  entropy  given before  information  shuffled  adjusted  guessed"
        "  switches  kept  repeat",
    ]
    for row in rows.layers:
        pair = pairs.get(row.layer)
        told = f"{'-':>12}  {'-':>11}  {'-':>8}  {'-':>8}  {'-':>7}"
        if pair is not None:
            told = (
                f"{pair.conditional:>12.3f}  {pair.information:>11.3f}  {pair.shuffled:>8.3f}"
                f"  {pair.adjusted:>8.3f}  {pair.predictable:>7.3f}"
            )
        lines.append(
            f"{row.layer:>5}  {row.sets:>5}  {row.entropy:>7.3f}  {told}  {_cell(row.switch_rate)}"
            f"  {_cell(row.kept, 4)}  {_cell(row.repeat_distance, 6, 1)}"
        )
    blurred = [p for p in rows.pairs if p.shuffled > 0.5 * min(p.entropy_a, p.entropy_b)]
    if blurred:
        lines.append(
            f"{len(blurred)} of {len(rows.pairs)} pairs have too many sets for {rows.tokens}"
            " tokens: unrelated tokens seem to share more than half; raise --tokens"
        )
    lines.append("entropies in bits; repeat: tokens since the same set")
    return lines


def _cell(value: float | None, width: int = 8, digits: int = 2) -> str:
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


def write_routing(found: dict[str, Any], out: Path) -> list[Path]:
    """Write routing.json and a self-contained routing.html.

    Args:
        found: from `analyse_routing`.
        out: folder; made if absent, files of these names are replaced.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = Redundancy.model_validate(found["redundancy"])
    figures = {
        name: draw(partial(plot, rows), REDUNDANCY_CAPTIONS[name])
        for name, plot in REDUNDANCY.items()
    }
    alone = "One decision serves every layer: there are no pairs of layers to compare."
    sections = [
        section("Between layers", [figures["information"], figures["transitions"]], alone),
        section("Along the text", [figures["locality"]], "No two tokens are neighbours."),
        section("Numbers", [redundancy_table(rows)]),
    ]
    kind = f"{found['model']['type']}, {found['decides']}"
    text = page(
        f"Routing of {found['model']['name']}", kind, sections, f"Written by fissile {__version__}."
    )
    atomic_write_json(out / "routing.json", finite(found))
    atomic_write_bytes(out / "routing.html", text.encode())
    return [out / "routing.json", out / "routing.html"]
