"""The corpus of an installation: disjoint by file and text, deterministic, large enough."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from fissile.errors import UsageError
from fissile.eval import corpus as corpus_module
from fissile.eval.choices import read_items
from fissile.eval.continuations import build_choices
from fissile.eval.corpus import Corpus, build_corpus, split_of
from fissile.eval.documents import by_domain, read_documents, read_rows
from fissile.eval.sources import DOMAINS, SourceItem
from fissile.eval.tokens import encode, load_tokenizer


def files(path: Path) -> set[tuple[str, str]]:
    return {(row["domain"], row["source"]) for _, row in read_rows(path)}


def paragraphs(path: Path) -> Iterator[str]:
    for document in read_documents(path):
        for paragraph in re.split(r"\n\s*\n", document.text):
            letters = "".join(c for c in paragraph if c.isalpha())
            if len(letters) >= 60:
                yield letters


def test_no_file_is_on_both_sides_and_none_twice(corpus: Corpus) -> None:
    calibration, heldout = files(corpus.calibration), files(corpus.heldout)
    assert not calibration & heldout
    assert len(calibration) == sum(corpus.documents["calibration"].values())
    assert len(heldout) == sum(corpus.documents["heldout"].values())
    assert all(split_of(*file) == "heldout" for file in heldout)


def test_no_paragraph_is_on_both_sides(corpus: Corpus) -> None:
    calibration = set(paragraphs(corpus.calibration))
    heldout = list(paragraphs(corpus.heldout))
    assert len(heldout) > 500
    # A cut at the end of a document can leave the beginning of a paragraph; none is the same.
    assert not calibration.intersection(heldout)


def test_every_domain_has_text_enough(corpus: Corpus) -> None:
    for path, split in ((corpus.calibration, "calibration"), (corpus.heldout, "heldout")):
        documents = read_documents(path)
        assert {d.domain for d in documents[: len(DOMAINS)]} == set(DOMAINS)
        for name, members in by_domain(documents).items():
            assert len(members) == corpus.documents[split][name] >= 20
            size = sum(len(documents[i].text.encode()) for i in members)
            assert size == corpus.size[split][name]


def test_every_domain_has_tokens_enough(corpus: Corpus, demo_model: Path) -> None:
    tokenizer = load_tokenizer(demo_model)
    for path, least in ((corpus.calibration, 40_000), (corpus.heldout, 18_000)):
        documents = read_documents(path)
        for name, members in by_domain(documents).items():
            ids = encode(tokenizer, [documents[i].text for i in members])
            assert sum(map(len, ids)) >= least, (path.name, name)


def test_another_process_makes_the_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    # setuptools puts the packages that it carries in the path when it is imported.
    code = (
        "import sys; before = list(sys.path); import setuptools; assert sys.path != before;"
        "from pathlib import Path; from fissile.eval.corpus import build_corpus;"
        "build_corpus(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    for path in (corpus.calibration, corpus.heldout):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_a_poor_domain_is_an_error_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"the {word} of the {word}s is not a {word}\n" for word in ("fox", "sea", "bee"))
    few = [SourceItem(f"f{i}", partial(str, f"{i} {text * 20}")) for i in range(4)]
    monkeypatch.setattr(corpus_module, "DOMAINS", {"tales": lambda: iter(few)})
    with pytest.raises(UsageError, match=r"domain 'tales' has \d+ bytes of .* text"):
        build_corpus(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_repeated_text_and_tables_are_left_out() -> None:
    licence = "Permission is hereby granted, free of charge, to any person obtaining a copy\n"
    seen: set[str] = set()
    first = corpus_module._without_repeats(f"{licence}\nown words\n\nx = 1\n", seen)
    second = corpus_module._without_repeats(f"# {licence}\nmore words\n\nx = 1\n", seen)
    assert licence.strip() in first
    assert second == "more words\n\nx = 1\n"
    assert corpus_module._is_prose_or_code("def area(w, h):\n    return w * h\n")
    assert not corpus_module._is_prose_or_code("var a=1;" * 400)
    assert not corpus_module._is_prose_or_code("0x12, 0x34, 0x56, 0x78,\n" * 9)


def test_choices_hold_the_true_continuation(corpus: Corpus, tmp_path: Path) -> None:
    path = build_choices(corpus.heldout, tmp_path / "choices.jsonl", items_per_domain=6, seed=1)
    items, texts = read_items(path), read_documents(corpus.heldout)
    assert {name: 6 for name in DOMAINS} == {
        name: sum(i.subject == name for i in items) for name in DOMAINS
    }
    for item in items:
        own = [d.text for d in texts if d.domain == item.subject]
        assert any(item.question + item.choices[item.answer] in text for text in own)
        assert len(set(item.choices)) == len(item.choices) == 4
        assert all(any(choice in text for text in own) for choice in item.choices)
    answers = [item.answer for item in items]
    assert len(set(answers)) > 2
    again = build_choices(corpus.heldout, tmp_path / "b.jsonl", items_per_domain=6, seed=1)
    assert again.read_bytes() == path.read_bytes()
    other = build_choices(corpus.heldout, tmp_path / "c.jsonl", items_per_domain=6, seed=2)
    assert other.read_bytes() != path.read_bytes()


def test_too_few_documents_for_choices(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "line one\nline two\n" * 40, "domain": "d"}) + "\n")
    with pytest.raises(UsageError, match="domain 'd' has 1 documents"):
        build_choices(path, tmp_path / "out.jsonl")
