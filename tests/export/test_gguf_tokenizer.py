"""Tokenizers in GGUF files: what the gguf and tokenizers packages say of the same small ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre

from fissile.errors import UnsupportedModel
from fissile.export.engine_run import NODE_FOLDER
from fissile.export.gguf_tokenizer import RULES, tokenizer_metadata

gguf = pytest.importorskip("gguf")
TEXT = [
    "The river ran high that spring, and the ferry did not cross for 1234567 weeks.",
    "def area(width, height):\n    return width * height  # it's 12 lines\n\n",
    "Äpfel, naïve café, 東京 and Ω: 'We've', they'll,\tdon't!!! ...  two  spaces",
]
TRICKY = [*TEXT, " leading", "trailing  ", "\n\n\nx", "a1b22c333d4444", "🙂 emoji", "I'M'd", "…—"]
ROWS = 700


def bytes_bpe(rule: str, normalizer: Any = None) -> Tokenizer:
    """Byte-level BPE behind a regular expression, as Llama 3 and Qwen 2 have it."""
    (pattern,) = [text for text, name in RULES.items() if name == rule]
    found = Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    if normalizer is not None:
        found.normalizer = normalizer
    split = pre.Split(Regex(pattern), behavior="isolated")
    level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    found.pre_tokenizer = pre.Sequence([split, level])
    found.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    found.train_from_iterator(
        TEXT * 4, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet)
    )
    found.add_special_tokens(["<|begin|>", "<|end|>"])
    found.add_tokens([AddedToken("<tool>", normalized=False)])
    return found


def llama3() -> Tokenizer:
    found = bytes_bpe("llama-bpe")
    begin = found.token_to_id("<|begin|>")
    template = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    level = processors.ByteLevel(trim_offsets=False)
    found.post_processor = processors.Sequence([level, template])
    return found


def qwen2() -> Tokenizer:
    return bytes_bpe("qwen2", normalizers.NFC())


def sentencepiece() -> Tokenizer:
    """Merges of characters with bytes to fall back on, as Llama 2 has it."""
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    found = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    found.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    found.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    specials = ["<unk>", "<s>", "</s>", *fallback]
    found.train_from_iterator(
        TEXT * 4, trainers.BpeTrainer(vocab_size=600, special_tokens=specials)
    )
    data = json.loads(found.to_str())
    # Bytes belong to the vocabulary alone: as added tokens they would be found in texts.
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    found = Tokenizer.from_str(json.dumps(data))
    begin = found.token_to_id("<s>")
    found.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    return found


KINDS = {"llama3": llama3, "qwen2": qwen2, "sentencepiece": sentencepiece}


def save(kind: str, folder: Path) -> Tokenizer:
    found = KINDS[kind]()
    found.save(str(folder / "tokenizer.json"))
    names = ("<s>", "</s>") if kind == "sentencepiece" else ("<|begin|>", "<|end|>")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"}
    settings |= dict(zip(("bos_token", "eos_token"), names, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_types_are_those_of_the_gguf_package(kind: str, tmp_path: Path) -> None:
    tokenizer = save(kind, tmp_path)
    fields = tokenizer_metadata(tmp_path, ROWS)
    reader = gguf.vocab.LlamaHfVocab if kind == "sentencepiece" else gguf.vocab.BpeVocab
    expected = list(reader(tmp_path).all_tokens())
    texts, types = fields["ggml.tokens"], fields["ggml.token_type"]
    theirs_as_text = [t if isinstance(t, str) else t.decode() for t, _, _ in expected]
    assert texts[: len(expected)] == theirs_as_text
    assert texts[: len(expected)] == [tokenizer.id_to_token(i) for i in range(len(expected))]
    assert len(texts) == len(types) == ROWS
    assert set(types[len(expected) :]) == {gguf.TokenType.UNUSED}
    # That package calls every token that was added a control token, and knows no unknown one.
    same = [
        (own, theirs)
        for text, own, (_, _, theirs) in zip(texts, types, expected, strict=False)
        if text not in ("<tool>", "<unk>")
    ]
    assert all(own == theirs for own, theirs in same)
    assert len({own for own, _ in same}) > 1
    special = gguf.SpecialVocab(tmp_path, load_merges=True)
    if kind != "sentencepiece":
        assert fields["ggml.merges"] == special.merges
        assert types[texts.index("<tool>")] == gguf.TokenType.USER_DEFINED
    for name, index in special.special_token_ids.items():
        assert fields[f"ggml.{name}_token_id"] == index
    assert set(special.special_token_ids) >= {"bos", "eos"}
    assert fields["ggml.add_bos_token"] == special.add_special_token.get("bos", False)
    assert fields["chat_template"] == special.chat_template


@pytest.mark.parametrize("kind", KINDS)
def test_names_of_the_rules(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path)
    fields = tokenizer_metadata(tmp_path, ROWS)
    names = {"llama3": "llama-bpe", "qwen2": "qwen2", "sentencepiece": None}
    assert fields.get("ggml.pre") == names[kind]
    assert fields["ggml.model"] == ("llama" if kind == "sentencepiece" else "gpt2")


def greedy_merges(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE as llama.cpp runs it: merge the neighbours of highest score."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(scores.get(a + b), -i) for i, (a, b) in enumerate(pairwise(symbols))]
        known = [(score, i) for score, i in pairs if score is not None]
        if not known:
            return symbols
        index = -max(known)[1]
        symbols[index : index + 2] = [symbols[index] + symbols[index + 1]]


def test_scores_merge_as_the_tokenizer_does(tmp_path: Path) -> None:
    tokenizer = save("sentencepiece", tmp_path)
    fields = tokenizer_metadata(tmp_path, ROWS)
    assert fields["ggml.add_space_prefix"] is True
    scores = dict(zip(fields["ggml.tokens"], fields["ggml.scores"], strict=True))
    for text in TEXT[:2]:
        expected = [t for t in tokenizer.encode(text, add_special_tokens=False).tokens]
        assert greedy_merges(text, scores) == expected or "<0x" in "".join(expected)
    assert len(tokenizer.encode(TEXT[0]).tokens) < len(TEXT[0]) / 2


def test_no_space_is_put_before_a_text_where_the_tokenizer_puts_none(tmp_path: Path) -> None:
    save("sentencepiece", tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    path.write_text(json.dumps(data))
    assert tokenizer_metadata(tmp_path, ROWS)["ggml.add_space_prefix"] is False
    data["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(data))
    with pytest.raises(UnsupportedModel, match="Lowercase"):
        tokenizer_metadata(tmp_path, ROWS)


NODE = """
import fs from "node:fs";
import {pathToFileURL} from "node:url";
const [home, path, request, answer] = process.argv.slice(2);
const {getLlama} = await import(pathToFileURL(home + "/node_modules/node-llama-cpp/dist/index.js"));
const texts = JSON.parse(fs.readFileSync(request));
const llama = await getLlama({gpu: false, build: "never", maxThreads: 1});
const model = await llama.loadModel({modelPath: path, vocabOnly: true});
fs.writeFileSync(answer, JSON.stringify(texts.map(text => model.tokenize(text, false))));
process.exit(0);
"""


@pytest.mark.skipif(not os.environ.get(NODE_FOLDER), reason="node-llama-cpp is not here")
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(kind: str, tmp_path: Path) -> None:
    node = shutil.which("node")
    assert node is not None
    tokenizer = save(kind, tmp_path)
    writer = gguf.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    sizes = {"context_length": 128, "embedding_length": 64, "block_count": 1, "vocab_size": ROWS}
    sizes |= {"feed_forward_length": 64, "attention.head_count": 4}
    for key, value in sizes.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
    for key, value in tokenizer_metadata(tmp_path, ROWS).items():
        add.get(type(value), writer.add_array)(f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    script, request, answer = tmp_path / "x.mjs", tmp_path / "in.json", tmp_path / "out.json"
    script.write_text(NODE)
    request.write_text(json.dumps(TRICKY))
    paths = (script, os.environ[NODE_FOLDER], tmp_path / "vocab.gguf", request, answer)
    done = subprocess.run([node, *map(str, paths)], capture_output=True, text=True, check=False)
    assert answer.is_file(), done.stderr
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in TRICKY]
    assert json.loads(answer.read_text()) == expected
