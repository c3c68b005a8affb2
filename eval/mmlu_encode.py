"""MMLU's prompts and continuations as token ids, encoded and cut as lm-evaluation-harness does it.

Prompt and prompt + continuation are encoded as wholes, with the special tokens that the tokenizer
adds by itself; the continuation's tokens are those after the prompt's. What exceeds the context is
cut from the left, the start token included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from fissile.errors import UsageError
from fissile.eval.mmlu_prompts import MmluItem, Scoring, continuations, question_text
from fissile.eval.tokens import check_ids, model_limits

_DEFAULT_CONTEXT = 2048
# Tokenizers without a limit of their own give a number of this size.
_NO_LIMIT = 10**18
# Beginnings of questions. How white space before them is cut into tokens depends on what follows.
_BEGINNINGS = ("A", "a", "1", "(", '"')


@dataclass(frozen=True)
class EncodedItem:
    """One item, ready for the model.

    Args:
        choices: per choice the input and the continuation that ends it, as in a `Row`.
        truncated: some input lost its beginning.
    """

    choices: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    truncated: bool


class Encoder:
    """Prompts and continuations to token ids, as the harness encodes pairs.

    Args:
        tokenizer: of the model.
        config: of the model.
        scoring: which prompts.
        context: most tokens of an input; None for the model's maximum, as the harness finds it.
    """

    def __init__(self, tokenizer: Any, config: Any, scoring: Scoring, context: int | None) -> None:
        self.tokenizer, self.scoring = tokenizer, scoring
        self.longest = _longest(config, tokenizer, context)
        self.vocab_size = model_limits(config)[0]
        token = tokenizer.bos_token_id
        self._first = tokenizer.eos_token_id if token is None else token
        ids = self._encode(["A"])[0]
        self.start = ids[0] if ids and ids[0] == token else None
        """The token put before every prompt, None if the tokenizer adds none."""

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # A prompt that already begins with the text of the start token gets no second one.
        begins = self.tokenizer.decode([self._first]) if self._first is not None else None
        special = begins is None or not texts[0].startswith(begins)
        batch = self.tokenizer(texts, add_special_tokens=special, verbose=False)
        return [list(ids) for ids in batch["input_ids"]]

    def prefix(self, text: str) -> tuple[int, ...]:
        """Tokens that prompts of `text` and a question begin with, whatever the question."""
        encoded = self._encode([text + beginning for beginning in _BEGINNINGS])
        columns = zip(*encoded, strict=False)
        return tuple(c[0] for c in takewhile(lambda column: len(set(column)) == 1, columns))

    def items(self, items: Sequence[MmluItem], text: str) -> list[EncodedItem]:
        """Encode the prompts `text` + question with each of their continuations."""
        texts = []
        for item in items:
            prompt = text + question_text(item, self.scoring)
            texts += [prompt, *(prompt + c for c in continuations(item, self.scoring))]
        encoded, size = self._encode(texts), len(texts) // len(items)
        return [
            self._item(item, encoded[i * size], encoded[i * size + 1 : (i + 1) * size])
            for i, item in enumerate(items)
        ]

    def _item(self, item: MmluItem, prompt: list[int], wholes: list[list[int]]) -> EncodedItem:
        choices, truncated = [], False
        for number, whole in enumerate(wholes):
            check_ids(whole, self.vocab_size, item.where)
            continuation = tuple(whole[len(prompt) :])
            if not 0 < len(continuation) <= self.longest:
                raise UsageError(
                    f"{item.where}: choice {number} has {len(continuation)} tokens of its own"
                    f" after the prompt; 1 to {self.longest} can be scored"
                )
            full = (*prompt, *continuation)
            truncated |= len(full) > self.longest + 1
            ids = full[-(self.longest + 1) :][:-1]
            choices.append((ids, continuation))
        return EncodedItem(tuple(choices), truncated)


def _longest(config: Any, tokenizer: Any, context: int | None) -> int:
    """Most tokens of an input: as asked, or what the harness takes for the model's maximum.

    Raises:
        UsageError: less than 2, or more than the model's maximum.
    """
    text = getattr(config, "text_config", None) or config
    names = ("n_positions", "max_position_embeddings", "n_ctx")
    stated = [getattr(text, name, None) for name in names]
    stated.append(getattr(tokenizer, "model_max_length", None))
    known = [int(value) for value in stated if value is not None and value < _NO_LIMIT]
    maximum = known[0] if known else _DEFAULT_CONTEXT
    if context is None:
        return maximum
    if not 2 <= context <= maximum:
        raise UsageError(f"context {context}: accepted are 2 to {maximum}")
    return context
