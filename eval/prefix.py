"""Log-likelihoods of continuations, with the keys and values of a common prefix computed once.

A row is the input of a forward pass and what is scored at its last positions. Rows that share
their first tokens with others run on their remainder only, against the cache of that prefix: every
layer of it, including the one in which a pre-gating router keeps its keys and values. Prefixes of
equal length are cached together, and their rows share batches. The cache is never copied for a
whole batch; each attention layer sees it expanded while it runs. The head, and those parts of the
last layer that work on one position at a time, are applied to the scored positions alone.

A row's value does not depend on its neighbours. Its padded length follows from its own length, a
batch holds rows of one padded length, and the head runs on a fixed number of rows: matrix kernels
choose their order of summation by shape, so that equal shapes per row give equal bits. A test holds
this on the CPU.

Legend: B rows of a batch, T tokens of the longest one, S prefixes of P tokens each, H heads, E size
of a head, N scored positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from fissile.eval.scoring import split_model

# Padded lengths, and numbers of positions chosen for scoring, are multiples of these.
_LENGTHS, _POSITIONS = 4, 16
# A product of fewer rows takes another path in some BLAS libraries and rounds differently.
_LEAST_ROWS = 16
_HEAD_ROWS = 64
_PROBE_TOKENS = 8
# Keys that the rows of one batch may attend to, per token of the budget.
_KEYS_PER_TOKEN = 16
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class Row:
    """One sequence and the continuations that end it.

    Args:
        ids: input tokens; the last token of a continuation is predicted only and not among them.
        continuations: token ids, all of one length n; scored at the last n positions. Where n > 1
            they differ in the last token only.
        shared: so many of the first tokens are those of other rows too.
    """

    ids: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    shared: int = 0

    @property
    def scored(self) -> int:
        """Number of scored positions."""
        return len(self.continuations[0])


class PrefixScorer:
    """Scores rows under one model.

    Args:
        model: Hugging Face style causal model in evaluation mode.
        batch_tokens: padded tokens per forward pass, one row at least; changes no value.
        longest: most tokens the model takes; padding does not go past it.
    """

    def __init__(self, model: Any, batch_tokens: int, longest: int) -> None:
        self.model, self.batch_tokens, self.longest = model, batch_tokens, longest
        self.device = next(model.parameters()).device
        self.shares = not _depends_on_length(model.config)
        self._body: Any = None
        self._head: Callable[[Tensor], Tensor] | None = None
        self._pointwise: list[torch.nn.Module] = []
        self._probed = False

    def loglikelihoods(self, rows: Sequence[Row]) -> Iterator[tuple[int, list[float]]]:
        """Score rows.

        Args:
            rows: any number, in any order. Caches of all prefixes of one length are held at a time.

        Yields:
            (index of the row, log-likelihood of each of its continuations in nats), rows of one
            prefix length after another, longest first; values that are not finite are left for the
            caller to judge.
        """
        if not rows:
            return
        with torch.inference_mode():
            self._probe(rows[0].ids)
        for size, members in sorted(self._by_prefix(rows).items()):
            with torch.inference_mode():
                cached = self._cached(list(members)) if size else None
            size = size if cached else 0
            place = {i: s for s, own in enumerate(members.values()) for i in own}
            for batch in self._batches(rows, list(place), size):
                at = [place[i] for i in batch]
                with torch.inference_mode():
                    found = self._score([rows[i] for i in batch], cached, at, size)
                yield from zip(batch, found, strict=True)

    def _by_prefix(self, rows: Sequence[Row]) -> dict[int, dict[tuple[int, ...], list[int]]]:
        """Length of prefix to prefix to the rows that can share it; length 0 for the others."""
        able = self._body is not None and self.shares
        keys = [
            row.ids[: row.shared] if able and len(row.ids) - row.scored >= row.shared else ()
            for row in rows
        ]
        counts = Counter(keys)
        found: dict[int, dict[tuple[int, ...], list[int]]] = {}
        for i, key in enumerate(keys):
            own = key if counts[key] > 1 else ()
            found.setdefault(len(own), {}).setdefault(own, []).append(i)
        return found

    def _probe(self, ids: Sequence[int]) -> None:
        if self._probed:
            return
        split = split_model(self.model, ids[:_PROBE_TOKENS], self.device)
        self._body, self._head = split if split is not None else (None, None)
        self._pointwise = _pointwise(self._body) if split is not None else []
        self._probed = True

    def _cached(self, prefixes: Sequence[tuple[int, ...]]) -> list[Any] | None:
        """Cache layers of prefixes of one length, or None if there is no way to have them."""
        size = len(prefixes[0])
        empty = DynamicCache(config=self.model.config)
        if any(isinstance(layer, DynamicSlidingWindowLayer) for layer in empty.layers):
            # What such a layer keeps is the end of its input, which padding would be.
            runs = [torch.tensor([prefix]) for prefix in prefixes]
        else:
            padded = max(size, min(-(-size // _POSITIONS) * _POSITIONS, self.longest))
            ids_SP = torch.zeros(len(prefixes), padded, dtype=torch.long)
            ids_SP[:, :size] = torch.tensor(prefixes)
            runs = [ids_SP]
        caches = [self._run_prefix(ids_SP, size) for ids_SP in runs]
        whole = [layers for layers in caches if layers is not None]
        if len(whole) < len(caches):
            return None
        for own in zip(*whole, strict=True):
            own[0].keys = torch.cat([layer.keys for layer in own])
            own[0].values = torch.cat([layer.values for layer in own])
        return whole[0]

    def _run_prefix(self, ids_SP: Tensor, size: int) -> list[Any] | None:
        """Cache layers after the first `size` tokens of all rows; None if of other kinds."""
        cache = DynamicCache(config=self.model.config)
        self._body(input_ids=ids_SP.to(self.device), past_key_values=cache, use_cache=True)
        # States of other kinds (recurrent ones, for instance) are not cut into tokens.
        kinds = {type(layer) for layer in cache.layers}
        if not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            return None
        if not all(layer.is_initialized for layer in cache.layers):
            return None
        for layer in cache.layers:
            if ids_SP.shape[1] > size:
                layer.keys, layer.values = layer.keys[..., :size, :], layer.values[..., :size, :]
        return list(cache.layers)

    def _padded(self, row: Row, size: int) -> int:
        """Tokens that a row takes up after a prefix of `size`; follows from its length alone."""
        length = len(row.ids) - size
        if not self.shares:
            return length
        return max(length, min(-(-length // _LENGTHS) * _LENGTHS, self.longest - size))

    def _batches(
        self, rows: Sequence[Row], members: Sequence[int], size: int
    ) -> Iterator[list[int]]:
        """Indices in batches of one padded length, longest first."""
        padded = {i: self._padded(rows[i], size) for i in members}
        batch: list[int] = []
        for i in sorted(members, key=lambda i: (-padded[i], i)):
            length, count = padded[i], len(batch) + 1
            over = count * length > self.batch_tokens or (
                count * (size + length) > self.batch_tokens * _KEYS_PER_TOKEN
            )
            if batch and (over or padded[batch[0]] != length):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _score(
        self, rows: Sequence[Row], cached: list[Any] | None, at: Sequence[int], size: int
    ) -> list[list[float]]:
        """Log-likelihoods of rows whose prefixes, if cached, are those at the places `at`."""
        padded = self._padded(rows[0], size)
        spare = max(0, -(-_LEAST_ROWS // padded) - len(rows))
        ids_BT = torch.zeros(len(rows) + spare, padded, dtype=torch.long)
        for place, row in enumerate(rows):
            ids_BT[place, : len(row.ids) - size] = torch.tensor(row.ids[size:])
        # No mask: what follows a token does not change a causal model's values.
        inputs: dict[str, Any] = {"input_ids": ids_BT.to(self.device), "use_cache": False}
        if cached is not None:
            at_B = torch.tensor([*at, *[at[-1]] * spare], device=self.device)
            inputs["past_key_values"] = Cache(layers=[_Shared(layer, at_B) for layer in cached])
            inputs["use_cache"] = True
        ends = [len(row.ids) - size for row in rows]
        places = [
            (b, t) for b, row in enumerate(rows) for t in range(ends[b] - row.scored, ends[b])
        ]
        at_N = tuple(torch.tensor(part, device=self.device) for part in zip(*places, strict=True))
        if self._body is None or self._head is None:
            mask_BT = torch.ones_like(inputs["input_ids"])
            logits_NV = self.model(**inputs, attention_mask=mask_BT).logits[at_N].float()
            return _gather(rows, [torch.log_softmax(logits_NV, dim=-1)])
        with _only_at(self._pointwise, at_N):
            hidden_ND = self._body(**inputs).last_hidden_state[at_N]
        return _gather(rows, _log_probs(hidden_ND, self._head))


class _Shared(CacheLayerMixin):
    """A cached layer of some prefixes, each seen by many rows of a batch; it does not grow.

    Args:
        layer: with keys and values (S, H, P, E); it stays as it is.
        at_B: int64, which of the prefixes a row has.
    """

    def __init__(self, layer: Any, at_B: Tensor) -> None:
        super().__init__()
        self.layer, self.at_B, self.is_sliding = layer, at_B, layer.is_sliding
        self.keys, self.values, self.is_initialized = layer.keys, layer.values, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a shared layer is filled from the start")

    def _of_rows(self, states: Tensor) -> Tensor:
        if len(states) == 1:
            return states.expand(len(self.at_B), -1, -1, -1)
        return states[self.at_B]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Prefix and new states of a batch, (B, H, P + T, E) each; nothing is kept."""
        keys = torch.cat([self._of_rows(self.layer.keys), key_states], dim=-2)
        return keys, torch.cat([self._of_rows(self.layer.values), value_states], dim=-2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        sizes: tuple[int, int] = self.layer.get_mask_sizes(query_length)
        return sizes

    def get_seq_length(self) -> int:
        return int(self.layer.get_seq_length())

    def get_max_length(self) -> int:
        return int(self.layer.get_max_length())


def _log_probs(hidden_ND: Tensor, head: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Log-probabilities (rows of a chunk, V) of scored positions, chunk by chunk."""
    for chunk_ND in hidden_ND.split(_HEAD_ROWS):
        logits_NV = head(_filled(chunk_ND))[: len(chunk_ND)]
        yield torch.log_softmax(logits_NV.float(), dim=-1)


def _filled(x_ND: Tensor) -> Tensor:
    """Repeat the last row until their number is a multiple."""
    missing = -len(x_ND) % _POSITIONS
    return torch.cat([x_ND, x_ND[-1:].expand(missing, -1)]) if missing else x_ND


def _pointwise(body: Any) -> list[torch.nn.Module]:
    """The last layer's modules whose values at one position depend on that position alone: the
    family's own MLP, and the projections to queries and from heads."""
    layers = getattr(body, "layers", None)
    last = layers[-1] if isinstance(layers, torch.nn.ModuleList) else None
    found: list[torch.nn.Module] = []
    mlp: Any = getattr(last, "mlp", None)
    attention: Any = getattr(last, "self_attn", None)
    if _is_stock(mlp, "MLP") and torch.nn.Linear in {type(part) for part in mlp.children()}:
        found.append(mlp)
    if _is_stock(attention, "Attention"):
        parts = [getattr(attention, name, None) for name in ("q_proj", "o_proj")]
        found += [part for part in parts if isinstance(part, torch.nn.Linear)]
    return found


def _is_stock(module: Any, kind: str) -> bool:
    name = type(module)
    return name.__module__.startswith("transformers.") and name.__name__.endswith(kind)


@contextmanager
def _only_at(modules: Sequence[torch.nn.Module], at_N: tuple[Tensor, ...]) -> Iterator[None]:
    """Let modules of (B, T, ...) compute the given positions only; the others become zero."""

    def before(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        shapes.append(inputs[0].shape[:2])
        return (_filled(inputs[0][at_N]),)

    def after(_: Any, __: Any, out_ND: Tensor) -> Tensor:
        out_BTD = out_ND.new_zeros((*shapes.pop(), out_ND.shape[-1]))
        out_BTD[at_N] = out_ND[: len(at_N[0])]
        return out_BTD

    shapes: list[torch.Size] = []
    hooks = [module.register_forward_pre_hook(before) for module in modules]
    hooks += [module.register_forward_hook(after) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _gather(rows: Sequence[Row], chunks: Iterator[Tensor] | list[Tensor]) -> list[list[float]]:
    """Sum the log-probabilities of each row's continuations; chunks follow the rows' positions."""
    tokens_N = [tokens for row in rows for tokens in zip(*row.continuations, strict=True)]
    picked: list[list[float]] = []
    for chunk_NV in chunks:
        part = tokens_N[len(picked) : len(picked) + len(chunk_NV)]
        for values_V, tokens in zip(chunk_NV, part, strict=True):
            picked.append(values_V[torch.tensor(tokens, device=values_V.device)].tolist())
    found, begin = [], 0
    for row in rows:
        found.append(
            [sum(column) for column in zip(*picked[begin : begin + row.scored], strict=True)]
        )
        begin += row.scored
    return found


def _depends_on_length(config: Any) -> bool:
    """Whether rotary angles follow the length of the whole input, which a prefix cannot know."""
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    tables = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    types = {table.get("rope_type", table.get("type")) for table in tables}
    return bool(types.intersection(_LENGTH_DEPENDENT_ROPE))
