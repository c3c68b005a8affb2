"""Recipes: strict, frozen models of all a run can be told. Defaults live here and nowhere else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fissile.errors import RecipeError
from fissile.registry import suggest

Width = Literal[2, 3, 4]
Share = Annotated[float, Field(gt=0, le=1)]
Control = Literal["static", "random", "ridge", "pregate", "oracle"]
Baseline = Literal["dedicated", "gptq", "rtn"]
Stage = Literal[
    "calibrate",
    "extract",
    "route",
    "recover",
    "quantize",
    "export",
    "verify",
    "evaluate",
    "report",
]


class Strict(BaseModel):
    """Base of every recipe section: unknown keys are errors, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibrate(Strict):
    """Which text the statistics come from."""

    data: str | None = Field(None, description="JSONL of documents (text, optional domain)")
    tokens: int = Field(131072, gt=0, description="tokens over all domains, divided evenly")
    context: int = Field(2048, ge=8, description="tokens per window, cut to the model's maximum")
    batch_tokens: int = Field(8192, gt=0, description="tokens per forward pass")
    sketch_dim: int = Field(256, ge=8, le=1024, description="width of the activation sketch")


class Extract(Strict):
    """How the neurons of a layer become shared and routed experts."""

    enabled: bool = True
    method: Literal["fissile", "readme", "random"] = "fissile"
    score: Literal["auto", "fluctuation", "energy", "magnitude"] = Field(
        "auto", description="auto: fluctuation if recovery can compensate, else energy"
    )
    num_experts: int = Field(8, ge=2, le=256)
    top_k: int = Field(3, ge=1)
    active_share: Share = Field(0.75, description="share of FFN neurons computed for a token")
    multiple: int = Field(64, ge=1, description="experts are a multiple of this many neurons")
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

    kind: Literal["pregate", "layerwise", "static"] = "pregate"
    per_layer: bool = Field(False, description="one head per layer instead of one decision")
    attention_dim: int = Field(64, ge=8, description="width of the attention's output")
    inner_dim: int = Field(64, ge=8, description="width of the SwiGLU")
    steps: int = Field(400, ge=1)
    batch_tokens: int = Field(8192, gt=0)
    learning_rate: float = Field(3e-3, gt=0)
    temperature: float = Field(
        0.5, gt=0, description="of the oracle's soft targets, whose std is one"
    )
    ridge: float = Field(1e-2, gt=0, description="ridge in units of the mean diagonal")
    balance: float = Field(0.0, ge=0, description="weight of the load-balance term")


class Recover(Strict):
    """What is done about the neurons a token does not compute."""

    refit: bool = Field(True, description="least-squares re-fit of the shared down projection")
    refit_tokens: int = Field(65536, gt=0, description="calibration tokens of the re-fit")
    method: Literal["none", "lora", "full"] = "lora"
    steps: int = Field(200, ge=0)
    batch_tokens: int = Field(4096, gt=0)
    context: int = Field(512, ge=8)
    learning_rate: float = Field(1e-3, gt=0)
    rank: int = Field(16, ge=1)
    temperature: float = Field(1.0, gt=0)
    checkpoint_every: int = Field(50, ge=1, description="steps between resumable checkpoints")
    train_router: bool = Field(True, description="straight-through gradients into the router")


class Quantize(Strict):
    """Bit-nested weights."""

    enabled: bool = True
    widths: tuple[Width, ...] = (2, 3, 4)
    group_size: Literal[32, 64, 128] = 64
    omega: dict[int, float] = Field(
        {2: 4.0, 3: 1.0, 4: 1.0},
        description="weight of each width's loss, relative to 4^width",
    )
    effort: Literal["fast", "balanced", "best"] = "balanced"
    attention: bool = True
    damp: float = Field(0.01, gt=0)
    tokens: int = Field(65536, gt=0, description="calibration tokens for the Hessians")

    @model_validator(mode="after")
    def _widths_sorted(self) -> Quantize:
        if not self.widths or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths {list(self.widths)} must be distinct and ascending")
        if missing := [w for w in self.widths if self.omega.get(w, 0) <= 0]:
            raise ValueError(f"omega has no positive weight for width {missing[0]}")
        return self


class Export(Strict):
    """The artifact's files."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "bfloat16", description="of tensors that are not quantized"
    )
    max_shard_bytes: int = Field(5_000_000_000, ge=1_000_000)
    default_bits: Width = 4


class Evaluate(Strict):
    """Held-out measurements and the controls they are read against."""

    data: str | None = Field(None, description="JSONL of held-out documents")
    tokens: int = Field(65536, gt=0, description="tokens over all domains, divided evenly")
    context: int = Field(2048, ge=8)
    batch_tokens: int = Field(8192, gt=0)
    shares: tuple[Share, ...] = (0.75, 0.5)
    controls: tuple[Control, ...] = get_args(Control)
    baselines: tuple[Baseline, ...] = get_args(Baseline)
    control_recover_steps: int = Field(0, ge=0, description="training steps for each control")


class Limits(Strict):
    """Bounds that turn a finished run into a failed one (exit code 5)."""

    max_ppl_ratio: float | None = Field(None, gt=1, description="converted over dense perplexity")
    ledger: dict[str, int] = Field(
        default_factory=dict, description="most events of a kind, e.g. {starved_expert: 0}"
    )


class Recipe(Strict):
    """A whole run: dense checkpoint to routed, bit-nested artifact."""

    name: str = Field("unnamed", pattern=r"^[A-Za-z0-9._-]+$")
    description: str = ""
    seed: int = Field(0, ge=0, lt=2**31)
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


def recipe_folder() -> Path:
    """Folder of the recipes that ship with the package."""
    return Path(__file__).resolve().parent / "recipes"


def shipped_recipes() -> dict[str, Path]:
    """Name ("demo/moe-nested") to file of every shipped recipe; files named "_*" are bases."""
    root = recipe_folder()
    files = sorted(p for p in root.rglob("*.yaml") if not p.name.startswith("_"))
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in files}


def find_recipe(name: str) -> Path:
    """Resolve a recipe argument: an existing file, or the name of a shipped recipe.

    Raises:
        RecipeError: neither exists.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_recipes()
    key = name.removeprefix("recipes/").removesuffix(".yaml")
    if key in shipped:
        return shipped[key]
    raise RecipeError(
        f"recipe {name!r} is neither a file nor shipped{suggest(key, list(shipped))}"
        f" (shipped: {', '.join(shipped)})"
    )


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a YAML recipe, follow `extends:`, apply `key=value` overrides, validate.

    Args:
        path: YAML file; `extends: other.yaml` is resolved beside it.
        overrides: dotted assignments as given to `--set`, values in YAML syntax.

    Raises:
        RecipeError: unreadable, unknown keys (with a suggestion), values out of range.
    """
    data = _read_chain(path, seen=())
    for item in overrides or []:
        _assign(data, item)
    return parse_recipe(data, where=str(path))


def parse_recipe(data: dict[str, Any], where: str = "recipe") -> Recipe:
    """Validate a mapping; all mistakes are reported in one line, joined by "; ".

    Raises:
        RecipeError: unknown keys (with a suggestion) or values out of range.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as err:
        lines = "; ".join(_explain(dict(e)) for e in err.errors())
        raise RecipeError(f"{where}: {lines}") from None


def _read_chain(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path in seen:
        raise RecipeError(f"{path}: extends itself")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError) as err:
        raise RecipeError(f"{path}: cannot be read ({err})") from None
    except yaml.YAMLError as err:
        raise RecipeError(f"{path}: not YAML ({' '.join(str(err).split())})") from None
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping, found {type(data).__name__}")
    base = data.pop("extends", None)
    if base is None:
        return data
    return _merge(_read_chain(path.parent / str(base), (*seen, path)), data)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged


def _assign(data: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {item!r}: expected KEY=VALUE, e.g. quantize.group_size=128")
    *parents, leaf = key.split(".")
    node = data
    for name in parents:
        node = node.setdefault(name, {})
        if not isinstance(node, dict):
            raise RecipeError(f"--set {item!r}: {name} is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise RecipeError(f"--set {item!r}: the value is not YAML") from None


def _explain(error: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] != "extra_forbidden":
        return f"{where}: {error['msg']} (got {error['input']!r})"
    owner: Any = Recipe
    for part in error["loc"][:-1]:
        owner = owner.model_fields[part].annotation
    known = sorted(owner.model_fields)
    hint = suggest(str(error["loc"][-1]), known) or f" (known: {', '.join(known)})"
    return f"{where}: unknown key{hint}"
