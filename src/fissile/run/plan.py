"""What a run would do, cost and run into, from recipe, config.json and safetensors headers alone.

No weight is read and torch is not imported: the answer takes well under five seconds for any model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, get_args

from fissile import families
from fissile.config import Recipe, Stage
from fissile.errors import RecipeError, ResourceError, UsageError
from fissile.families.base import Family
from fissile.families.cost import model_cost, router_cost
from fissile.families.sizes import ExpertSizes
from fissile.io.headers import CheckpointHeaders, open_checkpoint_headers
from fissile.io.hub import has_tokenizer
from fissile.run.costs import COSTS, Costs, StageCost
from fissile.run.estimate import Estimator
from fissile.run.machine import available_memory, free_disk, processors
from fissile.run.sizing import (
    Sizes,
    artifact_sizes,
    check_budget,
    planned_config,
    planned_experts,
    planned_shape,
)
from fissile.run.targets import target_problems

_ROUTER_SHARE = 0.02
_FEW_TOKENS = 64 * 2048


@dataclass(frozen=True)
class Plan:
    """A feasible run with its price; `check` says whether this machine can pay it.

    Attributes:
        recipe: name of the recipe.
        source: checkpoint folder.
        family: name of its family.
        parameters: weights of the source.
        bytes_in: tensor bytes of the source.
        sizes: what comes out.
        experts: division of a layer's neurons, None when extraction is off.
        stages: cost of every stage that will run, in order.
        disk: bytes that the run folder grows to.
        available: memory and disk that are free now; None where unknown.
        warnings: what will work otherwise than might be expected.
        out: where the run would write, if given.
    """

    recipe: str
    source: Path
    family: str
    parameters: int
    bytes_in: int
    sizes: Sizes
    experts: ExpertSizes | None
    stages: tuple[StageCost, ...]
    disk: int
    available: dict[str, int | None]
    warnings: tuple[str, ...]
    out: Path | None

    @property
    def largest(self) -> StageCost:
        """The stage with the highest peak memory."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def seconds(self) -> tuple[float, float]:
        """Fast and slow estimate of the whole run."""
        fast, slow = zip(*(stage.seconds for stage in self.stages), strict=True)
        return sum(fast), sum(slow)

    def stage(self, name: str) -> StageCost:
        """Cost of one stage.

        Raises:
            UsageError: the run has no such stage.
        """
        for cost in self.stages:
            if cost.stage == name:
                return cost
        raise UsageError(f"no stage {name!r} in this plan")

    def shortfalls(self) -> list[str]:
        """What this machine lacks, one line each; empty when the run fits."""
        found = []
        memory, disk = self.available["memory"], self.available["disk"]
        short = [s for s in self.stages if memory is not None and s.peak > memory]
        for stage in short:
            need, free = _gigabytes(stage.peak), _gigabytes(memory or 0)
            found.append(f"{stage.stage} needs {need} of memory, {free} are free{_way_out(stage)}")
        if disk is not None and self.disk > disk:
            need, free = _gigabytes(self.disk), _gigabytes(disk)
            found.append(f"the run needs {need} of disk under {self.out}, {free} are free")
        return found

    def check(self) -> None:
        """Refuse a run that will not fit.

        Raises:
            ResourceError: names stage, need, what is free, and a way out.
        """
        if short := self.shortfalls():
            raise ResourceError("; ".join(short))

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able data; bytes and seconds."""
        fast, slow = self.seconds
        return {
            "recipe": self.recipe,
            "source": str(self.source),
            "family": self.family,
            "parameters": self.parameters,
            "bytes_in": self.bytes_in,
            "bytes_out": self.sizes.stored,
            "loaded_bytes": {str(k): v for k, v in self.sizes.loaded.items()},
            "bits_per_weight": {str(k): v for k, v in self.sizes.bits_per_weight.items()},
            "experts": None if self.experts is None else vars(self.experts),
            "peak_memory_bytes": self.largest.peak,
            "peak_stage": self.largest.stage,
            "disk_bytes": self.disk,
            "seconds": [round(fast, 1), round(slow, 1)],
            "available": self.available,
            "fits": not self.shortfalls(),
            "stages": [
                {
                    "stage": cost.stage,
                    "peak_memory_bytes": cost.peak,
                    "memory": dict(cost.memory),
                    "disk_bytes": cost.disk,
                    "seconds": [round(value, 1) for value in cost.seconds],
                }
                for cost in self.stages
            ],
            "warnings": [*self.warnings],
        }

    def lines(self) -> list[str]:
        """The plan for people."""
        size = f"{self.parameters / 1e6:.1f} M parameters, {_gigabytes(self.bytes_in)}"
        found = [f"{self.recipe}: {self.source} ({self.family}, {size})"]
        if self.experts is not None:
            e = self.experts
            found.append(
                f"per layer: {e.shared} shared neurons, {e.num_experts} experts of {e.expert}; "
                f"a token computes {e.active_share:.1%}"
            )
        widths = ", ".join(
            f"{bits}-bit: {self.sizes.bits_per_weight[bits]:.2f} bits a weight, {_gigabytes(size)}"
            for bits, size in self.sizes.loaded.items()
            if bits in self.sizes.bits_per_weight
        )
        found.append(f"artifact: {_gigabytes(self.sizes.stored)}{f' ({widths})' if widths else ''}")
        found.append(f"{'stage':<10} {'memory':>9} {'disk':>9}  time (estimate)")
        for cost in self.stages:
            span = f"{_duration(cost.seconds[0])} to {_duration(cost.seconds[1])}"
            memory, disk = _gigabytes(cost.peak), _gigabytes(cost.disk)
            found.append(f"{cost.stage:<10} {memory:>9} {disk:>9}  {span}")
        fast, slow = self.seconds
        free = {k: "unknown" if v is None else _gigabytes(v) for k, v in self.available.items()}
        found.append(
            f"peak memory {_gigabytes(self.largest.peak)} in {self.largest.stage} "
            f"(free: {free['memory']}), disk {_gigabytes(self.disk)} (free: {free['disk']}), "
            f"{_duration(fast)} to {_duration(slow)}"
        )
        return [*found, *(f"note: {warning}" for warning in self.warnings)]


def make_plan(
    recipe: Recipe, model: Path, out: Path | None = None, *, stop_after: str | None = None
) -> Plan:
    """Work out what a run would do, without reading a weight.

    Args:
        recipe: what is asked for.
        model: checkpoint folder, dense or routed with float weights.
        out: run folder; its disk is checked when given.
        stop_after: last stage of the run.

    Raises:
        UsageError, UnsupportedModel, CorruptCheckpoint: the model cannot be used.
        RecipeError: the recipe does not fit the model; all reasons are in the message.
    """
    return plan_headers(recipe, open_checkpoint_headers(model), out, stop_after=stop_after)


def plan_headers(
    recipe: Recipe,
    headers: CheckpointHeaders,
    out: Path | None = None,
    *,
    stop_after: str | None = None,
    cores: int | None = None,
    costs: Costs = COSTS,
) -> Plan:
    """`make_plan` for headers that were read, or for a model that is not there yet.

    Args:
        recipe: what is asked for.
        headers: of the checkpoint.
        out: run folder; its disk is checked when given.
        stop_after: last stage of the run.
        cores: processors that share the work; by default those of this machine.
        costs: constants of the estimate.

    Raises:
        As `make_plan`.
    """
    family = families.find(headers.config)
    families.check_checkpoint(headers, family)
    problems = list(_contradictions(recipe, headers, family))
    if problems:
        raise RecipeError("; ".join(problems))
    dims = families.dims_of(family, headers.config)
    recipe = _fitted(recipe, headers.config)
    experts = planned_experts(recipe, dims.ffn, recipe.extract.active_share)
    config = planned_config(recipe, headers.config, family, experts)
    if reasons := list(target_problems(recipe, family, config)):
        raise RecipeError("; ".join(reasons))
    sizes = artifact_sizes(recipe, family, config)
    check_budget(recipe.quantize, sizes)
    shape = planned_shape(family, config, experts, sizes, recipe)
    estimator = Estimator(shape, recipe, cores or processors(), costs)
    stages = tuple(estimator.stage(name) for name in _stages(recipe, stop_after))
    free = {"memory": available_memory(), "disk": None if out is None else free_disk(out)}
    return Plan(
        recipe.name,
        headers.folder,
        family.name,
        sum(prod(info.shape) for _, info in headers.tensors.values()),
        headers.total_bytes,
        sizes,
        experts,
        stages,
        sum(cost.disk for cost in stages),
        free,
        tuple(_warnings(recipe, headers, sizes, experts)),
        out,
    )


def _contradictions(recipe: Recipe, headers: CheckpointHeaders, family: Family) -> Iterator[str]:
    config = headers.config
    if config.get("nested") is not None:
        yield f"{headers.folder}: is already quantized; start from its float weights"
    if not recipe.extract.enabled:
        return
    if config.get("routing") is not None:
        yield f"{headers.folder}: is already routed; set extract.enabled=false to quantize it"
        return
    if family.experts is not None:
        yield (
            f"{headers.folder}: {family.name} has experts of its own, only dense models are divided"
            " into experts; set extract.enabled=false to quantize it"
        )
        return
    ffn = families.dims_of(family, config).ffn
    shares = {recipe.extract.active_share}
    if {"random", "ridge", "pregate", "oracle"} & {*recipe.evaluate.controls}:
        shares |= {*recipe.evaluate.shares}
    for share in sorted(shares):
        try:
            planned_experts(recipe, ffn, share)
        except RecipeError as err:
            yield str(err)


def _fitted(recipe: Recipe, config: dict[str, Any]) -> Recipe:
    """The recipe with its contexts cut to what the model was made for, as the stages do."""
    most = config.get("max_position_embeddings")
    if type(most) is not int or most < 1:
        return recipe
    changes = {}
    for name in ("calibrate", "recover", "evaluate"):
        section = getattr(recipe, name)
        changes[name] = section.model_copy(update={"context": min(section.context, most)})
    return recipe.model_copy(update=changes)


def _stages(recipe: Recipe, stop_after: str | None) -> list[Stage]:
    converts = recipe.extract.enabled
    trains = recipe.recover.trains
    wanted = {
        "calibrate": converts,
        "extract": converts,
        "route": converts and recipe.route.kind != "static",
        "recover": converts and (recipe.recover.refit or trains),
        "quantize": recipe.quantize.enabled,
        "tune": recipe.quantize.enabled and recipe.quantize.tune.steps > 0,
    }
    names = [name for name in get_args(Stage) if wanted.get(name, True)]
    every = list(get_args(Stage))
    if stop_after is None:
        return names
    if stop_after not in every:
        raise UsageError(f"stage {stop_after!r} is not one of {', '.join(every)}")
    last = every.index(stop_after)
    kept = [name for name in names if every.index(name) <= last]
    if not kept:
        raise UsageError(f"stop_after {stop_after}: this recipe runs nothing up to there")
    return kept


def _warnings(
    recipe: Recipe, headers: CheckpointHeaders, sizes: Sizes, experts: ExpertSizes | None
) -> Iterator[str]:
    if not has_tokenizer(headers.folder):
        yield f"{headers.folder} has no tokenizer; text cannot be read without one"
    if not recipe.extract.enabled and not recipe.quantize.enabled:
        yield "extract and quantize are both off: the artifact holds the weights as they are"
    if recipe.quantize.enabled and recipe.export.default_bits not in recipe.quantize.widths:
        yield (
            f"export.default_bits {recipe.export.default_bits} is not one of quantize.widths; "
            f"{recipe.quantize.widths[-1]} bits are served by default"
        )
    if experts is not None and abs(experts.active_share - recipe.extract.active_share) > 0.02:
        yield (
            f"active share becomes {experts.active_share:.3f} instead of "
            f"{recipe.extract.active_share:g}, since experts are multiples of "
            f"{recipe.extract.multiple} neurons (extract.multiple)"
        )
    if experts is not None and experts.num_experts:
        yield from _router_warnings(recipe, headers, experts)
    if recipe.extract.enabled and recipe.calibrate.tokens < _FEW_TOKENS:
        yield f"{recipe.calibrate.tokens} calibration tokens; {_FEW_TOKENS} are advised"
    if recipe.quantize.enabled and experts is not None and experts.num_experts:
        seen = recipe.quantize.tokens * recipe.extract.top_k // experts.num_experts
        if seen < headers.config["hidden_size"]:
            yield (
                f"an expert sees about {seen} tokens for {headers.config['hidden_size']} inputs "
                "while it is quantized; raise quantize.tokens"
            )
    for what, found in (("float", sizes.kept_float), ("small", sizes.small_groups)):
        if not found:
            continue
        name, value = next(iter(found.items()))
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        if what == "float":
            yield f"{name}{more} stay in floating point: {value} inputs are no multiple of 32"
        else:
            yield f"{name}{more} get groups of {value} instead of {recipe.quantize.group_size}"


def _router_warnings(
    recipe: Recipe, headers: CheckpointHeaders, experts: ExpertSizes
) -> Iterator[str]:
    """A router is small beside the model, or it is not worth its place."""
    config = planned_config(recipe, headers.config, families.find(headers.config), experts)
    whole, router = model_cost(config), router_cost(config)
    shares = {
        "parameters": router.parameters / max(1, whole.parameters),
        "compute": router.macs / max(1.0, whole.macs),
    }
    for what, share in shares.items():
        if share > _ROUTER_SHARE:
            yield (
                f"the router takes {100 * share:.1f} % of the model's {what}; "
                f"{100 * _ROUTER_SHARE:g} % are advised (route.inner_dim, route.attention_dim)"
            )


def _way_out(stage: StageCost) -> str:
    if stage.stage == "tune":
        return " (set quantize.tune.steps=0 to leave it out)"
    if "dense model" in stage.memory:
        return " (set quantize.generated=0 to train on the given text alone)"
    if "student and teacher" in stage.memory:
        return " (set recover.method=none to re-fit only)"
    if stage.memory.get("activations", 0) > stage.peak / 3:
        return " (lower calibrate.batch_tokens)"
    if stage.memory.get("stream", 0) > stage.peak / 3:
        return f" (lower {'quantize' if stage.stage == 'quantize' else 'calibrate'}.tokens)"
    return ""


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
