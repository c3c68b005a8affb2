"""How a mixture of experts spreads its tokens: load, domains, switches, entropy, by layer.

Text of a domain is packed into windows of one length, each after a start token; what does not fill
the last window is left out. Entropies are those of the load over its maximum, log E: 1 where all
experts are chosen alike.

Shapes: T tokens, K chosen per token, E experts, N domains, S tokens per window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fissile.errors import UsageError
from fissile.eval.documents import Document, by_domain
from fissile.eval.perplexity import Progress
from fissile.eval.result import Scored
from fissile.eval.routing import collect_choices
from fissile.eval.tokens import check_ids, encode, model_limits, resolve_context, start_token

_CONTEXT = 512


@dataclass(frozen=True)
class ExpertUse:
    """What one layer (or one decision for all layers) did with some text.

    Args:
        load: per expert, share of all choices; sums to 1.
        entropy: of the load over log E.
        imbalance: largest load over the mean load.
        switch_rate: share of neighbouring tokens of a window whose sets differ; None without any.
        chosen: experts per token, mean.
        domain_expert: per domain, share of its tokens that chose each expert.
        domain_entropy: per domain, entropy of its own load over log E.
    """

    load: list[float]
    entropy: float
    imbalance: float
    switch_rate: float | None
    chosen: float
    domain_expert: list[list[float]]
    domain_entropy: list[float]

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return dict(self.__dict__)


def expert_use(
    index_TK: Tensor, num_experts: int, domain_T: Tensor, domains: int, sequence_T: Tensor
) -> ExpertUse:
    """Measure the choices of one layer.

    Args:
        index_TK: int64 (T, K), chosen experts, distinct within a token; -1 where fewer were chosen.
        num_experts: E.
        domain_T: int64 (T,), domain of each token.
        domains: N; each has a token.
        sequence_T: int64 (T,), window of each token; tokens are in reading order.

    Raises:
        ValueError: no choice at all, or shapes that do not fit.
    """
    tokens = len(index_TK)
    if {len(domain_T), len(sequence_T)} != {tokens} or not bool((index_TK >= 0).any()):
        raise ValueError(f"need choices, domain and window of each of {tokens} > 0 tokens")
    # A column more takes the places of experts that were not chosen.
    chosen_TE = torch.zeros(tokens, num_experts + 1, dtype=torch.bool)
    chosen_TE.scatter_(1, torch.where(index_TK < 0, num_experts, index_TK), True)
    chosen_TE = chosen_TE[:, :num_experts]
    count_NE = torch.zeros(domains, num_experts, dtype=torch.float64)
    count_NE.index_add_(0, domain_T, chosen_TE.double())
    tokens_N = torch.bincount(domain_T, minlength=domains).double()
    load_E = count_NE.sum(0) / count_NE.sum()
    same = sequence_T[1:] == sequence_T[:-1]
    differ = (chosen_TE[1:] != chosen_TE[:-1]).any(1)[same]
    return ExpertUse(
        load_E.tolist(),
        _entropy(load_E),
        float(load_E.max() * num_experts),
        float(differ.double().mean()) if len(differ) else None,
        float(chosen_TE.sum() / tokens),
        (count_NE / tokens_N[:, None]).tolist(),
        [_entropy(count_E / count_E.sum()) for count_E in count_NE],
    )


def score_routing(
    model: Any,
    tokenizer: Any,
    documents: Sequence[Document],
    *,
    context: int | None = None,
    batch_tokens: int = 8192,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Scored:
    """Run documents through a mixture of experts and measure what its routers choose.

    The score is the entropy of the load, mean over the layers that decide.

    Args:
        model: an artifact's model, or a mixture of experts of transformers, in evaluation mode.
        tokenizer: its tokenizer.
        documents: labelled text.
        context: tokens per window; None for the model's maximum, at most 512.
        batch_tokens: tokens per forward pass.
        limit: use the first so many documents.
        progress: called with ("eval", windows done, windows, "").

    Raises:
        UsageError: a domain does not fill one window.
        UnsupportedModel: a dense model.
        CorruptCheckpoint: the tokenizer gives ids outside the model's vocabulary.
    """
    documents = list(documents[:limit])
    wanted = context or min(_CONTEXT, model_limits(model.config)[1] or _CONTEXT)
    context = resolve_context(model.config, wanted)
    ids_NS, domain_N, names = pack(documents, tokenizer, context, model.config)

    def show(_stage: str, done: int, total: int, detail: str) -> None:
        if progress is not None:
            progress("eval", done, total, detail)

    found = collect_choices(
        model, ids_NS, where="the model", batch_tokens=batch_tokens, progress=show
    )
    domain_T = domain_N.repeat_interleave(context)
    layers = [
        expert_use(index_TK, found.num_experts, domain_T, len(names), found.sequence_T)
        for index_TK in found.index
    ]
    groups = {n: _mean([use.domain_entropy[i] for use in layers]) for i, n in enumerate(names)}
    details = {
        "context": context,
        "bos": start_token(tokenizer, model.config),
        "decides": found.decides,
        "num_experts": found.num_experts,
        "domains": names,
        "n_documents": len(documents),
    }
    value = _mean([use.entropy for use in layers])
    return Scored(ids_NS.numel(), value, None, groups, details, _metrics(found.layers, layers))


def _metrics(numbers: Sequence[int], layers: Sequence[ExpertUse]) -> dict[str, Any]:
    switches = [use.switch_rate for use in layers if use.switch_rate is not None]
    tables = [{"layer": n, **use.to_dict()} for n, use in zip(numbers, layers, strict=True)]
    return {
        "switch_rate": {"value": _mean(switches), "higher_is_better": False},
        "imbalance": {"value": max(use.imbalance for use in layers), "higher_is_better": False},
        "layers": tables,
    }


def pack(
    documents: Sequence[Document], tokenizer: Any, context: int, config: Any
) -> tuple[Tensor, Tensor, list[str]]:
    """All text in windows of one length, domain by domain.

    Args:
        documents: labelled text.
        tokenizer: Hugging Face tokenizer.
        context: tokens per window, S.
        config: Hugging Face model configuration.

    Returns:
        ids int64 (windows, S), domain int64 (windows,), names of the domains.

    Raises:
        UsageError: a domain does not fill one window.
        CorruptCheckpoint: the tokenizer gives ids outside the model's vocabulary.
    """
    start, rows, labels = start_token(tokenizer, config), [], []
    names = by_domain(documents)
    for place, (name, members) in enumerate(names.items()):
        stream: list[int] = []
        encoded = encode(tokenizer, [documents[i].text for i in members])
        for i, ids in zip(members, encoded, strict=True):
            check_ids(ids, model_limits(config)[0], documents[i].name)
            stream += [start, *ids]
        count = len(stream) // context
        if count == 0:
            raise UsageError(
                f"domain {name!r} has {len(stream)} tokens, a window has {context}; give more text"
                " or a shorter --context"
            )
        rows += [stream[i * context : (i + 1) * context] for i in range(count)]
        labels += [place] * count
    return torch.tensor(rows), torch.tensor(labels), list(names)


def _entropy(load_E: Tensor) -> float:
    return float(torch.special.entr(load_E.double()).sum()) / math.log(max(2, len(load_E)))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
