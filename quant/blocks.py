"""Block stage: what is not yet quantized makes up for what is, against the block's output.

A layer's solve minimises the error of each linear on its own. Here the linears of a transformer
block harden one group after the other: after each, the weights that are still floats, the scales
and zeros of the hardened ones and the norms are trained until the block gives what the original
gave, so that the integers solved next are those of weights that already compensate. Norms are
trained in float32, whatever the model's own type. Every width trains float weights of its own: what
makes up for 2 bits would cost 4, and the solver takes a target a width. Norms serve all widths, and
stay where there are several.

Shapes: N windows, S tokens per window, D model width; B windows of one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fissile.config import BlockStage
from fissile.models.precision import exact_routers
from fissile.models.routers_fissile import Route
from fissile.quant.nested import NestedWeight
from fissile.quant.soft import SoftFloats
from fissile.quant.spill import Windows
from fissile.workers import Workers, gradients

_HELD_OUT = 8
"""One window in so many judges the outcome and is not trained on."""

_BETAS = (0.9, 0.95)


@dataclass(frozen=True, eq=False)
class BlockData:
    """Inputs and outputs of a block.

    Attributes:
        streams: width to the residual stream (N, S, D) that enters the quantized block.
        target_NSD: what shall leave it, likewise.
        route: windows (int64 indices) to the pre-gating router's decision for them.
        context: a stream to masks and rotary embeddings.
    """

    streams: Mapping[int, Windows]
    target_NSD: Windows
    route: Callable[[Tensor], Route | None]
    context: Callable[[Tensor], dict[str, Any]]


class BlockTrainer:
    """Trains one decoder layer while its linears are quantized.

    Attributes:
        curve: width to relative squared error of the block on windows that are held out, before
            and after each round of training; what did not help is undone.

    Args:
        layer: decoder layer; its own parameters are not changed.
        names: parameters that will be quantized; every width has a float copy of them.
        data: what goes in and what shall come out.
        settings: of the recipe.
        seed: of the order of windows.
        moving: widths whose scales and zeros are trained; all without it.
        workers: processes that call all of this together; they share windows.
    """

    def __init__(
        self,
        layer: nn.Module,
        names: Sequence[str],
        data: BlockData,
        settings: BlockStage,
        seed: int,
        moving: tuple[int, ...] | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._layer, self._data, self._settings = layer, data, settings
        self._moved_widths, self._workers = moving, workers or Workers()
        own = dict(layer.named_parameters())
        self._floats = {
            bits: {name: own[name].detach().float().clone() for name in names}
            for bits in data.streams
        }
        self._norms = {
            name: parameter.detach().float().clone()
            for name, parameter in own.items()
            if settings.norm_rate > 0 and name.endswith("norm.weight")
        }
        self._soft: dict[str, SoftFloats] = {}
        self._generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(data.target_NSD), generator=self._generator)
        held = max(1, len(order) // _HELD_OUT)
        self._held_out = order[:held]
        self._seen = order[held:] if len(order) > held else order
        self._windows = max(1, settings.batch_tokens // data.target_NSD.shape[1])
        self.curve: list[tuple[dict[int, float], dict[int, float]]] = []

    def fix(self, name: str, nested: NestedWeight) -> None:
        """From now on the integers of this weight stay; only its scales and zeros may move."""
        for floats in self._floats.values():
            del floats[name]
        self._soft[name] = SoftFloats(nested, self._moved_widths)

    def free(self, bits: int) -> dict[str, Tensor]:
        """A width's weights that are still floats, and the norms, float32; not copied."""
        return {name: x.detach() for name, x in (self._floats[bits] | self._norms).items()}

    def finish(self) -> dict[str, NestedWeight]:
        """What has been fixed, with its floats of now."""
        return {name: soft.finish() for name, soft in self._soft.items()}

    def train(self) -> None:
        """One round: every width trains for `settings.steps` steps of Adam.

        What a width has gained is kept if windows that are held out gain from it.
        """
        errors = [(bits, *self._train(bits)) for bits in self._data.streams]
        before = {bits: error for bits, error, _ in errors}
        self.curve.append((before, {bits: error for bits, _, error in errors}))

    @torch.enable_grad()
    def _train(self, bits: int) -> tuple[float, float]:
        """Train one width; its error on held-out windows before and after."""
        moving, before = self._moving(bits), self._held_out_error(bits)
        start = [parameter.detach().clone() for parameter, _ in moving]
        groups = [{"params": [p.requires_grad_()], "rate": rate} for p, rate in moving]
        if not groups:
            return before, before
        optimizer = torch.optim.Adam(groups, lr=0.0, betas=_BETAS)
        steps, batches = self._settings.steps, self._batches()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * (1 - step / steps)
            optimizer.zero_grad()
            windows = next(batches)
            if len(own := self._share(windows)):
                with self._products():
                    error = self._error(bits, own) * (len(own) / len(windows))
                error.backward()
            self._workers.sum_(gradients(parameter for parameter, _ in moving))
            optimizer.step()
        optimizer.zero_grad()
        after = self._held_out_error(bits)
        if after < before:
            return before, after
        with torch.no_grad():
            for (parameter, _), old in zip(moving, start, strict=True):
                parameter.copy_(old)
        return before, before

    @contextmanager
    def _products(self) -> Iterator[None]:
        """A training step's forward pass, in the precision of the settings."""
        kind = next(self._layer.parameters()).device.type
        low = self._settings.precision == "bfloat16"
        with exact_routers(self._layer), torch.autocast(kind, torch.bfloat16, enabled=low):
            yield

    def _moving(self, bits: int) -> list[tuple[Tensor, float]]:
        """What moves with a width, with its rate: weights move in units of their own size."""
        settings, moving = self._settings, list[tuple[Tensor, float]]()
        for weight in self._floats[bits].values():
            # As scales and zeros do: half as far with every bit.
            size = float(weight.detach().square().mean().sqrt()) * 2.0 ** (2 - bits)
            moving.append((weight, settings.weight_rate * size))
        for soft in self._soft.values():
            if bits in soft.moved:
                own = (soft.scale[bits], soft.zero[bits])
                moving += [(parameter, settings.float_rate) for parameter in own]
        if len(self._data.streams) == 1:
            moving += [(norm, settings.norm_rate) for norm in self._norms.values()]
        return [(parameter, rate) for parameter, rate in moving if rate > 0]

    def _batches(self) -> Iterator[Tensor]:
        """Window indices of one step after the other, in a new order every time through."""
        while True:
            order = torch.randperm(len(self._seen), generator=self._generator)
            yield from self._seen[order].split(self._windows)

    def _error(self, bits: int, windows: Tensor) -> Tensor:
        """Mean over tokens of the output's squared error in units of the target's own square.

        A token counts as it will after the next norm: a few tokens with a huge stream would
        otherwise decide alone.
        """
        hidden_BSD = self._data.streams[bits][windows]
        dense = {name: soft.dense(bits) for name, soft in self._soft.items()}
        state = self._floats[bits] | dense | self._norms
        inputs = (hidden_BSD, self._data.route(windows), self._data.context(hidden_BSD))
        out_BSD = functional_call(self._layer, state, inputs)
        target_BSD = self._data.target_NSD[windows]
        error_BS = (out_BSD - target_BSD).square().sum(-1)
        size_BS = target_BSD.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return (error_BS / size_BS).mean()

    @torch.no_grad()
    def _held_out_error(self, bits: int) -> float:
        total = torch.zeros(1, dtype=torch.float64)
        for part in self._share(self._held_out).split(self._windows):
            if len(part):
                total += float(self._error(bits, part)) * len(part)
        self._workers.sum_([total])
        return float(total) / len(self._held_out)

    def _share(self, windows: Tensor) -> Tensor:
        """This process's part of some windows."""
        mine = self._workers.share(len(windows))
        return windows[mine.start : mine.stop]
