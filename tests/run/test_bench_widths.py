"""`fissile bench widths` on a small routed artifact: true rows, refusals of one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.export.converted import convert, write

from fissile.eval.documents import read_documents
from fissile.eval.perplexity import measure, prepare
from fissile.eval.tokens import load_tokenizer
from fissile.models.source import CheckpointSource, load_source

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def artifact(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("widths") / "artifact"
    return write(convert(tiny_model, "layerwise", 2), out, group=32, widths=(2, 3, 4))


def settings(text: Path, *more: str) -> list[str]:
    items = [f"calibration={text}", f"held_out={text}", "tokens=1024", "seen_tokens=512"]
    items += ["held_out_tokens=600", "context=64", *more]
    return [part for item in items for part in ("--set", item)]


def test_uniform_rows_are_the_artifacts_own_widths(
    run_cli: Cli, artifact: Path, text_file: Path
) -> None:
    given = settings(text_file, "steps=2", "mean_bits=[3.0]", "capacity=[0.5, 1, 1]")
    code, text, err = run_cli("bench", "widths", artifact, "-q", "--json", *given)
    assert code == 0, err
    found = json.loads(text)
    rows = {(r["method"], r["wanted_bits"]): r for r in found["rows"]}
    assert [r["method"] for r in found["rows"]] == [
        *["uniform"] * 3,
        "static plan",
        "training-free rule",
        "bit routers",
    ]
    # The experts of two bits in a model of four, by the stock modules.
    wide, narrow = CheckpointSource(artifact, 4), CheckpointSource(artifact, 2)
    model = load_source(wide).eval()
    for i, layer in enumerate(model.model.layers):
        state = narrow.layer_state(i)
        for name in ("gate_up_proj", "down_proj"):
            getattr(layer.mlp.experts, name).data.copy_(state[f"mlp.experts.{name}"])
    held_out = prepare(
        wide.config,
        load_tokenizer(artifact),
        read_documents(text_file),
        context=64,
        tokens=600,
    )
    expected = measure(model, held_out).score()["by_domain"]
    row = rows["uniform", 2]
    assert row["ppl_by_domain"] == pytest.approx(expected, rel=1e-4)
    dense = rows["uniform", 4]["ppl_by_domain"]
    gap = sum(math.log(expected[k] / dense[k]) for k in dense) / len(dense)
    assert row["gap"] == pytest.approx(gap, abs=1e-4)
    assert abs(gap) > 1e-3
    for name in ("static plan", "training-free rule", "bit routers"):
        # Fitted to other text.
        assert rows[name, 3.0]["bits"] == pytest.approx(3.0, abs=0.5)
        assert sum(rows[name, 3.0]["share"].values()) == pytest.approx(1)
    assert found["training"]["steps"] == 2


def test_refusals(run_cli: Cli, artifact: Path, tiny_model: Path, text_file: Path) -> None:
    for words, message in (
        ([artifact], "needs an artifact and text"),
        ([tiny_model, *settings(text_file)], "no routed experts"),
        ([artifact, *settings(text_file, "mean_bits=[5]")], "stored are [2, 3, 4]"),
        ([artifact, *settings(text_file, "capacity=[1, 1]")], "one share for each"),
    ):
        code, out, err = run_cli("bench", "widths", *words)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
