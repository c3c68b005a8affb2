"""The quantize section of recipes; everything else of them is in fissile.config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Width = Literal[2, 3, 4, 6, 8]
Effort = Literal["fast", "balanced", "best"]


class Strict(BaseModel):
    """Base of every recipe section: unknown keys are errors, instances do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BlockStage(Strict):
    """Training of each transformer block's output while its linears are quantized."""

    steps: int = Field(
        0,
        ge=0,
        description="optimiser steps after each group of linears; 0: no block stage; left out: by"
        " effort",
    )
    batch_tokens: int = Field(2048, gt=0, description="tokens of one step")
    weight_rate: float = Field(
        1e-2,
        ge=0,
        description="at 2 bits, of weights not yet quantized, in their rms; half with each bit",
    )
    float_rate: float = Field(
        5e-3,
        gt=0,
        description="at 2 bits, of scales and zeros, in units of each scale; half with each bit",
    )
    norm_rate: float = Field(1e-3, ge=0, description="of norms, of one width alone; 0: they stay")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the products; what is trained stays float32"
    )


class Tune(Strict):
    """Training of scales, zeros and norms towards the dense model's predictions, at the end."""

    steps: int = Field(
        0, ge=0, description="optimiser steps, all codes in memory; left out: by effort"
    )
    batch_tokens: int = Field(2048, gt=0, description="tokens of one step")
    context: int = Field(512, ge=8, description="most tokens of a window")
    learning_rate: float = Field(
        4e-3,
        gt=0,
        description="of norms, in their units, and of scales and zeros at 2 bits, in units of each"
        " scale; half with each bit",
    )
    norms: bool = Field(True, description="norms move too; never with 6 and 8 bits")
    teacher_top_k: int = Field(64, ge=0, description="logits kept per token of the dense model")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="of the products; what is trained stays float32"
    )
    rank: int | None = Field(
        None, ge=1, description="zeros alone move, by products of this rank; null: all floats do"
    )
    period: int | None = Field(
        None,
        ge=2,
        description="once for all: each step draws a width for every weight, with a mean that"
        " falls and rises in so many steps; null: a step takes every width for all weights",
    )
    checkpoint_every: int = Field(50, ge=1, description="steps between resumable checkpoints")


_Words = Literal["balanced", "2-bit first", "4-bit first"]


def _omega(value: Any) -> Any:
    """Weights of the widths behind a word."""
    words = {"balanced": 3.0, "2-bit first": 16.0, "4-bit first": 1.0}
    known = isinstance(value, str) and value in words
    return {2: words[value], 3: 1.0, 4: 1.0} if known else value


class _Work(NamedTuple):
    blend: float
    block_steps: int
    tune_steps: int
    companding: float | None
    generated: int


# What an effort means where the recipe leaves it out.
_EFFORT_WORK = {
    "fast": _Work(0.0, 0, 0, 1.0, 0),
    "balanced": _Work(0.5, 10, 0, 1.0, 0),
    "best": _Work(0.5, 100, 360, None, 2),
}


class Quantize(Strict):
    """Bit-nested weights."""

    enabled: bool = Field(True, description="false: weights stay floats")
    widths: tuple[Width, ...] = Field(
        (2, 3, 4), description="bits that can be served; 6 and 8 add to 4"
    )
    group_size: Literal[32, 64, 128] = Field(
        64, description="inputs that share a scale and a zero, less where it does not divide"
    )
    omega: Annotated[
        dict[int, float],
        BeforeValidator(_omega, json_schema_input_type=dict[int, float] | _Words),
    ] = Field(
        {2: 3.0, 3: 1.0, 4: 1.0},
        description="weight of each width's loss, relative to 4^width; or 'balanced' (as here),"
        " '2-bit first', '4-bit first'",
    )
    effort: Effort = Field(
        "balanced", description="rounds of the solver; balanced and best train blocks, best tunes"
    )
    tied: bool = Field(
        False,
        description="only the widest of 2, 3 and 4 bits has floats for every group, narrower widths"
        " three a row upon them: less to hold for all widths; neither block stage nor tune",
    )
    attention: bool = Field(True, description="attention projections too, not only FFNs")
    damp: float = Field(0.01, gt=0, description="ridge of the Hessian, in its mean diagonal")
    method: Literal["fissile", "decoupleq"] = Field(
        "fissile", description="ours, or decoupleQ as published (one width, integers frozen)"
    )
    companding: float | None = Field(
        1.0,
        description="width of the outer cells (1, 1.5 or 2); null: the best for each tensor; left"
        " out: by effort",
    )
    blend: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share made up for of the inputs' drift from the float model's; left out: by"
        " effort",
    )
    block: BlockStage = BlockStage()
    tune: Tune = Tune()
    budget: str | None = Field(
        None, description="mixed widths: bits per quantized weight (2.6bpw) or bytes (4GiB)"
    )
    tokens: int = Field(65536, gt=0, description="calibration tokens for the Hessians")
    generated: int = Field(
        0,
        ge=0,
        description="windows that the dense model writes itself, for each of the calibration text:"
        " more to measure and train on; needs that model in memory, in bfloat16; left out: by"
        " effort",
    )

    @property
    def all_tokens(self) -> int:
        """Tokens of the calibration text and of what the dense model writes beside it."""
        return self.tokens * (1 + self.generated)

    @model_validator(mode="before")
    @classmethod
    def _by_effort(cls, data: Any) -> Any:
        if not isinstance(data, dict) or str(data.get("effort", "balanced")) not in _EFFORT_WORK:
            return data
        work = _EFFORT_WORK[data.get("effort", "balanced")]
        if data.get("tied") is True:  # fitted, not trained
            work = work._replace(block_steps=0, tune_steps=0, generated=0)
        if data.get("method") == "decoupleq":  # as published: the text alone, no tuning
            work = work._replace(tune_steps=0, generated=0)
        filled: dict[str, Any] = {"blend": work.blend, "companding": work.companding}
        filled |= {"generated": work.generated, "block": {}, "tune": {}, **data}
        for name, steps in (("block", work.block_steps), ("tune", work.tune_steps)):
            if isinstance(filled[name], dict):
                filled[name] = {"steps": steps} | filled[name]
        return filled

    @model_validator(mode="after")
    def _widths_sorted(self) -> Quantize:
        if not self.widths or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths {list(self.widths)} must be distinct and ascending")
        if self.companding not in (None, 1, 1.5, 2):
            raise ValueError(f"companding {self.companding}, accepted: null, 1, 1.5 or 2")
        base = [w for w in self.widths if w <= 4]
        if len(base) < len(self.widths) and 4 not in base:
            raise ValueError(f"widths {list(self.widths)}: 6 and 8 bits are added to 4")
        if self.method == "decoupleq" and len(self.widths) > 1:
            raise ValueError(f"widths {list(self.widths)}: decoupleq makes one width")
        self._check_tied(base)
        if missing := [w for w in base if self.omega.get(w, 0) <= 0]:
            raise ValueError(f"omega has no positive weight for width {missing[0]}")
        return self

    def _check_tied(self, base: Sequence[int]) -> None:
        if not self.tied:
            return
        if self.method == "decoupleq":
            raise ValueError("tied: decoupleq makes one width, whose floats are tied to nothing")
        if self.budget is not None:
            raise ValueError("tied: under a budget a weight has one width, tied to nothing")
        if len(base) < 2:
            raise ValueError(f"tied: widths {list(self.widths)} need two of 2, 3 and 4")
        for name, steps in (("block", self.block.steps), ("tune", self.tune.steps)):
            if steps:
                raise ValueError(
                    f"tied: floats are fitted, not trained: {name}.steps {steps}, accepted: 0"
                )
