"""Recipes: strict, frozen models of all a run can be told. Defaults live here and nowhere else."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from fissile.config_quantize import BlockStage as BlockStage
from fissile.config_quantize import Effort as Effort
from fissile.config_quantize import Quantize as Quantize
from fissile.config_quantize import Strict as Strict
from fissile.config_quantize import Tune as Tune
from fissile.config_quantize import Width as Width

Share = Annotated[float, Field(gt=0, le=1)]
Control = Literal[
    "static",
    "static_uniform",
    "random",
    "ridge",
    "mean_gate",
    "spectral",
    "dynamic",
    "pregate",
    "pregate_dynamic",
    "per_layer",
    "per_layer_dynamic",
    "token",
    "oracle",
    "oracle_per_layer",
    "oracle_layerwise",
    "readme",
    "cmoe",
    "expertweaver",
    "emoe",
]
Baseline = Literal["dedicated", "gptq", "rtn", "gptaq", "decoupleq"]
ExportTarget = Literal[
    "mixtral", "qwen2-moe", "qwen3-moe", "glm4-moe", "dense", "gguf", "compressed-tensors", "gptq"
]
GatedTask = Literal["perplexity", "choices"]
# Widths are keys of a mapping here, which JSON makes strings.
Served = Annotated[Literal["float", "2", "3", "4"], BeforeValidator(str)]
Stage = Literal[
    "calibrate",
    "extract",
    "route",
    "recover",
    "quantize",
    "tune",
    "export",
    "verify",
    "evaluate",
    "report",
]


class Calibrate(Strict):
    """Which text the statistics come from."""

    data: str | None = Field(None, description="JSONL of documents (text, optional domain)")
    tokens: int = Field(131072, gt=0, description="tokens over all domains, divided evenly")
    context: int = Field(2048, ge=8, description="tokens per window, cut to the model's maximum")
    batch_tokens: int = Field(8192, gt=0, description="tokens per forward pass")
    sketch_dim: int = Field(256, ge=8, le=1024, description="width of the activation sketch")


class Extract(Strict):
    """How the neurons of a layer become shared and routed experts."""

    enabled: bool = Field(True, description="false: the model stays dense")
    method: Literal["fissile", "random", "readme", "cmoe", "expertweaver", "emoe"] = Field(
        "fissile", description="ours, random experts, or a published conversion on the same path"
    )
    score: Literal["auto", "fluctuation", "energy", "contribution", "magnitude"] = Field(
        "auto",
        description="auto: fluctuation if recovery can compensate, else energy; readme: magnitude",
    )
    num_experts: int = Field(8, ge=2, le=256, description="routed experts of a layer")
    top_k: int = Field(3, ge=1, description="experts chosen for a token")
    active_share: Share = Field(0.75, description="share of FFN neurons computed for a token")
    multiple: int = Field(64, ge=1, description="experts are a multiple of this many neurons")
    allocation: Literal["uniform", "proxy", "kl"] = Field(
        "kl",
        description="shared neurons of a layer: alike in all, by the layer's own loss, or by the"
        " measured divergence of pruning that layer; the active share is the mean over layers",
    )
    allocation_tokens: int = Field(4096, gt=0, description="calibration tokens for the divergence")
    refine_rounds: int = Field(
        2,
        ge=0,
        description="rounds in which neurons move to where the router's choices compute them",
    )
    refine_tokens: int = Field(16384, gt=0, description="calibration tokens of the refinement")

    @model_validator(mode="after")
    def _chosen_fit(self) -> Extract:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}")
        return self


class Route(Strict):
    """The router and how it is distilled from the oracle."""

    kind: Literal["pregate", "layerwise", "static"] = Field(
        "pregate", description="before layer 0, in every layer, or no choice at all"
    )
    per_layer: bool = Field(False, description="one head per layer instead of one decision")
    block: Literal["attention", "token", "readme"] = Field(
        "attention", description="of pre-gating: ours, token ids alone, or Read-ME's own router"
    )
    query_heads: int | None = Field(
        None, ge=1, description="of the router's attention; default as many as key heads"
    )
    width: int = Field(512, ge=8, description="of Read-ME's router and its embedding table")
    selector: Literal["ridge", "mean_gate", "spectral"] = Field(
        "ridge", description="of layer-wise routing"
    )
    selector_rank: int = Field(32, ge=1, description="of spectral selectors")
    fit_steps: int = Field(
        100, ge=0, description="iterations of the convex fit that follows the closed-form ridge"
    )
    fit_tokens: int = Field(32768, gt=0, description="calibration tokens of that fit")
    dynamic_k: bool = Field(
        False, description="take experts above a calibrated threshold, top_k in the mean"
    )
    max_k: int | None = Field(None, ge=1, description="most experts of a token under dynamic_k")
    balance_load: bool = Field(
        False, description="bias the choice, not the weights, towards an even load"
    )
    sensitivity: bool = Field(
        True, description="weigh layers by what their choices cost, where allocation measured it"
    )
    on_trajectory: bool = Field(
        False, description="measure the oracle again on the converted model's own activations"
    )
    attention_dim: int = Field(64, ge=8, description="width of the attention's output")
    inner_dim: int = Field(64, ge=8, description="width of the SwiGLU")
    steps: int = Field(400, ge=1, description="of distilling a router before layer 0")
    batch_tokens: int = Field(8192, gt=0, description="tokens of one step")
    learning_rate: float = Field(3e-3, gt=0, description="highest of the distillation")
    temperature: float = Field(
        0.5, gt=0, description="of the oracle's soft targets, whose std is one"
    )
    ridge: float = Field(1e-2, gt=0, description="ridge in units of the mean diagonal")
    balance: float = Field(0.0, ge=0, description="weight of the load-balance term")

    def router_sizes(self) -> dict[str, Any]:
        """What config.json of a pre-gated model says about its router."""
        sizes: dict[str, Any] = {"block": self.block, "inner_dim": self.inner_dim}
        if self.block == "attention":
            sizes["attention_dim"] = self.attention_dim
        if self.block == "readme":
            sizes["width"] = self.width
        if self.block != "token" and self.query_heads is not None:
            sizes["query_heads"] = self.query_heads
        return sizes


class Alternate(Strict):
    """Read-ME's alternation: rounds of the router alone, then of everything else (section 3.4).

    Rates follow a cosine within a round; `recover.learning_rate` and `recover.schedule` rest.
    """

    rounds: int = Field(0, ge=0, le=64, description="0: all is trained together; Read-ME has 8")
    router_share: float = Field(1 / 3, gt=0, lt=1, description="share of the budget for the router")
    router_rate: float = Field(5e-4, gt=0, description="router's learning rate in round 0")
    expert_rate: float = Field(5e-5, gt=0, description="learning rate of the rest in round 0")
    round_decay: float = Field(0.8, gt=0, le=1, description="of both rates, per round")
    temperature: float = Field(0.5, gt=0, description="of the oracle's soft targets")


def _rounds(value: Any) -> Any:
    """A bare number stands for so many rounds."""
    return {"rounds": value} if isinstance(value, int) else value


class Recover(Strict):
    """What is done about the neurons a token does not compute.

    One of `steps`, `tokens` and `seconds` is the budget of the training; 200 steps without any.
    """

    refit: bool = Field(True, description="least-squares re-fit of down projections")
    refit_scope: Literal["shared", "all"] = Field(
        "all", description="of the shared neurons alone, or of the routed experts too"
    )
    refit_target: Literal["layer", "stream"] = Field(
        "stream", description="each dense FFN's output, or the dense model's residual stream"
    )
    restore: bool = Field(
        True, description="with the re-fit: a constant per expert for where it is not chosen"
    )
    constants: bool = Field(
        True, description="biases in FFNs and constants per expert; most stock classes have none"
    )
    refit_tokens: int = Field(65536, gt=0, description="calibration tokens of the re-fit")
    method: Literal["none", "lora", "full"] = Field(
        "lora", description="of training after the re-fit: none, low-rank, or all weights"
    )
    steps: int | None = Field(None, ge=0, description="budget in optimiser steps")
    tokens: int | None = Field(None, gt=0, description="budget in tokens read, repeats included")
    seconds: float | None = Field(None, gt=0, description="budget in seconds of training")
    batch_tokens: int = Field(4096, gt=0, description="tokens of one forward pass, all processes")
    accumulate: int = Field(1, ge=1, description="forward passes per optimiser step")
    context: int = Field(512, ge=8, description="tokens per window of the training")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the products; weights and optimiser stay float32"
    )
    learning_rate: float = Field(1e-3, gt=0, description="highest of the schedule")
    schedule: Literal["rex", "uba", "linear", "cosine", "refined"] = Field(
        "rex", description="of the learning rate over the budget"
    )
    phi: float = Field(1.0, gt=0, description="shape of uba: 2 is cosine, near 0 drops late")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the budget")
    probe: float = Field(
        0.1, gt=0, lt=1, description="refined: share of the budget for a probe of gradient norms"
    )
    norms_from: str | None = Field(
        None, description="refined: run folder whose training recorded norms, in place of a probe"
    )
    clip: float = Field(1.0, gt=0, description="bound on the gradient's norm")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    rank: int = Field(16, ge=1, description="of lora")
    kd_weight: float = Field(
        0.9, ge=0, le=1, description="of the divergence from the dense model; the rest is text loss"
    )
    temperature: float = Field(1.0, gt=0, description="of that divergence")
    teacher_top_k: int = Field(
        64, ge=0, description="logits kept per token of the dense model; 0 runs it every step"
    )
    checkpoint_every: int = Field(50, ge=1, description="steps between resumable checkpoints")
    train_router: bool = Field(True, description="straight-through gradients into the router")
    alternate: Annotated[
        Alternate, BeforeValidator(_rounds, json_schema_input_type=Alternate | int)
    ] = Alternate()

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = [k for k in ("steps", "tokens", "seconds") if data.get(k) is not None]
        if len(given) > 1:
            raise ValueError(
                f"give one budget, not {' and '.join(given)} (set the others to null, which an "
                "extended recipe may have set)"
            )
        return data if given else data | {"steps": 200}

    @property
    def restores(self) -> bool:
        """Whether the re-fit adds a constant per expert."""
        return self.restore and self.constants

    @property
    def trains(self) -> bool:
        """Whether there is anything to train."""
        return self.method != "none" and self.steps != 0

    def limited(self, steps: int) -> Recover:
        """The same settings with a budget of so many steps."""
        return self.model_copy(update={"steps": steps, "tokens": None, "seconds": None})

    def steps_of(self, step_tokens: int) -> int | None:
        """Optimiser steps of the budget, at least one for tokens; None where time decides."""
        if self.tokens is None:
            return self.steps
        return max(1, round(self.tokens / step_tokens))


class Export(Strict):
    """The artifact's files."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="of tensors that are not quantized"
    )
    max_shard_bytes: int = Field(5_000_000_000, ge=1_000_000, description="of one file")
    targets: tuple[ExportTarget, ...] = Field(
        (), description="what `fissile export` is to write later; the plan refuses what it cannot"
    )
    default_bits: Width = Field(4, description="width of a load that names none")


class Evaluate(Strict):
    """Held-out measurements and the controls they are read against."""

    data: str | None = Field(None, description="JSONL of held-out documents")
    tokens: int = Field(65536, gt=0, description="tokens over all domains, divided evenly")
    context: int = Field(2048, ge=8, description="tokens per window, cut to the model's maximum")
    batch_tokens: int = Field(8192, gt=0, description="tokens per forward pass")
    shares: tuple[Share, ...] = Field((0.75, 0.5), description="active shares of the controls")
    controls: tuple[Control, ...] = Field(
        ("static", "random", "ridge", "pregate", "oracle"),
        description="what the converted model is read against, at every share",
    )
    baselines: tuple[Baseline, ...] = Field(
        ("dedicated", "gptq", "rtn"), description="what the nested code is read against"
    )
    control_recover_steps: int = Field(0, ge=0, description="training steps for each control")
    choices: int = Field(
        25, ge=0, description="multiple-choice items a domain, cut from the held-out text; 0: none"
    )


class Limits(Strict):
    """Bounds that turn a finished run into a failed one (exit code 5)."""

    max_ppl_ratio: float | None = Field(None, gt=1, description="converted over dense perplexity")
    recovery: dict[GatedTask, Share | dict[Served, Share]] = Field(
        default_factory=dict,
        description="least share of the dense score, by task and, where wanted, by width,"
        " e.g. {perplexity: 0.9, choices: {float: 0.97, 3: 0.9}}",
    )
    ledger: dict[str, int] = Field(
        default_factory=dict, description="most events of a kind, e.g. {starved_expert: 0}"
    )


class Recipe(Strict):
    """A whole run: dense checkpoint to routed, bit-nested artifact."""

    name: str = Field("unnamed", pattern=r"^[A-Za-z0-9._-]+$", description="in report and card")
    description: str = Field("", description="one line for lists of recipes")
    seed: int = Field(0, ge=0, lt=2**31, description="of everything that is drawn")
    calibrate: Calibrate = Calibrate()
    extract: Extract = Extract()
    route: Route = Route()
    recover: Recover = Recover()
    quantize: Quantize = Quantize()
    export: Export = Export()
    evaluate: Evaluate = Evaluate()
    limits: Limits = Limits()

    def sha256(self) -> str:
        """Hash of the resolved recipe; resume refuses a run folder made by another one."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
