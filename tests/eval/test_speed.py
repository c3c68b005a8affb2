"""The speed benchmark: what is called how often and in which order, its rows and its refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fissile.errors import UsageError
from fissile.eval import speed
from fissile.eval.speed import find_candidate, measure_speed, rotated, weights_bytes


class Watched(torch.nn.Module):
    """Stands for a model: records its calls; its cache counts what it has seen."""

    def __init__(self, name: str, calls: list[Any]) -> None:
        super().__init__()
        self.name, self.calls = name, calls
        self.config = SimpleNamespace(vocab_size=50)
        self.weight = torch.nn.Parameter(torch.zeros(10))

    def forward(
        self,
        input_ids: Any,
        use_cache: bool,
        past_key_values: int = 0,
        logits_to_keep: int = 0,
    ) -> Any:
        assert use_cache
        self.calls.append((self.name, tuple(input_ids.shape), past_key_values))
        logits = torch.zeros(*input_ids.shape, 50)[:, -logits_to_keep:]
        logits[..., 7] = 1
        seen = past_key_values + input_ids.shape[1]
        return SimpleNamespace(logits=logits, past_key_values=seen)


def test_order_and_calls(toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    names = iter("ab")
    monkeypatch.setattr(speed, "load_model", lambda *_: Watched(next(names), calls))
    found = measure_speed(
        [find_candidate(str(toy_folder))] * 2, batches=(1, 3), prompt=4, steps=2, repeats=3
    )
    # A round is a prefill and two steps of each model; each step reads one token more.
    firsts = [call for call in calls if call[2] == 0]
    assert [name for name, _, _ in firsts] == list("abbaabba" * 2)
    assert {shape for _, shape, _ in firsts} == {(1, 4), (3, 4)}
    steps = [call for call in calls if call[2] > 0]
    assert [seen for _, _, seen in steps] == [4, 5] * (len(steps) // 2)
    assert len(steps) == 2 * len(firsts)
    assert len(found["rows"]) == 2 * 2 * 2
    for row in found["rows"]:
        # The warm-up does not count.
        assert len(row["seconds"]) == 3
        assert row["slowest"] <= row["tokens_per_second"] <= row["fastest"]
        assert row["tokens"] == row["batch"] * (4 if row["phase"] == "prefill" else 2)
        middle = sorted(row["seconds"])[1]
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / middle, rel=0.05)
        assert row["weights_bytes"] == 40
    order = found["conditions"]["order"]
    assert (order, found["conditions"]["warmup"]) == ("rotating", 1)


def test_every_model_is_first_equally_often() -> None:
    orders = [rotated(3, turn) for turn in range(6)]
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    for place in range(3):
        assert sorted(order[place] for order in orders) == [0, 0, 1, 1, 2, 2]


def test_tied_weights_are_counted_once() -> None:
    first, second = torch.nn.Linear(8, 4, bias=False), torch.nn.Linear(8, 4, bias=False)
    second.weight = first.weight
    model = torch.nn.Sequential(first, second)
    model.register_buffer("packed", torch.zeros(5, dtype=torch.uint8))
    assert weights_bytes(model) == 4 * 32 + 5


def test_command(
    finished_run: Path, tiny_model: Path, run_cli: Callable[..., Any], tmp_path: Path
) -> None:
    """Dense and two widths of one artifact, as `fissile bench speed` shows them."""
    sets = [w for item in ("prompt=8", "steps=2", "repeats=2") for w in ("--set", item)]
    models = [tiny_model, f"{finished_run}@2", f"{finished_run}@4"]
    out = tmp_path / "speed.json"
    words = ["bench", "speed", *models, "--batches", "1,2", *sets, "--json", "--out", out, "-q"]
    code, stdout, err = run_cli(*words)
    assert code == 0, err
    found = json.loads(stdout)
    assert found == json.loads(out.read_text())
    assert len(found["rows"]) == 3 * 2 * 2
    bits = {row["model"]: row["bits"] for row in found["rows"]}
    assert list(bits.values()) == [None, 2, 4]
    held = {row["bits"]: row["weights_bytes"] for row in found["rows"]}
    assert held[2] < held[4] < held[None]
    assert all(row["tokens_per_second"] > 0 for row in found["rows"])
    assert found["conditions"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["speed"], "speed needs models"),
        (["speed", "MODEL@3"], "bits 3: .* has float weights only"),
        (["speed", "MODEL@x"], "expected DIR or DIR@BITS"),
        (["speed", "absent"], "absent: is not a folder"),
        (["speed", "MODEL", "--batches", "0"], "greater than 0"),
        (["speed", "MODEL", "--set", "prompt=60"], "76 tokens, the model's maximum is 64"),
        (["layer", "MODEL"], "bench layer takes no DIR"),
    ],
)
def test_mistakes(
    words: list[str], message: str, toy_folder: Path, run_cli: Callable[..., Any]
) -> None:
    given = [word.replace("MODEL", str(toy_folder)) for word in words]
    code, _, err = run_cli("bench", *given, "-q")
    assert code == 2
    assert re.search(message, err), err
    assert err.count("\n") == 1


def test_a_folder_with_an_at_sign_is_a_folder(toy_folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "model@3"
    link.symlink_to(toy_folder)
    assert find_candidate(str(link)).bits is None
    with pytest.raises(UsageError, match="float weights only"):
        find_candidate(f"{link}@2")
