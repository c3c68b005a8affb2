"""Tokenizers: nothing of the folder is executed, nothing is asked or fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fissile.errors import CorruptCheckpoint, UsageError
from fissile.eval.tokens import (
    check_ids,
    encode,
    load_tokenizer,
    resolve_context,
    start_token,
    tokenizer_sha256,
)


def test_a_hostile_folder_runs_no_code(toy_folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    """Custom classes named by the configs are ignored, for the generic class needs none of them."""
    folder, trace = tmp_path / "hostile", tmp_path / "trace"
    shutil.copytree(toy_folder, folder)
    code = f"open({str(trace)!r}, 'w').close()\nclass Evil: pass\n"
    (folder / "evil.py").write_text(code)
    for name in ("tokenizer_config.json", "config.json"):
        path = folder / name
        fields = json.loads(path.read_text())
        fields |= {
            "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"},
            "tokenizer_class": "Evil",
            "model_type": "evil",
        }
        path.write_text(json.dumps(fields))
    loaded = load_tokenizer(folder)
    assert encode(loaded, ["w1 w2"]) == encode(tokenizer, ["w1 w2"])
    assert not trace.exists()


def test_a_slow_tokenizer_that_needs_its_code_is_refused(
    toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, trace = tmp_path / "hostile", tmp_path / "trace"
    shutil.copytree(toy_folder, folder)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Evil: pass\n")
    fields = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    # A prompt would read from here.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked to run remote code"))
    with pytest.raises(UsageError, match="tokenizer cannot be loaded"):
        load_tokenizer(folder)
    assert not trace.exists()


def test_no_tokenizer_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tokenizer files"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises((UsageError, CorruptCheckpoint), match="tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_special_tokens_are_added(demo_model: Path) -> None:
    loaded = load_tokenizer(demo_model)
    [ids] = encode(loaded, ["def f(x):\n"])
    assert loaded.decode(ids) == "def f(x):\n"
    assert loaded.bos_token_id not in ids
    assert encode(loaded, []) == []


def test_the_start_token_is_bos_or_else_eos() -> None:
    def fake(bos: int | None, eos: int | None) -> Any:
        return SimpleNamespace(bos_token_id=bos, eos_token_id=eos)

    assert start_token(fake(5, 6), SimpleNamespace(bos_token_id=7)) == 5
    assert start_token(fake(None, 6), SimpleNamespace(bos_token_id=7)) == 7
    assert start_token(fake(None, 6), SimpleNamespace(bos_token_id=None)) == 6
    assert start_token(fake(0, 6)) == 0
    with pytest.raises(UsageError, match="neither a BOS nor an EOS"):
        start_token(fake(None, None))


def test_the_context_is_the_models_but_at_most_2048() -> None:
    assert resolve_context(SimpleNamespace(max_position_embeddings=512), None) == 512
    assert resolve_context(SimpleNamespace(max_position_embeddings=131072), None) == 2048
    assert resolve_context(SimpleNamespace(max_position_embeddings=131072), 4096) == 4096
    nested = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=99))
    assert resolve_context(nested, None) == 99


def test_ids_outside_the_vocabulary_are_noticed() -> None:
    check_ids([0, 9], 10, "x")
    with pytest.raises(CorruptCheckpoint, match="x: the tokenizer gives token 10"):
        check_ids([0, 10], 10, "x")


def test_the_hash_follows_the_files(toy_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(toy_folder, folder)
    assert tokenizer_sha256(folder) == tokenizer_sha256(toy_folder)
    with (folder / "tokenizer_config.json").open("a") as file:
        file.write(" ")
    assert tokenizer_sha256(folder) != tokenizer_sha256(toy_folder)
