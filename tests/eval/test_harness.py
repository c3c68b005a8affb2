"""lm-evaluation-harness: our MMLU gives its answers, its own tasks run on our models."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fissile.errors import UsageError
from fissile.eval.documents import rows_to_bytes
from fissile.eval.harness import HarnessOptions, evaluate_tasks, load_tasks, run_harness
from fissile.eval.harness_mmlu import write_tasks
from fissile.eval.mmlu import MmluOptions
from fissile.eval.mmlu_bench import compare_items, harness_items
from fissile.eval.mmlu_prompts import GROUPS, SUBJECTS, Scoring
from fissile.eval.mmlu_set import build_mmlu
from fissile.eval.run import evaluate

pytest.importorskip("lm_eval", reason="the extra [eval] is not installed")

PASSAGE = 1500
SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,
}


def stdlib_text(folder: Path, modules: tuple[ModuleType, ...]) -> Path:
    """Passages of source text, one domain per module."""
    rows = []
    for module in modules:
        text = inspect.getsource(module)
        cuts = range(0, min(len(text), 40 * PASSAGE) - PASSAGE, PASSAGE)
        rows += [{"text": text[i : i + PASSAGE], "domain": module.__name__} for i in cuts]
    path = folder / "documents.jsonl"
    path.write_bytes(rows_to_bytes(rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """57 subjects of two questions and two examples."""
    import argparse
    import difflib
    import textwrap

    folder = tmp_path_factory.mktemp("mmlu")
    documents = stdlib_text(folder, (argparse, difflib, textwrap))
    return build_mmlu(documents, folder / "set", per_subject=2, shots=2)


def save_model(model: Any, tokenizer: Path, folder: Path, *, bos: bool) -> Path:
    """A model folder with the demo's tokenizer, with or without a start token of its own."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    if not bos:
        described = json.loads((folder / "tokenizer.json").read_text())
        described["post_processor"] = None
        (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder


@pytest.fixture(scope="module")
def qwen3_folder(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**SHAPE))
    return save_model(model, demo_model, tmp_path_factory.mktemp("qwen3"), bos=False)


@pytest.fixture(scope="module")
def gemma2_folder(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its sliding window is shorter than the examples, its logits are capped."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, sliding_window=48))
    return save_model(model, demo_model, tmp_path_factory.mktemp("gemma2"), bos=True)


@pytest.fixture(scope="module")
def short_folder(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context of 160 tokens: with two examples some prompts lose their beginning."""
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, "max_position_embeddings": 160}))
    return save_model(model, demo_model, tmp_path_factory.mktemp("short"), bos=True)


@pytest.fixture(scope="module")
def harness_tasks(
    data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Scoring], tuple[str, dict[str, Any]]]:
    """The harness's own tasks on the local data; reading 57 of them takes seconds."""

    @cache
    def load(scoring: Scoring) -> tuple[str, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("tasks")
        group = write_tasks(data, folder, scoring)
        return group, load_tasks([group], folder, 0)

    return load


def reference(folder: Path, tasks: tuple[str, dict[str, Any]], shots: int) -> dict[str, Any]:
    """The harness's own class for Hugging Face models on its own tasks."""
    from lm_eval.models.huggingface import HFLM

    for task in tasks[1]["tasks"].values():
        task.set_config(key="num_fewshot", value=shots)
    lm = HFLM(str(folder), dtype="float32", device="cpu", batch_size=16)
    return {"group": tasks[0], **evaluate_tasks(lm, tasks[1])}


def agree(ours: dict[str, Any], theirs: dict[str, Any], share: float = 1.0) -> None:
    """Choices, log-likelihoods and every average with its standard error."""
    samples = harness_items(theirs)
    items = {item["id"]: item for item in ours["items"]}
    assert sorted(samples) == sorted(items)
    found = compare_items({key: item["loglikelihoods"] for key, item in items.items()}, samples)
    assert found["same_choices"] >= share
    assert found["largest_relative_difference"] < 1e-4
    results, name = theirs["results"], theirs["group"]
    assert ours["accuracy"] == pytest.approx(results[name]["acc,none"], abs=1e-9)
    assert ours["stderr"] == pytest.approx(results[name]["acc_stderr,none"], abs=1e-9)
    for group in GROUPS:
        ends = group.replace(" ", "_"), f"::{group}"
        row = next(results[key] for key in results if key.startswith(name) and key.endswith(ends))
        metric = ours["metrics"][f"accuracy ({group})"]
        assert metric["value"] == pytest.approx(row["acc,none"], abs=1e-9)
        assert metric["stderr"] == pytest.approx(row["acc_stderr,none"], abs=1e-9)
        assert metric["n_items"] == row["sample_len"]
    suffix = "_continuation" if name.endswith("_continuation") else ""
    for subject in SUBJECTS:
        row = results[f"mmlu_{subject}{suffix}"]
        assert ours["by_subject"][subject] == row["acc,none"]
        known = ours["conditions"]["subjects"][subject]
        assert known["stderr"] == pytest.approx(row["acc_stderr,none"], abs=1e-9)


def score(folder: Path, data: Path, scoring: Scoring, shots: int, **more: Any) -> dict[str, Any]:
    options = MmluOptions(shots=shots, scoring=scoring)
    return evaluate(folder, "mmlu", data, mmlu=options, **more).to_dict(items=True)


@pytest.mark.parametrize(
    ("name", "scoring", "shots"),
    [
        ("demo_model", "letter", 0),
        ("qwen3_folder", "letter", 2),
        ("gemma2_folder", "letter", 2),
        ("short_folder", "letter", 2),
        ("short_folder", "continuation", 2),
    ],
)
def test_mmlu_gives_the_harness_s_answers(
    name: str,
    scoring: Scoring,
    shots: int,
    data: Path,
    harness_tasks: Callable[[Scoring], tuple[str, dict[str, Any]]],
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(name)
    ours = score(folder, data, scoring, shots)
    agree(ours, reference(folder, harness_tasks(scoring), shots))
    truncated = ours["conditions"]["n_truncated"]
    assert 0 < truncated < 114 if name == "short_folder" else truncated == 0
    assert ours["conditions"]["bos"] == (None if name == "qwen3_folder" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("name", ["demo_model", "qwen3_folder", "gemma2_folder"])
def test_two_thousand_questions(
    name: str, shots: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    import argparse
    import difflib
    import textwrap

    documents = stdlib_text(tmp_path, (argparse, difflib, textwrap))
    data = build_mmlu(documents, tmp_path / "set", per_subject=36)
    folder = request.getfixturevalue(name)
    ours = score(folder, data, "letter", shots)
    assert ours["n_items"] == 2052
    group = write_tasks(data, tmp_path / "tasks")
    tasks = group, load_tasks([group], tmp_path / "tasks", shots)
    agree(ours, reference(folder, tasks, shots), share=0.999)


def test_a_task_of_ones_own_on_an_artifact(
    finished_run: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    """The harness's answers on a routed, nested model are those of its logits at that width."""
    from fissile.eval.run import load_model, read_config
    from fissile.eval.tokens import load_tokenizer

    rows = [{"text": f"the {w} river", "end": f" ran {w}"} for w in ("high", "low", "cold")]
    (tmp_path / "rows.jsonl").write_bytes(rows_to_bytes(rows))
    task = {
        "task": "rivers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{end}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "perplexity"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rivers.yaml").write_text(json.dumps(task))
    out = tmp_path / "out.json"
    found = run_cli(
        "eval", finished_run, "--harness", "rivers", "--include-path", tmp_path / "tasks",
        "--bits", "2", "--out", out, "--json", "-q",
    )  # fmt: skip
    assert found[0] == 0, found[2]
    printed, stored = json.loads(found[1]), json.loads(out.read_text())
    assert "samples" not in printed
    assert printed["bits"] == 2
    assert printed["n-samples"] == {"rivers": {"original": 3, "effective": 3}}
    assert printed["conditions"]["lm_eval"]
    folder = finished_run / "model"
    tokenizer = load_tokenizer(folder)
    values: dict[int, list[float]] = {}
    for bits in (2, 4):
        model = load_model(folder, read_config(folder), bits)
        values[bits] = []
        for row in rows:
            ids = tokenizer(row["text"] + row["end"])["input_ids"]
            count = len(ids) - len(tokenizer(row["text"])["input_ids"])
            with torch.inference_mode():
                log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
            values[bits].append(
                sum(float(log_probs[i - 1, ids[i]]) for i in range(len(ids) - count, len(ids)))
            )
    answers = [float(s["filtered_resps"][0][0]) for s in stored["samples"]["rivers"]]
    assert answers == pytest.approx(values[2], rel=1e-5)
    assert answers != pytest.approx(values[4], rel=1e-5)


def test_mistakes_are_found_before_loading(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fissile.eval.harness.load_model", lambda *_: pytest.fail("was loaded"))
    with pytest.raises(UsageError, match=r"no task 'hellaswagg'; did you mean 'hellaswag'"):
        run_harness(tiny_model, ["hellaswagg"], None, HarnessOptions())
    with pytest.raises(UsageError, match="absent: is not a folder with task definitions"):
        run_harness(tiny_model, ["x"], None, HarnessOptions(include=tmp_path / "absent"))
    with pytest.raises(UsageError, match=r"bits 3: .* has float weights only"):
        run_harness(tiny_model, ["hellaswag"], 3, HarnessOptions())


def test_nothing_is_downloaded_unless_asked(tiny_model: Path, tmp_path: Path) -> None:
    import datasets

    (tmp_path / "far.yaml").write_text(
        json.dumps({"task": "far", "dataset_path": "no-such-org/no-such-set", "test_split": "test"})
    )
    before = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(UsageError, match=r"far: the data cannot be loaded .*--download"):
        run_harness(tiny_model, ["far"], None, HarnessOptions(include=tmp_path))
    assert before == datasets.config.HF_HUB_OFFLINE


def test_importing_fissile_does_not_import_the_harness() -> None:
    names = ("fissile.eval.run", "fissile.eval.harness", "fissile.eval.mmlu_bench", "fissile.cli")
    code = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        "print([m for m in ('lm_eval', 'datasets', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
