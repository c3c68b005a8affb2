"""What metrics.json holds: the schema that the pipeline fills and the report and the card read.

Every section may be absent: a stage that was switched off leaves its default. Values that are not
finite are stored as null. Loads no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, field_validator

from fissile import families
from fissile.config import Strict
from fissile.errors import CorruptCheckpoint, UsageError
from fissile.eval.uncertainty import paired_log_ratio
from fissile.families.base import Family
from fissile.families.names import attention_shapes
from fissile.families.sizes import expert_sizes
from fissile.run.gates import AnswerScore, GateRow
from fissile.run.metrics_routing import (
    Division,
    DomainMatrix,
    Model,
    Redundancy,
    RouterQuality,
    Weights,
)

if TYPE_CHECKING:
    from fissile.run.context import RunContext

Recovery = Literal["none", "refit", "trained"]
Method = Literal["nested", "dedicated", "gptq", "rtn", "gptaq", "decoupleq", "float"]


class Score(Strict):
    """Perplexity of one model on the held-out documents; lower is better."""

    ppl: float | None
    stderr: float | None = Field(None, description="of ppl, over documents")
    by_domain: dict[str, float | None] = Field(default_factory=dict)
    n_tokens: int | None = None
    document_nll: list[float] = Field(default_factory=list, description="nats per document")
    document_tokens: list[int] = Field(default_factory=list, description="predicted per document")
    choices: AnswerScore | None = Field(None, description="accuracy on items of the same text")

    def log_ratio(self, other: Score) -> tuple[float, float | None] | None:
        """log(self.ppl / other.ppl) and its standard error; None if either is missing.

        Paired over documents where both were measured on the same ones; else the two errors are
        added in quadrature, which overstates them.

        Args:
            other: what to compare with; negative favours self.
        """
        if not self.ppl or not other.ppl:
            return None
        tokens = self.document_tokens
        same = tokens == other.document_tokens and len(tokens) == len(self.document_nll)
        if same and len(other.document_nll) == len(tokens) and sum(tokens) > 0:
            return paired_log_ratio(self.document_nll, other.document_nll, tokens)
        error = None
        if self.stderr is not None and other.stderr is not None:
            error = math.hypot(self.stderr / self.ppl, other.stderr / other.ppl)
        return math.log(self.ppl / other.ppl), error


class Variant(Score):
    """A model at an active share: the converted one or a control."""

    name: Model
    share: float = Field(description="share of FFN neurons computed for a token")
    measured_share: float | None = Field(
        None, description="the same, counted on the held-out text; None where nothing is chosen"
    )
    recovery: Recovery = "none"
    bits: int | None = None
    bytes: int | None = Field(None, description="of the weights")


class WidthScore(Score):
    """A quantized model, or the float model it came from (method "float")."""

    method: Method
    bits: int | None = None
    bits_per_weight: float | None = Field(None, description="scales and zeros included")
    bytes: int | None = Field(None, description="that a load at this width reads")
    of: Literal["dense", "converted"] = "converted"


class LayerLoss(Strict):
    """Relative quantization loss of one tensor: tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) per width."""

    layer: int
    tensor: str
    loss: dict[str, float | None]


class DomainExpert(Strict):
    """Share of each domain's tokens that chose each expert; a row sums to top_k."""

    domains: list[str]
    matrix: list[list[float | None]]


class Routing(Strict):
    """Behaviour of the pre-gating router on calibration text."""

    num_experts: int | None = None
    top_k: int | None = None
    expert_load: list[list[float]] = Field(
        default_factory=list, description="per layer (or once), share of choices per expert"
    )
    domain_expert: DomainExpert | None = None
    recall_at_k: list[float] = Field(
        default_factory=list, description="per layer, share of the oracle's choices it makes too"
    )
    gap_closed: list[float] = Field(
        default_factory=list,
        description="per layer, share of the way from a blind choice to the oracle's, in norm",
    )
    oracle_mass: float | None = Field(
        None, description="output norm of its choices over that of the oracle's"
    )
    switch_rate: float | None = Field(None, description="tokens whose choice differs from the last")
    entropy: float | None = Field(None, description="of the expert load, over its maximum")
    redundancy: dict[str, Redundancy] = Field(
        default_factory=dict, description="of the router and of the oracle"
    )

    @field_validator("expert_load", mode="before")
    @classmethod
    def _rows(cls, value: Any) -> Any:
        flat = isinstance(value, list) and value and not isinstance(value[0], list)
        return [value] if flat else value


class StageRow(Strict):
    """Cost of a stage."""

    name: str
    seconds: float
    peak_rss_bytes: int | None = None


class CheckRow(Strict):
    """One check of `verify`."""

    name: str
    ok: bool
    detail: str = ""


class Metrics(Strict):
    """Everything a run measured."""

    name: str
    created: str = ""
    source: str = ""
    seed: int | None = None
    active_share: float | None = Field(None, description="of the converted model; None if dense")
    dense: Score | None = None
    dense_bytes: int | None = None
    variants: list[Variant] = Field(default_factory=list)
    widths: list[WidthScore] = Field(default_factory=list)
    layers: list[LayerLoss] = Field(default_factory=list)
    recovery_curve: list[float] = Field(default_factory=list, description="loss per step")
    router_curve: list[float] = Field(default_factory=list, description="loss per step")
    routing: Routing | None = None
    routers: list[RouterQuality] = Field(default_factory=list)
    domain_matrices: list[DomainMatrix] = Field(default_factory=list)
    weights: Weights | None = None
    divisions: list[Division] = Field(default_factory=list, description="one a measured share")
    stages: list[StageRow] = Field(default_factory=list)
    verify: list[CheckRow] = Field(default_factory=list)
    gates: list[GateRow] = Field(default_factory=list)
    conditions: dict[str, Any] = Field(default_factory=dict)

    @field_validator("recovery_curve", "router_curve", mode="before")
    @classmethod
    def _losses(cls, value: Any) -> Any:
        rows = isinstance(value, list) and value and isinstance(value[0], dict)
        return [row["loss"] for row in value] if rows else value

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return finite(self.model_dump(mode="json"))


def find_variant(metrics: Metrics, name: str, share: float, recovery: str) -> Variant | None:
    """The measurement of one control, or None."""
    for v in metrics.variants:
        if (v.name, v.recovery) == (name, recovery) and math.isclose(v.share, share):
            return v
    return None


def find_width(metrics: Metrics, method: str, bits: int | None) -> WidthScore | None:
    """The measurement of one quantized model, or None."""
    ours = (w for w in metrics.widths if w.of == "converted")
    return next((w for w in ours if (w.method, w.bits) == (method, bits)), None)


def shares(metrics: Metrics) -> list[float]:
    """Active shares below 1 that were measured, largest first."""
    return sorted({v.share for v in metrics.variants if v.share < 1}, reverse=True)


def parse_metrics(data: Mapping[str, Any], where: str) -> Metrics:
    """Validate the contents of a metrics.json.

    Args:
        data: parsed JSON.
        where: what error messages name.

    Raises:
        CorruptCheckpoint: a field that is unknown, missing or of the wrong type.
    """
    try:
        return Metrics.model_validate(finite(data))
    except ValidationError as err:
        first = err.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CorruptCheckpoint(f"{where}: {field}: {first['msg']}") from None


def read_metrics(path: Path) -> Metrics:
    """Read a run folder's metrics.json.

    Raises:
        UsageError: it does not exist.
        CorruptCheckpoint: it is not what this version writes.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{path}: does not exist; a report needs a run folder whose stages are finished"
            " (continue the run with --resume)"
        ) from None
    except (OSError, ValueError) as err:
        raise CorruptCheckpoint(f"{path}: not readable JSON ({err})") from None
    if not isinstance(data, dict):
        raise CorruptCheckpoint(f"{path}: expected an object, found {type(data).__name__}")
    return parse_metrics(data, str(path))


def assemble(context: RunContext, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Gather the records of a run's stages into the contents of metrics.json.

    Args:
        context: of the run.
        records: what each finished stage returned, with its seconds and peak memory.
    """
    recipe = context.recipe
    measured = records.get("evaluate", {})
    route, quantize = records.get("route", {}), records.get("quantize", {})
    kind = recipe.extract.enabled and recipe.route.kind
    routing = dict(route.get("routing") or {})
    if routing:
        number = records.get("extract", {}).get("num_experts", recipe.extract.num_experts)
        routing |= {"num_experts": number, "top_k": recipe.extract.top_k}
    data = {
        "name": recipe.name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "source": context.source.folder.name,
        "seed": recipe.seed,
        "active_share": recipe.extract.active_share if kind else None,
        "dense": measured.get("dense"),
        "dense_bytes": context.source.headers.total_bytes,
        "variants": measured.get("variants", []),
        "widths": measured.get("widths", []),
        "layers": quantize.get("layers", []),
        "recovery_curve": records.get("recover", {}).get("recovery_curve", []),
        "router_curve": route.get("router_curve", []),
        "routing": routing or None,
        "routers": measured.get("routers") or route.get("routers", []),
        "domain_matrices": measured.get("domain_matrices", []),
        "weights": weights_of(context.source.family, context.source.headers.config),
        "divisions": list(_divisions(context)) if kind else [],
        "stages": [
            {"name": n, "seconds": r["seconds"], "peak_rss_bytes": r.get("peak_rss_bytes")}
            for n, r in records.items()
        ],
        "verify": records.get("verify", {}).get("checks", []),
        "gates": measured.get("gates", []),
        "conditions": {
            "tokens": recipe.evaluate.tokens,
            "context": recipe.evaluate.context,
            "domains": sorted((measured.get("dense") or {}).get("by_domain", {})),
        },
    }
    return parse_metrics(data, "metrics.json").to_dict()


def weights_of(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """Weights of a dense model by what reads them: the fields of `Weights`.

    Args:
        family: of the model.
        config: its Hugging Face config.json.
    """
    dims = families.dims_of(family, config)
    linears = attention_shapes(family, dims).values()
    table = dims.vocab * dims.hidden
    return {
        "ffn": dims.layers * 3 * dims.hidden * dims.ffn,
        "attention": dims.layers * sum(outputs * inputs for outputs, inputs in linears),
        "query": dims.layers * dims.heads * dims.head_dim,
        "head": table,
        "embedding": 0 if dims.tied else table,
    }


def _divisions(context: RunContext) -> Iterator[dict[str, Any]]:
    """How the FFN is divided at every measured active share; nothing for overlapping experts."""
    settings, shares = context.recipe.extract, {*context.recipe.evaluate.shares}
    ffn = context.source.config.intermediate_size
    if settings.method == "readme" or context.recipe.route.kind == "static":
        return
    for share in sorted({settings.active_share, *shares} - {1.0}, reverse=True):
        sizes = expert_sizes(ffn, settings.num_experts, settings.top_k, share, settings.multiple)
        yield {
            "wanted": share,
            "share": sizes.active_share,
            "shared": sizes.shared / ffn,
            "num_experts": sizes.num_experts,
            "top_k": settings.top_k,
        }


def finite(value: Any) -> Any:
    """Copy of JSON-like data with None in the place of NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
