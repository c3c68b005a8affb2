"""Tokenizers: loading without code from the model's folder, the BOS that starts a text, hashes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fissile.errors import CorruptCheckpoint, UsageError
from fissile.eval.documents import sha256_files
from fissile.io.hub import TOKENIZER_FILES, tokenizer_files


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a local model folder; never asks, downloads or runs its code.

    `tokenizer.json` describes a tokenizer completely, so it is read by the generic class whatever
    class the configuration names; older formats go through AutoTokenizer with remote code refused.

    Args:
        folder: a model folder.

    Raises:
        UsageError: the folder holds no tokenizer, or one that only its own code can load.
        CorruptCheckpoint: the files do not parse.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not tokenizer_files(folder):
        raise UsageError(f"{folder}: no tokenizer files (looked for {', '.join(TOKENIZER_FILES)})")
    try:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (ImportError, ValueError, OSError, KeyError) as err:
        raise UsageError(f"{folder}: its tokenizer cannot be loaded ({_line(err)})") from None
    except Exception as err:  # the Rust parser raises bare Exception
        raise CorruptCheckpoint(f"{folder}/tokenizer.json: does not parse ({_line(err)})") from err


def tokenizer_sha256(folder: Path) -> str:
    """Hash of the tokenizer's files, for the conditions of a result."""
    return sha256_files(tokenizer_files(folder))


def start_token(tokenizer: Any, config: Any = None) -> int:
    """The token put before every text: BOS of the tokenizer, else of the config, else EOS.

    Families without a BOS (Qwen) were trained with EOS between documents, which plays its part.

    Args:
        tokenizer: Hugging Face tokenizer.
        config: Hugging Face model configuration, or None.

    Raises:
        UsageError: none of the three exists.
    """
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    candidates = (
        getattr(tokenizer, "bos_token_id", None),
        getattr(text_config, "bos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    for token in candidates:
        if isinstance(token, int):
            return token
    raise UsageError("the tokenizer has neither a BOS nor an EOS token; one must start each text")


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts without any special token added.

    Args:
        tokenizer: Hugging Face tokenizer.
        texts: any number of strings.
    """
    if not texts:
        return []
    # verbose=False: texts longer than the model are normal here, they are cut into windows.
    batch = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    return [list(ids) for ids in batch["input_ids"]]


def check_ids(ids: Sequence[int], vocab_size: int | None, name: str) -> None:
    """Refuse token ids that the model has no embedding for.

    Args:
        ids: token ids.
        vocab_size: rows of the embedding; None skips the check.
        name: what the error message calls the text.

    Raises:
        CorruptCheckpoint: an id lies outside the vocabulary.
    """
    top = max(ids, default=0)
    if vocab_size is not None and top >= vocab_size:
        raise CorruptCheckpoint(
            f"{name}: the tokenizer gives token {top}, but the model's vocabulary has {vocab_size}"
            " (is the tokenizer this model's?)"
        )


def model_limits(config: Any) -> tuple[int | None, int | None]:
    """(vocabulary size, longest context) of a Hugging Face configuration, None where unknown."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None), getattr(text, "max_position_embeddings", None)


def resolve_context(config: Any, context: int | None) -> int:
    """Tokens per window: as asked, or the model's maximum but at most 2048.

    Args:
        config: Hugging Face model configuration.
        context: the wish, or None.

    Raises:
        UsageError: less than 2, or more than the model's maximum.
    """
    longest = model_limits(config)[1]
    if context is None:
        return min(longest or 2048, 2048)
    if context < 2:
        raise UsageError(f"context {context}: a window needs at least 2 tokens, one is predicted")
    if longest is not None and context > longest:
        raise UsageError(f"context {context}: the model's maximum is {longest}")
    return context


def _line(err: BaseException) -> str:
    return " ".join(str(err).split())[:200]
