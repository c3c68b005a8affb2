"""`fissile bench widths`: the width of every token's expert, chosen four ways, at equal bits.

Uniform widths, a width per expert (the static plan), a training-free rule and trained bit routers:
`fissile.quant.token_widths`. The routed experts alone change width; the rest of the model is served
at the widest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fissile.config import Strict, Tune
from fissile.errors import UsageError
from fissile.refactor.training import Progress, TrainSettings, train
from fissile.run.bench import Bench

if TYPE_CHECKING:
    from torch import Tensor

    from fissile.eval.perplexity import HeldOut
    from fissile.models.source import CheckpointSource
    from fissile.quant.token_widths import BitRouter, Pairs, Rule, WidthExperts

_EXPERTS = "mlp.experts"


class WidthsBench(Strict):
    """Artifact, text and mean bits; seconds to minutes for a small model."""

    models: tuple[str, ...] = Field((), description="an artifact with routed experts")
    calibration: str | None = Field(None, description="JSONL; required")
    held_out: str | None = Field(None, description="JSONL; required")
    mean_bits: tuple[float, ...] = Field((2.5, 3.0), description="over tokens and their experts")
    tokens: int = Field(16384, gt=0, description="that bit routers are trained on")
    seen_tokens: int = Field(4096, gt=0, description="that plans, rules and prices are fitted to")
    held_out_tokens: int = Field(16384, gt=0, description="over all domains, divided evenly")
    context: int = Field(512, ge=8, description="tokens of a window")
    steps: int = Field(60, ge=0, description="of training; 0: no bit routers")
    learning_rate: float = Field(1e-2, gt=0)
    bit_penalty: float = Field(0.02, ge=0, description="nats per expected bit, mean over layers")
    capacity: tuple[float, ...] | None = Field(
        None, description="largest share of each width in training, e.g. [0.3, 0.4, 0.3]"
    )
    seed: int = 0


def run(settings: WidthsBench, progress: Progress) -> dict[str, Any]:
    """Token-dependent widths of experts beside a width per expert, ln ppl over the widest's.

    Args:
        settings: see there.
        progress: called as (stage, done, total, detail).

    Returns:
        "rows" (method, mean bits on held-out text, gap in nats per token: mean over domains of ln
        ppl - ln ppl at the widest width), "training" of the bit routers, and "conditions".

    Raises:
        UsageError: no artifact with routed experts at several widths, no text, or capacities that
            do not fit the widths.
    """
    from fissile.eval.documents import read_documents, sha256_files
    from fissile.eval.perplexity import prepare
    from fissile.eval.result import machine, model_sha256, versions
    from fissile.eval.tokens import load_tokenizer
    from fissile.eval.windows import sample_windows

    source, widths = _source(settings)
    assert settings.calibration is not None
    assert settings.held_out is not None
    tokenizer, context = load_tokenizer(source.folder), settings.context
    context = min(context, source.config.max_position_embeddings)
    documents = read_documents(Path(settings.calibration))
    ids_NS, _, _ = sample_windows(
        documents, tokenizer, settings.tokens, context, settings.seed, config=source.config
    )
    held_out = prepare(
        source.config,
        tokenizer,
        read_documents(Path(settings.held_out)),
        context=context,
        tokens=settings.held_out_tokens,
        seed=settings.seed,
    )
    study = _Study(settings, source, widths, ids_NS.long(), held_out, progress)
    rows = study.rows()
    texts = [Path(settings.calibration), Path(settings.held_out)]
    told = settings.model_dump(exclude={"models", "calibration", "held_out"})
    about = {"model_sha256": model_sha256(source.folder), "text_sha256": sha256_files(texts)}
    conditions = {**about, **told, "versions": versions(), **machine()}
    return {"rows": rows, "training": study.training, "conditions": conditions}


def _source(settings: WidthsBench) -> tuple[CheckpointSource, tuple[int, ...]]:
    """The artifact at its widest width, and its widths; all refusals."""
    from fissile.io.headers import checkpoint_folder
    from fissile.models.source import CheckpointSource

    if len(settings.models) != 1 or not (settings.calibration and settings.held_out):
        raise UsageError(
            "widths needs an artifact and text: fissile bench widths DIR --set calibration=FILE"
            " --set held_out=FILE"
        )
    folder = checkpoint_folder(Path(settings.models[0]))
    nested = CheckpointSource(folder).nested
    stacks = [name for name in (nested or {}).get("modules", ()) if f".{_EXPERTS}." in name]
    if nested is None or not stacks:
        raise UsageError(f"{folder}: holds no routed experts with bit-nested weights")
    widths = tuple(nested["widths"])
    if not all(widths[0] <= bits <= widths[-1] for bits in settings.mean_bits):
        raise UsageError(f"mean_bits {list(settings.mean_bits)}: stored are {list(widths)}")
    if settings.capacity is not None and len(settings.capacity) != len(widths):
        raise UsageError(f"capacity {list(settings.capacity)}: one share for each of {widths}")
    return CheckpointSource(folder, widths[-1]), widths


class _Study:
    """One model whose experts' rules are exchanged between measurements."""

    def __init__(
        self,
        settings: WidthsBench,
        source: CheckpointSource,
        widths: tuple[int, ...],
        ids_NS: Tensor,
        held_out: HeldOut,
        progress: Progress,
    ) -> None:
        from fissile.models.source import load_source

        self.settings, self.widths, self.ids_NS = settings, widths, ids_NS
        self.held_out, self.progress = held_out, progress
        self.training: dict[str, Any] = {}
        self.model: Any = load_source(source).requires_grad_(False).eval()
        self.experts = list(_install(self.model, source, widths))

    def rows(self) -> list[dict[str, Any]]:
        """Every method at every mean number of bits, measured on held-out text."""
        import torch

        from fissile.run.peers import gap_of

        makers = self._makers()
        plan: list[tuple[str, float]] = [("uniform", bits) for bits in reversed(self.widths)]
        for bits in self.settings.mean_bits:
            plan += [(name, bits) for name in makers if name != "uniform"]
        rows: list[dict[str, Any]] = []
        widest: dict[str, Any] = {}
        for done, (name, wanted) in enumerate(plan, start=1):
            measured, used_W = self._measure(makers[name](wanted))
            widest = widest or measured
            share_W = used_W / used_W.sum()
            row = {"method": name, "wanted_bits": wanted, "gap": gap_of(measured, widest)}
            row["bits"] = float(share_W @ torch.tensor(self.widths, dtype=torch.float64))
            row["share"] = {bits: float(x) for bits, x in zip(self.widths, share_W, strict=True)}
            rows.append(row | {"ppl_by_domain": measured})
            self.progress("widths", done, len(plan), f"{name} {wanted:g} bits")
        return rows

    def _makers(self) -> dict[str, Callable[[float], Sequence[Rule]]]:
        """Method to what gives all layers their rules for a mean number of bits."""
        import torch

        from fissile.quant.token_widths import (
            ErrorBound,
            FixedWidths,
            set_bound,
            set_price,
            static_plan,
        )

        count, seed = self.experts[0].num_experts, self.settings.seed
        layers = self._seen()
        bounds = [ErrorBound(e, p, seed) for e, p in zip(self.experts, layers, strict=True)]
        makers: dict[str, Callable[[float], Sequence[Rule]]] = {
            "uniform": lambda bits: [
                FixedWidths(torch.full((count,), self.widths.index(int(bits))))
                for _ in self.experts
            ],
            "static plan": lambda bits: static_plan(layers, self.widths, count, bits),
            "training-free rule": lambda bits: set_bound(bounds, layers, bits),
        }
        if self.settings.steps:
            routers = self._trained()
            makers["bit routers"] = lambda bits: set_price(routers, layers, bits)
        return makers

    def _measure(self, rules: Sequence[Rule]) -> tuple[dict[str, Any], Tensor]:
        """Perplexity by domain with these rules, and how often each width was used."""
        from fissile.eval.perplexity import measure

        for experts, rule in zip(self.experts, rules, strict=True):
            experts.follow(rule)
            experts.used_W.zero_()
        score = measure(self.model, self.held_out).score()
        used = [experts.used_W.double() for experts in self.experts]
        return score["by_domain"], sum(used[1:], used[0])

    def _seen(self) -> list[Pairs]:
        """What every layer's experts see of calibration text at the widest width."""
        import torch

        from fissile.quant.token_widths import joined

        seen: list[list[Pairs]] = [[] for _ in self.experts]
        for experts, place in zip(self.experts, seen, strict=True):
            experts.follow(None)
            experts.seen = place
        count = max(1, self.settings.seen_tokens // self.ids_NS.shape[1])
        # Windows lie domain by domain.
        chosen = torch.linspace(0, len(self.ids_NS) - 1, min(count, len(self.ids_NS))).long()
        with torch.no_grad():
            for window in self.ids_NS[chosen]:
                self.model(input_ids=window[None], use_cache=False)
        for experts in self.experts:
            experts.seen = None
        return [joined(place) for place in seen]

    def _trained(self) -> list[BitRouter]:
        """Bit routers, trained towards the predictions of the widest width.

        The loss is D2MoE's (arXiv 2504.15299, section 4.2): distillation of the logits plus the
        expected number of bits, mean over tokens and layers.
        """
        import torch

        from fissile.run.tuning import float_lessons

        settings, routers = self.settings, self._routers()
        tune = Tune(steps=settings.steps, context=settings.context)

        def widest(**inputs: Any) -> Any:
            for experts in self.experts:
                experts.follow(None)
            with torch.no_grad():
                found = self.model(**inputs)
            for experts, router in zip(self.experts, routers, strict=True):
                experts.follow(router)
            return found

        fit, judge = float_lessons(tune, self.ids_NS, settings.seed, widest)
        bits = torch.tensor(self.widths, dtype=torch.float32)
        widest(input_ids=self.ids_NS[:1], use_cache=False)

        def loss_of(number: int) -> Tensor:
            loss = fit.loss(self.model, fit.batch(number))
            shares = [experts.share_W for experts in self.experts]
            expected = sum((share @ bits for share in shares if share is not None), torch.zeros(()))
            return loss + settings.bit_penalty * expected / len(self.experts)

        before = judge.judge(self.model)
        moving = {f"{i}.{k}": p for i, r in enumerate(routers) for k, p in r.named_parameters()}
        curve = train(
            moving,
            loss_of,
            TrainSettings(settings.steps, settings.learning_rate),
            progress=self.progress,
            stage="bit routers",
        )
        for router in routers:
            router.eval()
        after = judge.judge(self.model)
        self.training = {
            "steps": len(curve.losses),
            "seconds": round(curve.seconds, 1),
            "divergence": {"before": before, "after": after},
        }
        return routers

    def _routers(self) -> list[BitRouter]:
        import torch

        from fissile.quant.token_widths import BitRouter, Capacity

        routers = []
        for i, experts in enumerate(self.experts):
            width = experts.first(0).shape[-1]
            router = BitRouter(experts.num_experts, width, self.widths)
            if self.settings.capacity is not None:
                generator = torch.Generator().manual_seed(self.settings.seed * 1000 + i)
                router.capacity = Capacity(self.settings.capacity, generator)
            routers.append(router)
        return routers


def _install(model: Any, source: CheckpointSource, widths: Sequence[int]) -> Iterator[WidthExperts]:
    """Put experts of all widths in the place of every layer's."""
    from fissile.models.source import CheckpointSource
    from fissile.quant.token_widths import WidthExperts

    sources = {bits: CheckpointSource(source.folder, bits) for bits in widths}
    for i, layer in enumerate(model.model.layers):
        stacks = {}
        for bits, own in sources.items():
            state = own.layer_state(i)
            stacks[bits] = (state[f"{_EXPERTS}.gate_up_proj"], state[f"{_EXPERTS}.down_proj"])
        layer.mlp.experts = WidthExperts(stacks, layer.mlp.experts.act_fn)
        yield layer.mlp.experts


BENCH = Bench(WidthsBench, run)
