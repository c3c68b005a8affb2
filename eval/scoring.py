"""Negative log-likelihood of every token of many sequences, in bounded memory.

Legend: B sequences of a batch, T tokens of the longest one, P predicted tokens, D model width,
V vocabulary, C predicted tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fissile.eval.tokens import model_limits

# fp32 logits of one chunk: 2^24 elements are 64 MiB, whatever the vocabulary.
_CHUNK_ELEMENTS = 1 << 24
_PROBE_TOKENS = 8


def token_nll(
    model: Any,
    sequences: Sequence[Sequence[int]],
    batch_tokens: int,
    tails: Sequence[int] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Score sequences under a causal model.

    Sequences of similar length form batches of at most `batch_tokens` tokens (one sequence at
    least), padded on the right and masked; a causal model's values do not depend on what follows.
    Logits never exist for a whole batch: the body runs once and the head on chunks of its output.

    Args:
        model: Hugging Face style causal model; called with input_ids, attention_mask, use_cache.
        sequences: token ids, at least two per sequence.
        batch_tokens: padded tokens per forward pass.
        tails: how many of each sequence's last tokens to score; None for all but the first.

    Yields:
        (index of the sequence, fp32 nats of its tokens 1, 2, … or of its tail), longest first;
        values that are not finite are left for the caller to judge.
    """
    if not sequences:
        return
    device = next(model.parameters()).device
    with torch.inference_mode():
        split = split_model(model, sequences[0][:_PROBE_TOKENS], device)
        if split is None:
            # Whole logits it must be; then a batch is as small as one chunk allows.
            batch_tokens = min(batch_tokens, max(1, _CHUNK_ELEMENTS // _vocab_size(model)))
    counts = [len(s) - 1 for s in sequences] if tails is None else tails
    for group in _batches([len(s) for s in sequences], batch_tokens):
        with torch.inference_mode():
            ids_BT, mask_BT = _pad([sequences[i] for i in group], device)
            predicted_BT = _tail_mask(mask_BT, [counts[i] for i in group])
            nll_P = _batch_nll(model, split, ids_BT, mask_BT, predicted_BT)
        parts = nll_P.cpu().split([counts[i] for i in group])
        yield from zip(group, parts, strict=True)


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches, longest first, so that the peak of memory comes at the start."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for place, row in enumerate(rows):
        ids_BT[place, : len(row)] = torch.tensor(row)
        mask_BT[place, : len(row)] = 1
    return ids_BT.to(device), mask_BT.to(device)


def _tail_mask(mask_BT: Tensor, tails: Sequence[int]) -> Tensor:
    """Which of the tokens 1, 2, … are scored: the last ones of each sequence, bool (B, T - 1)."""
    place_BT = mask_BT.flip(1).cumsum(1).flip(1)
    tails_B1 = torch.tensor(tails, device=mask_BT.device)[:, None]
    return (mask_BT.bool() & (place_BT <= tails_B1))[:, 1:]


def _batch_nll(
    model: Any,
    split: tuple[Any, Callable[[Tensor], Tensor]] | None,
    ids_BT: Tensor,
    mask_BT: Tensor,
    predicted_BT: Tensor,
) -> Tensor:
    # The last token is only predicted: leaving it out lets a window of T tokens end with token T+1.
    inputs = {
        "input_ids": ids_BT[:, :-1],
        "attention_mask": mask_BT[:, :-1],
        "use_cache": False,
    }
    targets_P = ids_BT[:, 1:][predicted_BT]
    if split is None:
        logits_PV = model(**inputs).logits[predicted_BT]
        return functional.cross_entropy(logits_PV.float(), targets_P, reduction="none")
    body, head = split
    hidden_PD = body(**inputs).last_hidden_state[predicted_BT]
    chunk = max(1, _CHUNK_ELEMENTS // _vocab_size(model))
    parts = zip(hidden_PD.split(chunk), targets_P.split(chunk), strict=True)
    return torch.cat(
        [functional.cross_entropy(head(h_CD), t_C, reduction="none") for h_CD, t_C in parts]
    )


def split_model(
    model: Any, probe: Sequence[int], device: torch.device
) -> tuple[Any, Callable[[Tensor], Tensor]] | None:
    """(body, head) whose composition gives the model's own logits, or None if none is found."""
    body = getattr(model, "base_model", None)
    find = getattr(model, "get_output_embeddings", None)
    embeddings = find() if find is not None else None
    if embeddings is None or body is None or body is model:
        return None
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)

    def head(hidden_CD: Tensor) -> Tensor:
        logits_CV: Tensor = embeddings(hidden_CD).float()
        return cap * torch.tanh(logits_CV / cap) if cap else logits_CV

    # Other models scale or shift between body and logits in ways of their own: ask, don't assume.
    ids_BT = torch.tensor([list(probe)], device=device)
    inputs = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "use_cache": False}
    theirs = model(**inputs).logits.float()
    hidden = getattr(body(**inputs), "last_hidden_state", None)
    if hidden is None:
        return None
    ours = head(hidden)
    if ours.shape != theirs.shape:
        return None
    scale = theirs.abs().nan_to_num(0.0).max().item()
    same = torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * scale, equal_nan=True)
    return (body, head) if same else None


def _vocab_size(model: Any) -> int:
    # 2^17 where the model does not say: no common vocabulary is much larger.
    return model_limits(getattr(model, "config", None))[0] or 1 << 17
