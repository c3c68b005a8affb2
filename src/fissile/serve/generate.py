"""Generate text with an artifact whose experts do not fit in memory, and say what it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fissile.errors import ResourceError, UsageError
from fissile.eval.tokens import encode, load_tokenizer, start_token
from fissile.io.headers import CheckpointHeaders, open_checkpoint_headers
from fissile.models.configuration_fissile import FissileConfig
from fissile.models.modeling_fissile import FissileForCausalLM
from fissile.serve.batching import Limits, make_scheduler
from fissile.serve.engine import Engine
from fissile.serve.experts import attach, load_without_experts
from fissile.serve.options import Prompt, Sampling, ServeOptions
from fissile.serve.policies import make_policy
from fissile.serve.reader import WEIGHTS, ExpertFiles
from fissile.serve.requests import PassRecord, Request, Token
from fissile.serve.store import ExpertStore
from fissile.serve.widths import BudgetWidths, PlannedWidths, Widths

Stream = Callable[[int, str, bool], None]
"""Called with (prompt, new text, whether it is the prompt's last)."""


@dataclass(frozen=True)
class Answer:
    """What followed a prompt."""

    text: str
    tokens: list[int]


@dataclass
class Generation:
    """Answers, and what it took to give them.

    Args:
        answers: in the order of the prompts.
        report: of `fissile generate --json`.
    """

    answers: list[Answer]
    report: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report with the answers."""
        return {"answers": [asdict(answer) for answer in self.answers], **self.report}


def open_store(folder: Path, options: ServeOptions) -> ExpertStore:
    """The experts of an artifact, to be closed by the caller.

    Raises:
        UsageError: a width or budget that cannot be served, an unknown policy.
        UnsupportedModel: no experts that can be read apart.
        ResourceError: not enough memory for one expert, or no such device.
        CorruptCheckpoint: the artifact cannot be read as one.
    """
    headers = open_checkpoint_headers(folder)
    nested = headers.config.get("nested")
    policy, device = make_policy(options.policy), _device(options.device)
    if options.budget is not None and options.bits is not None:
        raise UsageError("bits serve all experts alike, a budget does not: give one of them")
    plan_LE = _plan(headers, nested) if options.bits is None and options.budget is None else None
    if options.budget is not None:
        if nested is None:
            raise UsageError(f"{headers.folder}: has float weights; a budget needs nested ones")
        chosen = tuple(nested["widths"])
    elif plan_LE is not None:
        chosen = tuple(sorted({bits for bits_E in plan_LE for bits in bits_E}))
    else:
        chosen = _width(headers, options.bits)
    files = ExpertFiles(headers, chosen, keep_pages=options.keep_pages)
    try:
        widths: Widths
        if options.budget is not None:
            budget = options.budget.bytes_for(files)
            widths = BudgetWidths(files, chosen, budget)
        elif plan_LE is not None:
            widths = PlannedWidths(files, plan_LE)
            budget = widths.total_bytes()
        else:
            budget, widths = files.total_bytes(), Widths(files, chosen[0] if chosen else None)
        memory = min(budget if options.memory is None else options.memory, files.total_bytes())
        return ExpertStore(
            files,
            memory,
            policy,
            widths,
            device=device,
            prefetch=options.prefetch,
            readers=options.readers,
            order=options.order,
        )
    except BaseException:
        files.close()
        raise


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device {name!r} is none that torch knows") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {name!r}: experts are served on cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ResourceError(f"device {name!r}: torch finds {torch.cuda.device_count()} GPUs")
    return device


def _width(headers: CheckpointHeaders, bits: int | None) -> tuple[int, ...]:
    """The one width of all experts; none for floats."""
    nested, stored = headers.config.get("nested"), headers.config.get("bits")
    if bits is None and nested is not None:
        bits = stored or nested["widths"][-1]
    return () if bits is None else (bits,)


def _plan(headers: CheckpointHeaders, nested: Mapping[str, Any] | None) -> list[list[int]] | None:
    """Width of every expert of every layer, where the artifact gives its weights widths.

    Raises:
        UsageError: an expert's two weights differ in width, and it is read as a whole.
    """
    if nested is None or headers.config.get("bits") is not None or not nested.get("mixed"):
        return None
    config = FissileConfig.from_dict(headers.config)
    found: list[list[int]] = []
    for layer in range(config.num_base_layers):
        names = [f"model.layers.{layer}.mlp.experts.{weight}" for weight in WEIGHTS]
        if any(name not in nested["modules"] for name in names):
            return None  # what cannot be read apart is said where it is read
        widths, other = (config.widths_of(name) for name in names)
        if widths != other:
            raise UsageError(
                f"{headers.folder}: experts of layer {layer} have gate and up rows of another "
                "width than their down projections and cannot be read whole; give bits or a budget"
            )
        count = config.num_experts
        found.append([widths] * count if isinstance(widths, int) else list(widths))
    return found


@contextmanager
def serving(
    folder: Path, options: ServeOptions
) -> Iterator[tuple[FissileForCausalLM, ExpertStore]]:
    """A model whose experts come from a store; threads and files end with the block.

    Raises:
        As `open_store`.
    """
    store = open_store(folder, options)
    try:
        model = load_without_experts(folder, options.bits)
        store.files.drop_pages()
        yield attach(model.to(options.device), store), store
    finally:
        store.close()


def generate(
    folder: Path,
    prompts: Sequence[Prompt],
    options: ServeOptions,
    sampling: Sampling,
    *,
    stream: Stream | None = None,
    record: Callable[[PassRecord], None] | None = None,
) -> Generation:
    """Continue prompts.

    Args:
        folder: an artifact or a run folder.
        prompts: any number; what does not fit in a pass waits.
        options: how it is served.
        sampling: how tokens are chosen.
        stream: called with text as soon as it is known.
        record: called with every pass.

    Raises:
        UsageError: a prompt that is too long.
        CorruptCheckpoint: the artifact was changed while it was served; names expert and plane.
        And as `open_store`.
    """
    folder = open_checkpoint_headers(folder).folder
    tokenizer, scheduler = load_tokenizer(folder), make_scheduler(options.scheduler)
    passes: list[PassRecord] = []

    def keep(passed: PassRecord) -> None:
        passes.append(replace(passed, rows=[]))
        if record is not None:
            record(passed)

    with serving(folder, options) as (model, store):
        requests = _requests(tokenizer, model.config, prompts)
        engine = Engine(
            model,
            store,
            scheduler,
            Limits(options.batch_tokens, options.batch_requests, options.max_wait),
            horizon=options.horizon,
            record=keep,
            pick=sampling.picker(),
        )
        begin = time.perf_counter()
        tokens = _answer(engine, requests, tokenizer, stream)
        seconds = time.perf_counter() - begin
        report = _report(store, passes, seconds)
        report |= {"longest_wait_passes": max(engine.waited.values(), default=0)}
    generated = sum(map(len, tokens))
    counts = {
        "prompts": len(prompts),
        "prompt_tokens": sum(len(request.prompt) for request in requests),
        "generated_tokens": generated,
        "seconds": seconds,
        "tokens_per_second": generated / seconds,
    }
    report = {**counts, **report, "conditions": _conditions(options)}
    return Generation([Answer(tokenizer.decode(ids), ids) for ids in tokens], report)


def _conditions(options: ServeOptions) -> dict[str, Any]:
    return {
        "policy": options.policy,
        "prefetch": options.prefetch,
        "scheduler": options.scheduler,
        "order": options.order,
        "page_cache": "kept" if options.keep_pages else "dropped",
        "device": options.device,
        "threads": torch.get_num_threads(),
    }


def _requests(tokenizer: Any, config: Any, prompts: Sequence[Prompt]) -> list[Request]:
    start = start_token(tokenizer, config)
    end = config.eos_token_id
    stop = frozenset(() if end is None else [end] if isinstance(end, int) else end)
    texts = encode(tokenizer, [prompt.text for prompt in prompts])
    return [
        Request(ident, (start, *ids), prompt.tokens, stop)
        for ident, (ids, prompt) in enumerate(zip(texts, prompts, strict=True))
    ]


def _answer(
    engine: Engine, requests: Sequence[Request], tokenizer: Any, stream: Stream | None
) -> list[list[int]]:
    """Run the engine to the end; token ids of every request."""
    answers: list[list[int]] = [[] for _ in requests]
    shown = [0] * len(requests)

    def show(token: Token) -> None:
        ids = answers[token.request]
        text = tokenizer.decode(ids)
        # Bytes of a character may be spread over tokens: wait for the rest of it.
        if stream is not None and (token.last or not text.endswith("\ufffd")):
            stream(token.request, text[shown[token.request] :], token.last)
            shown[token.request] = len(text)

    for token in engine.run(requests):
        if token.token is not None:
            answers[token.request].append(token.token)
        show(token)
    return answers


def _report(store: ExpertStore, passes: Sequence[PassRecord], seconds: float) -> dict[str, Any]:
    stats, files, widths = store.stats(), store.files, store.widths
    computed = sum(passed.tokens for passed in passes)
    places = [(i, e) for i in range(files.layers) for e in range(files.num_experts)]
    bits = [widths.bits(*place) for place in places]
    known = [passed.unique_experts for passed in passes if passed.needs]
    return {
        "computed_tokens": computed,
        "passes": len(passes),
        "unique_experts": sum(known) / len(known) if known else None,
        "mean_bits": None if None in bits else sum(b or 0 for b in bits) / len(bits),
        "expert_bytes": sum(
            files.size((*place, plane))
            for place in places
            for plane in range(widths.planes(*place))
        ),
        "memory_bytes": stats.budget_bytes,
        "peak_bytes": stats.peak_bytes,
        "hit_rate": stats.hit_rate,
        "bytes_read": stats.bytes_read,
        "bytes_read_per_token": stats.bytes_read / max(computed, 1),
        "reads": stats.reads,
        "evictions": stats.evictions,
        "stalls": stats.waits,
        "stall_seconds": stats.stall_seconds,
        "stall_share": stats.stall_seconds / seconds,
    }
