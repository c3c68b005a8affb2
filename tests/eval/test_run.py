"""Evaluating folders: the JSON contract, conditions, and refusals before the expensive step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fissile.errors import CorruptCheckpoint, UnsupportedModel, UsageError
from fissile.eval.documents import Document, rows_to_bytes
from fissile.eval.perplexity import perplexity
from fissile.eval.run import evaluate

Make = Callable[..., list[Document]]


@pytest.fixture
def data(tmp_path: Path, make_documents: Make) -> Path:
    path = tmp_path / "text.jsonl"
    rows = ({"text": d.text, "domain": d.domain} for d in make_documents(per_domain=3))
    path.write_bytes(rows_to_bytes(rows))
    return path


@pytest.fixture
def copy(toy_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_folder, tmp_path / "copy"))


def test_perplexity_of_a_dense_folder(
    toy_folder: Path, data: Path, llama: Any, tokenizer: Any, make_documents: Make
) -> None:
    result = evaluate(toy_folder, "perplexity", data, batch_tokens=50, context=20)
    found = json.loads(result.to_json())
    expected = perplexity(llama, tokenizer, make_documents(per_domain=3), context=20)
    assert list(found) == [
        "schema_version", "task", "bits", "n_tokens", "ppl", "stderr", "higher_is_better",
        "by_domain", "seconds", "metrics", "conditions",
    ]  # fmt: skip
    assert found["task"] == "perplexity"
    assert found["bits"] is None
    assert found["n_tokens"] == expected.n_tokens
    assert found["higher_is_better"] is False
    assert found["ppl"] == pytest.approx(expected.ppl, rel=1e-5)
    assert found["stderr"] == pytest.approx(expected.stderr, rel=1e-4)
    assert found["by_domain"] == {
        name: pytest.approx(score.ppl, rel=1e-5) for name, score in expected.by_domain.items()
    }
    conditions = found["conditions"]
    assert conditions["context"] == 20
    assert conditions["bos"] == 0
    assert conditions["n_documents"] == 9
    assert conditions["dtype"] == "float32"
    assert conditions["threads"] == torch.get_num_threads()
    assert conditions["versions"]["torch"] == torch.__version__
    assert {"sha256", "file"} == set(conditions["data"])


def test_conditions_follow_data_model_and_tokenizer(copy: Path, data: Path) -> None:
    def conditions() -> dict[str, Any]:
        return evaluate(copy, "perplexity", data, limit=1).conditions

    before = conditions()
    assert conditions() == before
    with data.open("a") as file:
        file.write("\n")
    assert conditions()["data"] != before["data"]
    config = json.loads((copy / "tokenizer_config.json").read_text()) | {"note": 1}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    after = conditions()
    assert after["tokenizer_sha256"] != before["tokenizer_sha256"]
    assert after["model"] == before["model"]
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.5
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert conditions()["model"] != before["model"]


def test_choices_and_run_folder_and_progress(toy_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_folder, tmp_path / "run" / "model")
    path = tmp_path / "items.jsonl"
    rows = [
        {"question": "w1", "choices": ["w2", "w3 w4"], "answer": i % 2, "subject": "ab"[i % 2]}
        for i in range(4)
    ]
    path.write_bytes(rows_to_bytes(rows))
    calls: list[tuple[str, int, int, str]] = []
    result = evaluate(
        tmp_path / "run", "choices", path, progress=lambda *call: calls.append(call)
    ).to_dict()
    assert list(result) == [
        "schema_version", "task", "bits", "n_items", "accuracy", "stderr", "higher_is_better",
        "by_subject", "seconds", "metrics", "conditions",
    ]  # fmt: skip
    # The four questions are the same, their answers alternate.
    assert result["higher_is_better"] is True
    assert result["accuracy"] == 0.5
    assert sorted(result["by_subject"].values()) == [0.0, 1.0]
    assert calls[-1] == ("eval", 2, 2, "")


def test_missing_tensors_are_an_error_not_random_numbers(copy: Path, data: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptCheckpoint, match=r"missing keys: model\.layers\.1\.mlp\.up_proj"):
        evaluate(copy, "perplexity", data)


def test_a_truncated_file_is_an_error(copy: Path, data: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptCheckpoint, match=str(copy)) as caught:
        evaluate(copy, "perplexity", data)
    assert "\n" not in str(caught.value)


def test_the_folders_code_is_not_run(copy: Path, data: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (copy / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    config = json.loads((copy / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B"},
    }
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="transformers cannot load it"):
        evaluate(copy, "perplexity", data)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "perplexty"}, "unknown task 'perplexty'; did you mean 'perplexity'"),
        ({"bits": 3}, "bits 3: .* has float weights only"),
        ({"batch_tokens": 0}, "batch_tokens 0"),
        ({"convention": "lm_eval"}, "convention 'lm_eval'; did you mean 'lm-eval'"),
        ({"data": Path("absent.jsonl")}, "absent.jsonl: cannot be read"),
        ({"folder": Path("absent")}, "absent: is not a folder"),
    ],
)
def test_mistakes_are_found_before_loading(
    toy_folder: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr("fissile.eval.run.load_model", lambda *_: pytest.fail("was loaded"))
    arguments: dict[str, Any] = {"folder": toy_folder, "task": "perplexity", "data": data}
    with pytest.raises(UsageError, match=message):
        evaluate(**(arguments | options))


def test_an_absent_width_of_an_artifact_is_refused(copy: Path, data: Path) -> None:
    config = {"model_type": "fissile", "nested": {"widths": [2, 4]}, "bits": 4}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"bits 3: .* holds 2, 4"):
        evaluate(copy, "perplexity", data, bits=3)


def test_old_formats_are_refused_with_the_remedy(copy: Path, data: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"no \*\.safetensors.*save_pretrained"):
        evaluate(copy, "perplexity", data)
