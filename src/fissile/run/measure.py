"""The evaluate stage: the converted model, its widths, and the controls they are read against.

Every measurement is kept under its own key, so an interrupted evaluation goes on with the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from fissile import models
from fissile.config import Control
from fissile.eval.documents import read_documents
from fissile.eval.perplexity import HeldOut, measure, prepare
from fissile.eval.tokens import load_tokenizer
from fissile.families.artifact import float_shapes
from fissile.kernels.layout import loaded_bytes
from fissile.models.source import load_source
from fissile.quant.layers import QuantizedLayer, final_layer, read_layer
from fissile.refactor.controls import fixed_choice, install_control
from fissile.refactor.convert import ConvertedSource
from fissile.refactor.recover import train_to_teacher
from fissile.refactor.refit import RefitLayer
from fissile.run.active import counting_active
from fissile.run.answers import Answers
from fissile.run.context import RunContext
from fissile.run.nesting import decoded
from fissile.run.solving import Job
from fissile.run.stages import Stages
from fissile.run.systems import OVERRIDES, UNRECOVERED, as_control, router_name
from fissile.run.together import earlier_norms

_DOMAIN_EXPERT = "readme_expert"


class Measurements:
    """Scores of one run, by key."""

    def __init__(self, context: RunContext, stages: Stages) -> None:
        self.context, self.stages, self.recipe = context, stages, context.recipe
        self.store = context.journal.store("evaluate")
        self.plan = list(self._plan())
        self._held_out: HeldOut | None = None
        self.answers = Answers(context)

    def run(self) -> dict[str, Any]:
        """Make every measurement that is missing; return all of them."""
        scores: dict[str, Any] = {}
        for done, (key, work) in enumerate(self.plan, start=1):
            if not self.store.has(key):
                self.store.save(key, {"seen": torch.tensor(1)}, work())
            scores[key] = self.store.load(key)[1]
            self.context.tick("evaluate", done, len(self.plan), f"{key} {scores[key]['ppl']:.2f}")
        return self._assemble(scores)

    def _plan(self) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        yield "dense", lambda: self._served(load_source(self.context.source))
        if self.recipe.extract.enabled:
            for share in self.recipe.evaluate.shares:
                for name in self.recipe.evaluate.controls:
                    for recovery in self._recoveries(name):
                        key = f"{name}.{share:g}.{recovery}"
                        yield key, self._bind(self._control, name, share, recovery)
                if "readme" in self.recipe.evaluate.controls:
                    for expert in range(len(self.stages.windows.domains)):
                        work = self._bind(self._domain_expert, share, expert)
                        yield f"{_DOMAIN_EXPERT}.{share:g}.{expert}", work
            yield "converted", lambda: self._served(load_source(self.stages.recovered))
        if self.recipe.quantize.enabled:
            for bits in self.recipe.quantize.widths:
                yield f"nested.{bits}", self._bind(self._artifact, bits)
                for kind in self.recipe.evaluate.baselines:
                    yield f"{kind}.{bits}", self._bind(self._baseline, kind, bits)
                if self.recipe.extract.enabled:
                    yield f"quantized_dense.{bits}", self._bind(self._quantized_dense, bits)

    @staticmethod
    def _bind(work: Callable[..., dict[str, Any]], *args: Any) -> Callable[[], dict[str, Any]]:
        return lambda: work(*args)

    def _recoveries(self, name: Control) -> list[str]:
        found = ["none"]
        if name in UNRECOVERED:
            return found
        if self.recipe.recover.refit:
            found.append("refit")
        if self.recipe.evaluate.control_recover_steps and self.recipe.recover.method != "none":
            found.append("trained")
        return found

    @property
    def held_out(self) -> HeldOut:
        """Held-out windows, the same for every model of the run."""
        if self._held_out is None:
            settings = self.recipe.evaluate
            source = self.context.source
            self._held_out = prepare(
                source.config,
                load_tokenizer(source.folder),
                read_documents(self.context.data("heldout.jsonl", settings.data)),
                context=min(settings.context, source.config.max_position_embeddings),
                tokens=settings.tokens,
                seed=self.recipe.seed,
            )
        return self._held_out

    def _score(self, model: Any) -> dict[str, Any]:
        batch = self.recipe.evaluate.batch_tokens
        result = measure(model.eval(), self.held_out, batch_tokens=batch)
        return result.score() | {"n_tokens": result.n_tokens}

    def _served(self, model: Any) -> dict[str, Any]:
        """Score the dense model or what the artifact serves: perplexity, and answers to items."""
        return self._score(model) | self.answers.score(model.eval())

    # -- controls --------------------------------------------------------------------------------

    def _control(self, name: Control, share: float, recovery: str) -> dict[str, Any]:
        source = self._control_source(name, share)
        control = OVERRIDES.get(name)

        def prepare_layer(layer: Any, index: int) -> None:
            if control is not None:
                install_control(layer, control, self.recipe.seed * 1000 + index)

        if recovery != "none" and self.recipe.recover.refit and min(source.routing["shared_sizes"]):
            # The recipe's own model is among the controls: its re-fit is there already.
            own = (name, share) == (router_name(self.recipe), self.recipe.extract.active_share)
            refits: list[RefitLayer] = (
                self.stages.refits
                if own
                else self.stages.refit(source, f"controls/{name}.{share:g}.refit", prepare_layer)
            )
            source = source.refitted(refits)
        model = load_source(source)
        for i, layer in enumerate(model.model.layers):
            prepare_layer(layer, i)
        if recovery == "trained":
            steps = self.recipe.evaluate.control_recover_steps
            settings = self.recipe.recover.limited(steps)
            model = train_to_teacher(
                model,
                load_source(self.context.source),
                self.stages.training_windows(),
                settings,
                seed=self.recipe.seed,
                checkpoint=self.context.journal.store("controls").path(
                    f"{name}.{share:g}.training"
                ),
                targets=self.stages.targets,
                norms=earlier_norms(self.recipe),
                progress=self.context.tick,
            ).model
        sizes, width = source.routing["shared_sizes"], self.context.source.config.intermediate_size
        with counting_active(model) as active:
            score = self._score(model)
        return score | {"measured_share": active.share(sum(sizes), len(sizes) * width)}

    def _domain_expert(self, share: float, expert: int) -> dict[str, Any]:
        """Read-ME's model with every token in one expert (section 1 of its tests)."""
        model: Any = load_source(self._control_source("readme", share))
        for layer in model.model.layers:
            layer.mlp.override = fixed_choice(expert)
        return self._score(model)

    def _control_source(self, name: Control, share: float) -> ConvertedSource:
        recipe = as_control(self.recipe, name, share)
        if name in ("static", "static_uniform"):
            return self.stages.static_source(recipe)
        return self.stages.routed_source(recipe, self.stages.experts_of(recipe))

    # -- widths ----------------------------------------------------------------------------------

    def _artifact(self, bits: int) -> dict[str, Any]:
        return self._served(models.load(self.context.out / "model", bits=bits))

    def _baseline(self, kind: Any, bits: int) -> dict[str, Any]:
        job = Job(f"controls/{kind}.{bits}", baseline=kind, bits=bits)
        layers = self._solved(job, tune=kind == "dedicated")
        return self._score(load_source(decoded(self.stages.recovered, layers)))

    def _solved(self, job: Job, *, tune: bool) -> Iterator[QuantizedLayer]:
        """Layers of another quantized model, tuned where the recipe's own are."""
        layers = self.stages.solved(job)
        if not (tune and self.recipe.quantize.tune.steps):
            yield from layers
            return
        count = sum(1 for _ in layers)
        self.stages.tuned(self.stages.source_of(job), job.unit)
        for i in range(count):
            yield final_layer(self.context.journal.store(job.unit), i)

    def _quantized_dense(self, bits: int) -> dict[str, Any]:
        """The control of the whole idea: the dense model, merely quantized."""
        layers = self._solved(Job("controls/quantized_dense", dense=True), tune=True)
        return self._score(load_source(decoded(self.context.source, layers, bits)))

    # -- assembling ------------------------------------------------------------------------------

    def _own(self) -> dict[str, Any]:
        """What the recipe's own model is among the variants."""
        recover = self.recipe.recover
        done = "trained" if recover.trains else "refit" if recover.refit else "none"
        share = self.recipe.extract.active_share
        return {"name": router_name(self.recipe), "share": share, "recovery": done, "bits": None}

    @property
    def _own_is_control(self) -> bool:
        """Whether a control with less training or none is the recipe's own model."""
        own, evaluate = self._own(), self.recipe.evaluate
        controls, shares = evaluate.controls, evaluate.shares
        return own["name"] in controls and own["share"] in shares and not self.recipe.recover.trains

    def _assemble(self, scores: dict[str, Any]) -> dict[str, Any]:
        variants, widths = [], []
        for key, score in scores.items():
            name, _, rest = key.partition(".")
            if key == "dense" or name == _DOMAIN_EXPERT:
                continue
            if name in self.recipe.evaluate.controls:
                share, _, recovery = rest.rpartition(".")
                row = {"name": name, "share": float(share), "recovery": recovery, "bits": None}
                variants.append(row | score)
            elif key == "converted":
                if not self._own_is_control:
                    variants.append(self._own() | score)
                widths.append({"method": "float", "bits": None, **self._size(None)} | score)
            else:
                of = "dense" if name == "quantized_dense" else "converted"
                method = "nested" if of == "dense" else name
                tied = method == "nested" and self.recipe.quantize.tied
                size = self._size(int(rest), of, tied)
                widths.append({"method": method, "bits": int(rest), "of": of, **size} | score)
        return {
            "dense": scores["dense"],
            "variants": variants,
            "widths": widths,
            "routers": self._routers(),
            "domain_matrices": self._domain_matrices(scores),
        }

    def _domain_matrices(self, scores: dict[str, Any]) -> list[dict[str, Any]]:
        """Perplexity of every domain in every domain's expert, per active share."""
        domains, found = self.stages.windows.domains, []
        for share in self.recipe.evaluate.shares:
            keys = [f"{_DOMAIN_EXPERT}.{share:g}.{expert}" for expert in range(len(domains))]
            if keys[0] in scores:
                ppl = [[scores[key]["by_domain"].get(name) for name in domains] for key in keys]
                found.append({"share": share, "domains": list(domains), "ppl": ppl})
        return found

    def _routers(self) -> list[dict[str, Any]]:
        """How near every router that was measured comes to the oracle."""
        rows = []
        for share in self.recipe.evaluate.shares if self.recipe.extract.enabled else ():
            for name in self.recipe.evaluate.controls:
                recipe = as_control(self.recipe, name, share)
                if name in OVERRIDES or name.startswith("static") or recipe.route.kind == "static":
                    continue
                quality = self.stages.experts_of(recipe).report.get("quality")
                if quality is not None:
                    rows.append(self.stages.router_row(recipe, quality))
        return rows

    def _dense_fields(self, group_size: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Configuration and nested entry that `quantized_dense` would be stored with."""
        store = self.context.journal.store("controls/quantized_dense")
        groups: dict[str, int] = {}
        for i in range(self.context.source.config.num_base_layers):
            own = read_layer(store, i).groups
            groups |= {f"model.layers.{i}.{name}": group for name, group in own.items()}
        nested = {"modules": list(groups), "group_size": group_size, "groups": groups}
        return self.context.source.config.to_dict(), nested

    def _size(self, bits: int | None, of: str = "converted", tied: bool = False) -> dict[str, Any]:
        """Bytes that a load holds, and bits per weight of what was quantized, floats included."""
        fields = models.load_config(self.context.out / "model").to_dict()
        nested = fields["nested"] or {"modules": [], "group_size": 1, "groups": {}}
        if of == "dense":
            fields, nested = self._dense_fields(nested["group_size"])
        modules, total, packed, weights = set(nested["modules"]), 0, 0, 0
        for name, shape in float_shapes(self.context.source.family, fields):
            count = int(torch.tensor(shape).prod())
            if name not in modules or bits is None:
                total += 2 * count
                continue
            group = nested["groups"].get(name, nested["group_size"])
            packed += loaded_bytes(shape, group, bits, self.recipe.quantize.widths, tied)
            weights += count
        per_weight = 8 * packed / weights if weights else 16.0
        return {"bytes": total + packed, "bits_per_weight": per_weight}
