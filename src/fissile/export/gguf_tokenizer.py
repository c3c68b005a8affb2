"""A tokenizer.json as GGUF metadata: tokens, types, merges, and llama.cpp's name of its rules.

llama.cpp has its own tokenizers and knows rules for cutting text by name, so only rules that it
has a name for can be written; others are refused rather than approximated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fissile.errors import UnsupportedModel
from fissile.io.headers import read_json

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens in GGUF."""

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
RULES: Mapping[str, str] = {
    _LETTERS + r"|\p{N}{1,3}" + _REST: "llama-bpe",
    _LETTERS + r"|\p{N}" + _REST: "qwen2",
}
"""Regular expressions before a byte-level BPE, to llama.cpp's names."""


def tokenizer_metadata(folder: Path, vocab_size: int) -> dict[str, Any]:
    """Everything below "tokenizer." for a folder with a tokenizer.json.

    Args:
        folder: of the checkpoint.
        vocab_size: rows of the embedding; tokens are filled up to it.

    Returns:
        Key to an int, bool, string or list.

    Raises:
        UnsupportedModel: no tokenizer.json, or rules that llama.cpp has no name for.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UnsupportedModel(f"{folder}: GGUF files need a tokenizer.json, there is none")
    data = read_json(path)
    model = data.get("model") or {}
    if model.get("type") != "BPE":
        raise UnsupportedModel(f"{path}: model {model.get('type')!r}, accepted for GGUF: 'BPE'")
    settings_path = folder / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.is_file() else {}
    found: dict[str, Any] = {"model": "llama"}
    if not model.get("byte_fallback"):
        found = _bytes_bpe(path, data)
    texts, types = _tokens(path, data, vocab_size)
    found |= {"tokens": texts, "token_type": types}
    if found["model"] == "llama":
        # SentencePiece's BPE merges the pair of highest score; ids follow the order of merges.
        found["scores"] = [-float(i) for i in range(vocab_size)]
        found["add_space_prefix"] = _space_prefix(path, data)
    found |= _special(data, settings, {text: i for i, text in enumerate(texts)})
    template = folder / "chat_template.jinja"
    chat = template.read_text("utf-8") if template.is_file() else settings.get("chat_template")
    found = {f"ggml.{key}": value for key, value in found.items()}
    return found | ({"chat_template": chat} if isinstance(chat, str) else {})


def _space_prefix(path: Path, data: Mapping[str, Any]) -> bool:
    """Whether a text of SentencePiece's kind is cut as if it began with a space."""
    steps = [*_steps(data.get("normalizer") or {}), *_steps(data.get("pre_tokenizer") or {})]
    for step in steps:
        known = step["type"] in ("Prepend", "Replace", "Metaspace")
        if not known or "▁" not in (step.get(key) for key in ("prepend", "content", "replacement")):
            raise UnsupportedModel(
                f"{path}: step {step['type']!r} has no counterpart in llama.cpp's SentencePiece"
            )
    kinds = {step["type"]: step for step in steps}
    metaspace = kinds.get("Metaspace", {})
    return "Prepend" in kinds or metaspace.get("prepend_scheme", "never") != "never"


def _bytes_bpe(path: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    return {"model": "gpt2", "pre": _rules(path, data), "merges": merges}


def _rules(path: Path, data: Mapping[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer."""
    steps = list(_steps(data.get("pre_tokenizer") or {}))
    if data.get("normalizer") not in (None, {"type": "NFC"}):
        found = data["normalizer"].get("type")
        raise UnsupportedModel(f"{path}: normalizer {found!r} has no counterpart in llama.cpp")
    level = [s for s in steps if s["type"] == "ByteLevel"]
    splits = [s["pattern"].get("Regex") for s in steps if s["type"] == "Split"]
    if len(level) == 1 and len(steps) == 1 and level[0].get("use_regex", True):
        return "gpt-2"
    if len(level) == 1 and len(splits) == 1 and len(steps) == 2 and splits[0] in RULES:
        return RULES[splits[0]]
    raise UnsupportedModel(
        f"{path}: llama.cpp has no name for its pre-tokenizer "
        f"({', '.join(s['type'] for s in steps) or 'none'}); accepted: those of GPT-2, Llama 3 and "
        "Qwen 2"
    )


def _steps(step: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if step.get("type") == "Sequence":
        for inner in step.get("pretokenizers") or step.get("normalizers") or ():
            yield from _steps(inner)
    elif step:
        yield step


def _tokens(path: Path, data: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding."""
    vocab, added = data["model"]["vocab"], data.get("added_tokens") or []
    largest = max([*vocab.values(), *(t["id"] for t in added)])
    if largest >= size:
        raise UnsupportedModel(f"{path}: token id {largest}, the embedding has {size} rows")
    texts = [f"[PAD{i}]" for i in range(size)]
    types = [UNUSED] * size
    unknown = data["model"].get("unk_token")
    for text, index in vocab.items():
        texts[index], types[index] = text, UNKNOWN if text == unknown else NORMAL
        if data["model"].get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            types[index] = BYTE
    for token in added:
        special = CONTROL if token.get("special") else USER
        texts[token["id"]] = token["content"]
        types[token["id"]] = UNKNOWN if token["content"] == unknown else special
    return texts, types


def _special(
    data: Mapping[str, Any], settings: Mapping[str, Any], ids: Mapping[str, int]
) -> dict[str, Any]:
    """Ids of the special tokens, and whether a text begins with BOS."""
    found: dict[str, Any] = {}
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    for name, key in names.items():
        token = settings.get(f"{name}_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and text in ids:
            found[f"{key}_token_id"] = ids[text]
    single = _template(data.get("post_processor") or {})
    found["add_bos_token"] = bool(single) and "SpecialToken" in single[0]
    found["add_eos_token"] = bool(single) and "SpecialToken" in single[-1]
    return found


def _template(step: Mapping[str, Any]) -> list[dict[str, Any]]:
    if step.get("type") == "TemplateProcessing":
        return list(step["single"])
    if step.get("type") == "Sequence":
        for inner in step.get("processors", ()):
            if found := _template(inner):
                return found
    return []
