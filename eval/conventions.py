"""Perplexity as other programs define it, to be read beside their numbers.

gptq: what the script of the GPTQ paper prints. All documents are joined by "\\n\\n" and tokenised
once, with the special tokens that the tokenizer adds by itself (one BOS at the very beginning, for
tokenizers that have it). The ids are cut into windows of `context` tokens; what is left at the end
is dropped. Tokens 2 to `context` of a window are predicted from those before them in the window,
the first is not. Perplexity is exp of the mean over windows of the mean over those tokens. Windows
are the units of the standard error. A domain's value is what its own documents give alone, joined
in the same way.

lm-eval: what lm-evaluation-harness does in `loglikelihood_rolling`. A document is encoded with the
tokenizer's own special tokens, and every one of its tokens is predicted exactly once. The first
window is the prefix token (BOS, else EOS) and up to `context` tokens; every further window predicts
the next `context` tokens after one token of context, except the last one, which is filled to
`context` input tokens with what comes before. `context` is the model's maximum where not given.

Both have bits per byte, and perplexities per byte and per word, beside the one per token. In the
harness these are exp of the negative log-likelihood over all bytes or words of all documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from fissile.errors import UsageError
from fissile.eval.documents import Document, by_domain
from fissile.eval.perplexity import (
    Extent,
    HeldOut,
    PerplexityResult,
    Progress,
    extents_by_domain,
    measure,
    perplexity,
)
from fissile.eval.tokens import check_ids, model_limits, resolve_context, start_token
from fissile.eval.windows import Window
from fissile.registry import suggest

Convention = Literal["fissile", "gptq", "lm-eval"]
_HARNESS_CONTEXT = 2048


def check_convention(name: str) -> None:
    """Refuse a name that is none.

    Raises:
        UsageError: lists the names.
    """
    if name not in (known := list(get_args(Convention))):
        raise UsageError(f"convention {name!r}{suggest(name, known)} (known: {', '.join(known)})")


def score(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    convention: str = "fissile",
    context: int | None = None,
    batch_tokens: int = 8192,
    limit: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of a model on documents by one of the conventions.

    Args:
        model: Hugging Face style causal model in evaluation mode.
        tokenizer: its tokenizer.
        documents: held-out text.
        convention: "fissile" (`fissile.eval.perplexity`), "gptq" or "lm-eval".
        context: tokens per window; None for the model's maximum, which "fissile" and "gptq"
            bound by 2048.
        batch_tokens: padded tokens per forward pass; does not change the result.
        limit: use the first so many documents.
        progress: called with ("eval", windows done, windows, "").

    Raises:
        UsageError: an unknown convention, too little text, or a context the model does not have.
        CorruptCheckpoint: ids outside the vocabulary, or logits that are not finite.
    """
    check_convention(convention)
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: at least one document is needed")
    if convention == "fissile":
        return perplexity(
            model,
            tokenizer,
            documents,
            context=context,
            batch_tokens=batch_tokens,
            limit=limit,
            progress=progress,
        )
    documents = list(documents[:limit])
    if convention == "gptq":
        return _joined(model, tokenizer, documents, context, batch_tokens, progress)
    held_out = prepare_rolling(model.config, tokenizer, documents, context)
    found = measure(model, held_out, batch_tokens=batch_tokens, progress=progress)
    return replace(found, convention="lm-eval")


def rolling_windows(
    ids: Sequence[int], start: int, context: int, document: int = 0
) -> list[Window]:
    """Windows of the harness: each token is predicted once, at most `context` tokens go in.

    Args:
        ids: tokens of one document.
        start: prefix token.
        context: tokens that the model reads in a window; a window holds one more.
        document: index kept in the windows.
    """
    whole = (start, *ids)
    windows = [Window(whole[: context + 1], document)] if ids else []
    for first in range(context, len(ids), context):
        last = min(first + context, len(ids))
        begin = last - context
        # In `whole` token t of `ids` stands at t + 1.
        windows.append(Window(whole[begin : last + 1], document, first - begin + 1))
    return windows


def prepare_rolling(
    config: Any, tokenizer: Any, documents: Sequence[Document], context: int | None = None
) -> HeldOut:
    """Encode documents and cut them as lm-evaluation-harness does.

    Args:
        config: Hugging Face model configuration.
        tokenizer: Hugging Face tokenizer.
        documents: held-out text.
        context: tokens that the model reads at once; None for its maximum.

    Raises:
        UsageError: nothing to predict, or a context the model does not have.
        CorruptCheckpoint: the tokenizer gives ids outside the model's vocabulary.
    """
    longest = model_limits(config)[1]
    wanted = context if context is not None else longest or _HARNESS_CONTEXT
    context, start = resolve_context(config, wanted), start_token(tokenizer, config)
    rows = [_with_specials(tokenizer, config, d.text, d.name) for d in documents]
    windows = [w for i, ids in enumerate(rows) for w in rolling_windows(ids, start, context, i)]
    if not windows:
        raise UsageError(f"the text is empty: {len(documents)} documents hold no token")
    extents = extents_by_domain(documents, [len(ids) for ids in rows])
    return HeldOut(tuple(windows), tuple(documents), context, start, extents)


def prepare_joined(
    config: Any, tokenizer: Any, documents: Sequence[Document], context: int | None, domain: str
) -> HeldOut:
    """Join documents and cut them as the GPTQ paper's script does; each window is a unit.

    Args:
        config: Hugging Face model configuration.
        tokenizer: Hugging Face tokenizer.
        documents: held-out text.
        context: tokens per window; None for the model's maximum, at most 2048.
        domain: label of the windows.

    Raises:
        UsageError: less text than one window, or a context the model does not have.
        CorruptCheckpoint: the tokenizer gives ids outside the model's vocabulary.
    """
    context = resolve_context(config, context)
    text = "\n\n".join(d.text for d in documents)
    ids = _with_specials(tokenizer, config, text, f"the text of {domain!r}")
    starts = range(0, len(ids) - context + 1, context)
    windows = tuple(
        Window(tuple(ids[first : first + context]), place) for place, first in enumerate(starts)
    )
    if not windows:
        raise UsageError(
            f"convention gptq: domain {domain!r} has {len(ids)} tokens, a window has {context};"
            " give more text or a shorter --context"
        )
    units = tuple(Document(f"window {i}", domain) for i in range(1, len(windows) + 1))
    return HeldOut(windows, units, context, None, {domain: Extent.of([text], len(ids))})


def _joined(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    context: int | None,
    batch_tokens: int,
    progress: Progress | None,
) -> PerplexityResult:
    members = by_domain(documents)
    texts = {"": list(documents)} | {
        name: [documents[i] for i in rows] for name, rows in members.items()
    }
    if len(members) == 1:
        del texts[""]
    held_out = {
        name: prepare_joined(model.config, tokenizer, part, context, name)
        for name, part in texts.items()
    }
    found = {
        name: measure(model, part, batch_tokens=batch_tokens, progress=progress)
        for name, part in held_out.items()
    }
    by_name = {name: part.total for name, part in found.items() if name}
    if len(members) == 1:
        return replace(next(iter(found.values())), convention="gptq")
    parts = list(found.items())
    return replace(
        found[""],
        by_domain=by_name,
        # Windows of all the text have no domain; those of a domain follow, named after it.
        document_nll=tuple(v for _, part in parts for v in part.document_nll),
        document_tokens=tuple(v for _, part in parts for v in part.document_tokens),
        document_domain=tuple(name or None for name, part in parts for _ in part.document_nll),
        document_id=tuple(
            f"{name}/{key}" if name else key for name, part in parts for key in part.document_id
        ),
        convention="gptq",
    )


def _with_specials(tokenizer: Any, config: Any, text: str, name: str) -> list[int]:
    """Token ids as the tokenizer gives them by default."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    check_ids(ids, model_limits(config)[0], name)
    return ids
