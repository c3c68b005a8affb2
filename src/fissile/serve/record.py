"""Traces of real models: ours, or any mixture of experts that transformers knows.

A request is a stretch of a domain's text: its prompt, and as its output either the text that
follows or what the model itself would write. A token's experts depend on the tokens up to it alone,
so one pass over both gives the routes of prefill and of every step of decoding.

Shapes: S tokens of a request, T rows, D decisions, K chosen, P candidates, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fissile.errors import UnsupportedModel, UsageError
from fissile.eval.documents import Document, by_domain, read_documents, sha256_files
from fissile.eval.result import model_sha256
from fissile.eval.routing import Router, check_routers, find_routers
from fissile.eval.run import check_bits, load_model, model_folder, read_config
from fissile.eval.tokens import (
    check_ids,
    encode,
    load_tokenizer,
    model_limits,
    start_token,
)
from fissile.serve.shape import model_shape
from fissile.serve.trace import Trace

Progress = Callable[[str, int, int, str], None]


class Lengths(NamedTuple):
    """Least and most tokens, drawn evenly."""

    low: int
    high: int


@dataclass(frozen=True)
class Choice:
    """What one router chose for the tokens of a request.

    Args:
        index: int64 (S, K), -1 where fewer were chosen.
        weights: (S, K) or None.
        scores: softmax scores (S, E) or None.
    """

    index: Tensor
    weights: Tensor | None
    scores: Tensor | None


def record_trace(
    source: Path,
    data: Path,
    *,
    requests: int = 200,
    prompt: tuple[int, int] = (16, 256),
    output: tuple[int, int] = (16, 64),
    generate: bool = False,
    bits: int | None = None,
    rate: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Trace:
    """Run requests through a model and keep what its routers choose.

    Args:
        source: an artifact, a run folder, or a mixture of experts of transformers in safetensors.
        data: JSONL of documents; requests are spread evenly over its domains.
        requests: how many.
        prompt: least and most tokens of a prompt, the start token included.
        output: least and most tokens generated.
        generate: let the model write them, greedily; else they are the text that follows.
        bits: width that an artifact is served at.
        rate: requests per second, Poisson.
        seed: of the requests.
        progress: called as ("trace", requests done, requests, "").

    Raises:
        UsageError: unreadable data, too little text, lengths that the model has no room for.
        UnsupportedModel: a dense model, or one that transformers does not know.
        CorruptCheckpoint: weights that are missing or damaged.
    """
    folder = model_folder(source)
    config = read_config(folder)
    check_routers(folder, config)
    check_bits(folder, config, bits)
    spans, rng = (Lengths(*prompt), Lengths(*output)), np.random.default_rng(seed)
    _check_lengths(*spans, config, requests, rate)
    documents, tokenizer = read_documents(data), load_tokenizer(folder)
    model = load_model(folder, config, bits)
    drawn = _draw(documents, tokenizer, model.config, requests, *spans, rng)
    found, recalls = _run(model, drawn, generate, str(folder), progress)
    arrays = _arrays(model.config, found)
    numbers = sorted({router.layer for router in find_routers(model, str(folder))})
    top_k = int((arrays["routes"] >= 0).sum(-1).max())
    _, prompts, outputs, domain = zip(*drawn.requests, strict=True)
    return Trace(
        model=model_shape(folder, numbers, _experts(model.config, found), top_k),
        prompt=np.array(prompts, dtype=np.int32),
        output=np.array(outputs, dtype=np.int32),
        arrival=np.cumsum(rng.exponential(1 / rate, requests)),
        domain=np.array(domain, dtype=np.int16),
        domains=tuple(drawn.domains),
        source=_provenance(folder, data, model.config, recalls)
        | {"output": "greedy" if generate else "text", "bits": bits, "seed": seed},
        **arrays,
    )


def _check_lengths(
    prompt: Lengths, output: Lengths, config: dict[str, Any], requests: int, rate: float
) -> None:
    limit = (config.get("text_config") or config).get("max_position_embeddings")
    for name, (low, high) in {"prompt": prompt, "output": output}.items():
        if not 1 <= low <= high:
            raise UsageError(f"{name} of {low} to {high} tokens: at least 1, in ascending order")
    if limit is not None and prompt.high + output.high > limit:
        raise UsageError(
            f"prompts of {prompt.high} and outputs of {output.high} tokens: the model has room for"
            f" {limit}"
        )
    if requests < 1 or not rate > 0:
        raise UsageError(f"{requests} requests at {rate:g} per second: at least 1, above 0")


class _Drawn(NamedTuple):
    requests: list[tuple[list[int], int, int, int]]
    domains: list[str]


def _draw(
    documents: Sequence[Document],
    tokenizer: Any,
    config: Any,
    requests: int,
    prompt: Lengths,
    output: Lengths,
    rng: np.random.Generator,
) -> _Drawn:
    """Requests as (ids, prompt, output, domain): stretches at random places of a domain's text."""
    start, names = start_token(tokenizer, config), by_domain(documents)
    streams = []
    for name, members in names.items():
        stream: list[int] = []
        for i, ids in zip(
            members, encode(tokenizer, [documents[i].text for i in members]), strict=True
        ):
            check_ids(ids, model_limits(config)[0], documents[i].name)
            stream += ids
        if len(stream) < prompt.high + output.high:
            raise UsageError(
                f"domain {name!r} has {len(stream)} tokens; a request of {prompt.high} and"
                f" {output.high} needs more text, or shorten --prompt and --output"
            )
        streams.append(stream)
    order = rng.permutation([i % len(streams) for i in range(requests)]).tolist()
    found = []
    for domain in order:
        before = int(rng.integers(prompt.low, prompt.high, endpoint=True))
        after = int(rng.integers(output.low, output.high, endpoint=True))
        stream = streams[domain]
        at = int(rng.integers(0, len(stream) - before - after + 2))
        found.append(([start, *stream[at : at + before + after - 1]], before, after, domain))
    return _Drawn(found, list(names))


def _run(
    model: Any, drawn: _Drawn, generate: bool, where: str, progress: Progress | None
) -> tuple[list[list[Choice]], list[float]]:
    """Choices of every request, and how often the next layer's gate knew them."""
    routers = find_routers(model, where)
    found: list[list[Choice]] = []
    recalls: list[float] = []
    with torch.inference_mode():
        for done, (ids, prompts, outputs, _) in enumerate(drawn.requests):
            if generate:
                ids = _continue(model, ids[:prompts], outputs)
            choices, seen = _choices(model, routers, ids[: prompts + outputs - 1], where)
            found.append(choices)
            recalls += _next_gate_recall(model, routers, choices, seen)
            if progress is not None:
                progress("trace", done + 1, len(drawn.requests), "")
    return found, recalls


def _continue(model: Any, ids: list[int], tokens: int) -> list[int]:
    made = model.generate(
        input_ids=torch.tensor([ids]),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
    )
    return list(made[0].tolist())


def _choices(
    model: Any, routers: Sequence[Router], ids: Sequence[int], where: str
) -> tuple[list[Choice], list[Tensor]]:
    """One forward pass: the choices of every router, in their order, and what each was given."""
    found: list[Choice] = []
    seen: list[Tensor] = []
    with _reading(model, routers, found, seen):
        model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    if len(found) != len(routers) or any(len(c.index) != len(ids) for c in found):
        raise UnsupportedModel(f"{where}: its routers do not choose once for every token")
    return found, seen


def _next_gate_recall(
    model: Any, routers: Sequence[Router], choices: Sequence[Choice], seen: Sequence[Tensor]
) -> list[float]:
    """Share of each layer's choices that its router also makes on the input of the layer before.

    Nothing where one router serves all layers.
    """
    ours = getattr(model.config, "model_type", None) == "fissile"
    found = []
    for later, (router, choice) in enumerate(zip(routers, choices, strict=True)):
        if later == 0:
            continue
        if not ours:
            guess_SK = router.read((seen[later - 1],), router.module(seen[later - 1]))
        else:
            selector = model.model.layers[router.layer].mlp.selector
            if selector is None:
                return []
            guess_SK = selector(seen[later - 1]).topk(choice.index.shape[1], dim=-1).indices
        hit_SK = (choice.index[:, :, None] == guess_SK[:, None, :]).any(-1)
        made_SK = choice.index >= 0
        found.append(float(hit_SK[made_SK].double().mean()))
    return found


@contextmanager
def _reading(
    model: Any, routers: Sequence[Router], found: list[Choice], seen: list[Tensor]
) -> Iterator[None]:
    """Append every router's choice and input while the block runs."""
    logits: dict[str, Tensor] = {}
    ours = getattr(model.config, "model_type", None) == "fissile"

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: tuple[Any, ...], result: Tensor) -> None:
            logits[name] = result

        return hook

    def choose(router: Router) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            index = router.read(args, result)
            seen.append(args[0])
            if ours:
                scores = _own_scores(logits, router)
                # Our experts are summed as they are; the scores say which matter.
                given = None if scores is None else scores.gather(-1, index.clamp_min(0))
                found.append(Choice(index, given, scores))
            else:
                found.append(_stock_choice(index, result))

        return hook

    handles = [r.module.register_forward_hook(choose(r)) for r in routers]
    if ours:
        for name, module in model.named_modules():
            if name == "model.router" or name.endswith(".mlp.selector"):
                handles.append(module.register_forward_hook(keep(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own_scores(logits: dict[str, Tensor], router: Router) -> Tensor | None:
    """Softmax scores (S, E) behind a choice of one of our models."""
    own = logits.get(f"model.layers.{router.layer}.mlp.selector")
    if own is None and "model.router" in logits:
        heads_HTE = logits["model.router"]
        own = heads_HTE[router.layer if len(heads_HTE) > 1 else 0]
    return None if own is None else own.float().softmax(-1)


def _stock_choice(index_SK: Tensor, result: Any) -> Choice:
    """Weights and scores among the floats that a stock router returns."""
    parts = result if isinstance(result, tuple | list) else (result,)
    floats = [p for p in parts if isinstance(p, Tensor) and p.is_floating_point()]
    floats = [p.reshape(-1, p.shape[-1]).float() for p in floats]
    weights = next((p for p in floats if p.shape == index_SK.shape), None)
    full = next((p for p in floats if p.shape[-1] > index_SK.shape[-1]), None)
    if full is None:
        return Choice(index_SK, weights, None)
    is_share = bool((full >= 0).all()) and bool(((full.sum(-1) - 1).abs() < 1e-3).all())
    scores = full if is_share else full.softmax(-1)
    if weights is None:
        weights = scores.gather(-1, index_SK.clamp_min(0))
    return Choice(index_SK, weights, scores)


def _arrays(config: Any, found: Sequence[Sequence[Choice]]) -> dict[str, Any]:
    """Routes, weights, candidates and scores of all requests, one after the other."""
    routing = getattr(config, "routing", None) or {}
    single = routing.get("kind") == "pregate" and not routing.get("per_layer")
    # Thresholds of their own give layers different choices on one decision.
    depth = 1 if single and not routing.get("threshold") else len(found[0])
    wide = max(c.index.shape[1] for c in found[0])
    routes, weights, candidates, scores = [], [], [], []
    for choices in found:
        cut = choices[:depth]
        routes.append(torch.stack([_widen(c.index, wide, -1) for c in cut], 1))
        if all(c.weights is not None for c in cut):
            weights.append(
                torch.stack([_widen(c.weights, wide, 0) for c in cut if c.weights is not None], 1)
            )
        if all(c.scores is not None for c in cut):
            kept = [
                c.scores.topk(min(2 * wide, c.scores.shape[-1]))
                for c in cut
                if c.scores is not None
            ]
            candidates.append(torch.stack([top.indices for top in kept], 1))
            scores.append(torch.stack([top.values for top in kept], 1))
    whole = len(found)
    return {
        "routes": torch.cat(routes).numpy().astype(np.int16),
        "weights": torch.cat(weights).half().numpy() if len(weights) == whole else None,
        "candidates": (
            torch.cat(candidates).numpy().astype(np.int16) if len(scores) == whole else None
        ),
        "scores": torch.cat(scores).half().numpy() if len(scores) == whole else None,
    }


def _provenance(folder: Path, data: Path, config: Any, recalls: Sequence[float]) -> dict[str, Any]:
    routing = getattr(config, "routing", None) or {}
    return {
        "model_sha256": model_sha256(folder),
        "data": {"file": data.name, "sha256": sha256_files([data])},
        "decides": "pregate" if routing.get("kind") == "pregate" else "layerwise",
        "next_gate_recall": sum(recalls) / len(recalls) if recalls else None,
    }


def _widen(rows: Tensor, wide: int, fill: int) -> Tensor:
    return nn.functional.pad(rows, (0, wide - rows.shape[1]), value=fill)


def _experts(config: Any, found: Sequence[Sequence[Choice]]) -> int:
    """E: as configured, at least as many as were seen."""
    routing = getattr(config, "routing", None)
    if isinstance(routing, dict):
        return int(routing["num_experts"])
    scored = [c.scores.shape[-1] for c in found[0] if c.scores is not None]
    return max([*scored, *(int(c.index.max()) + 1 for row in found for c in row)])
