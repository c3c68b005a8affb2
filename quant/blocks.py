"""Block stage: what is not yet quantized makes up for what is, against the block's output.

A layer's solve minimises the error of each linear on its own. Here the linears of a transformer
block harden one group after the other: after each, the weights that are still floats, the scales
and zeros of the hardened ones and the norms are trained until the block gives what the original
gave, so that the integers solved next are those of weights that already compensate. Norms are
trained in float32, whatever the model's own type. All widths are trained in one pass.

Shapes: N windows, S tokens per window, D model width; B windows of one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fissile.config import BlockStage
from fissile.models.routers_fissile import Route
from fissile.quant.nested import NestedWeight
from fissile.quant.soft import SoftFloats
from fissile.quant.spill import Windows
from fissile.workers import Workers

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
        weights: width to the weight of its loss.
    """

    streams: Mapping[int, Windows]
    target_NSD: Windows
    route: Callable[[Tensor], Route | None]
    context: Callable[[Tensor], dict[str, Any]]
    weights: Mapping[int, float]


class BlockTrainer:
    """Trains one decoder layer while its linears are quantized.

    Attributes:
        curve: width to relative squared error of the block on windows that are held out, before
            and after each round of training; a round that did not help is undone.

    Args:
        layer: decoder layer; its own parameters are not changed.
        names: parameters that will be quantized.
        data: what goes in and what shall come out.
        settings: of the recipe.
        seed: of the order of windows.
        moving: widths whose scales and zeros are trained; all without it.
        workers: processes that call all of this together; they share windows and widths.
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
        self._floats = {name: own[name].detach().float().clone() for name in names}
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
        del self._floats[name]
        self._soft[name] = SoftFloats(nested, self._moved_widths)

    def free(self) -> dict[str, Tensor]:
        """Weights that are still floats, and norms, float32; not copied."""
        return {name: x.detach() for name, x in (self._floats | self._norms).items()}

    def finish(self) -> dict[str, NestedWeight]:
        """What has been fixed, with its floats of now."""
        return {name: soft.finish() for name, soft in self._soft.items()}

    @torch.enable_grad()
    def train(self) -> None:
        """One round: `settings.steps` steps of Adam, kept if held-out windows gain from it."""
        moving = self._moving()
        start = [parameter.detach().clone() for parameter, _ in moving]
        before = self._held_out_error()
        groups = [{"params": [p.requires_grad_()], "rate": rate} for p, rate in moving]
        optimizer = torch.optim.Adam(groups, lr=0.0, betas=_BETAS)
        steps, batches = self._settings.steps, self._batches()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * (1 - step / steps)
            optimizer.zero_grad()
            windows = next(batches)
            for bits, own in self._shared(windows):
                say = self._data.weights[bits] * len(own) / len(windows)
                error = say * self._error(bits, own)
                # A width may have nothing left that moves.
                if error.requires_grad:
                    error.backward()
            self._sum_gradients([parameter for parameter, _ in moving])
            optimizer.step()
        after = self._held_out_error()
        if not self._total(after) < self._total(before):
            with torch.no_grad():
                for (parameter, _), old in zip(moving, start, strict=True):
                    parameter.copy_(old)
            after = before
        self.curve.append((before, after))

    def _moving(self) -> list[tuple[Tensor, float]]:
        """Everything that moves, with its rate: weights move in units of their own size."""
        settings = self._settings
        sizes = [(w, float(w.detach().square().mean().sqrt())) for w in self._floats.values()]
        moving = [(weight, settings.weight_rate * size) for weight, size in sizes]
        for soft in self._soft.values():
            moving += [(parameter, settings.float_rate) for parameter in soft.parameters()]
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
        state = self._floats | dense | self._norms
        inputs = (hidden_BSD, self._data.route(windows), self._data.context(hidden_BSD))
        out_BSD = functional_call(self._layer, state, inputs)
        target_BSD = self._data.target_NSD[windows]
        error_BS = (out_BSD - target_BSD).square().sum(-1)
        size_BS = target_BSD.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return (error_BS / size_BS).mean()

    @torch.no_grad()
    def _held_out_error(self) -> dict[int, float]:
        places = {bits: place for place, bits in enumerate(self._data.weights)}
        total_W = torch.zeros(len(places), dtype=torch.float64)
        for bits, windows in self._shared(self._held_out):
            for part in windows.split(self._windows):
                total_W[places[bits]] += float(self._error(bits, part)) * len(part)
        self._workers.sum_([total_W])
        means = (total_W / len(self._held_out)).tolist()
        return {bits: means[place] for bits, place in places.items()}

    def _shared(self, windows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """This process's part of all pairs of a width and a window, as windows by width."""
        count = len(windows)
        mine = self._workers.share(count * len(self._data.weights))
        for place, bits in enumerate(self._data.weights):
            own = windows[max(0, mine.start - place * count) : max(0, mine.stop - place * count)]
            if len(own):
                yield bits, own

    def _sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Give every process the gradient of all windows and widths."""
        if self._workers.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._workers.sum_([p.grad for p in parameters if p.grad is not None])

    def _total(self, errors: Mapping[int, float]) -> float:
        return sum(self._data.weights[bits] * error for bits, error in errors.items())
