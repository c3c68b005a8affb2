"""A whole quantized model whose floats move while its integers stay.

Scales and zeros of every width, and the norms inside the layers, against any loss of the model's
logits: its own teacher's predictions (after the solve), or labelled text (one integer tensor, many
tasks; the last stage of decoupleQ, arXiv 2404.12759). What moves is small, so every task or width
costs only its floats.

Shapes: B windows, S tokens per window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from fissile.kernels import layout
from fissile.models.build import empty_layer
from fissile.models.modeling_fissile import FissileDecoderLayer
from fissile.models.precision import exact_routers
from fissile.models.routers_fissile import Route
from fissile.models.source import LAYER
from fissile.models.stream import StreamedModel
from fissile.quant.layers import QuantizedLayer
from fissile.quant.nested import NestedWeight
from fissile.quant.sensitivity import sharing
from fissile.quant.soft import SoftFloats


class TunedModel:
    """The floats of a quantized model in training.

    The integers are all that is held of the layers: one layer at a time is decoded, and decoded
    again when its gradient is due.

    Args:
        model: the float model that was quantized; its layers are not read.
        layers: the quantized layers, in order.
        widths: whose scales and zeros move.
        norms: whether the norms inside the layers move too, the same for all widths.
        rank: see `SoftFloats`.
        seed: of factors of low rank.

    Raises:
        ValueError: a width that is not stored, or whose floats 6 and 8 bits rest on; tied floats.
    """

    def __init__(
        self,
        model: StreamedModel,
        layers: Sequence[QuantizedLayer],
        widths: Sequence[int],
        *,
        norms: bool,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        self._model = model
        low = None if rank is None else (rank, torch.Generator().manual_seed(seed))
        self._layers = [_Layer(model, i, own, widths, norms, low) for i, own in enumerate(layers)]

    @property
    def has_norms(self) -> bool:
        """Whether norms move."""
        return any(layer.norms for layer in self._layers)

    def shared_inputs(self) -> dict[str, list[str]]:
        """Weights of the model in groups with a common input, by the first of each."""
        attention, found = self._model.config.backbone["attention"], {}
        for i, layer in enumerate(self._layers):
            for names in sharing(list(layer.soft), attention):
                full = [f"{LAYER}{i}.{name}" for name in names]
                found[full[0]] = full
        return found

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything that moves, by name: changes in units of the scales, and of the norms."""
        found: dict[str, nn.Parameter] = {}
        for i, layer in enumerate(self._layers):
            found |= {f"{i}.{name}": parameter for name, parameter in layer.parameters().items()}
        return found

    def at(self, bits: int | Mapping[str, int], *, stored: bool = False) -> Callable[..., Any]:
        """The model at some width: called with `input_ids` (B, S), it gives `logits` (B, S, V).

        Args:
            bits: the width, or that of every weight by its full name.
            stored: with floats as they will be stored, and without gradients.
        """

        def run(input_ids: Tensor, **_: Any) -> Any:
            model, hidden_BSD = self._model, self._model.embed(input_ids)
            context = model.context(hidden_BSD)
            with torch.autocast(hidden_BSD.device.type, enabled=False):
                routes = model.routes(input_ids)
            for i, (layer, route) in enumerate(zip(self._layers, routes, strict=True)):
                inputs = (hidden_BSD, route, context)
                own = {
                    name: bits if isinstance(bits, int) else bits[f"{LAYER}{i}.{name}"]
                    for name in layer.soft
                }
                if stored:
                    hidden_BSD = layer.forward(own, True, *inputs)
                else:
                    hidden_BSD = checkpoint(layer.forward, own, False, *inputs, use_reentrant=False)
            return SimpleNamespace(logits=model.logits(hidden_BSD))

        return torch.no_grad()(run) if stored else run

    @torch.no_grad()
    def revert(self, bits: int | None) -> None:
        """Undo the training of one width, or of the norms (None)."""
        for layer in self._layers:
            if bits is None:
                for _, moved in layer.norms.values():
                    moved.zero_()
                continue
            for soft in layer.soft.values():
                soft.revert(bits)

    def finish(self) -> list[dict[str, Tensor]]:
        """What may have changed, by layer: scales and zeros as stored, and norms, by name."""
        return [layer.finish() for layer in self._layers]


class _Layer:
    """One layer: its integers, the floats that move, and what else it needs."""

    def __init__(
        self,
        model: StreamedModel,
        layer_idx: int,
        own: QuantizedLayer,
        widths: Sequence[int],
        norms: bool,
        low: tuple[int, torch.Generator] | None,
    ) -> None:
        self.soft: dict[str, SoftFloats] = {}
        for name in own.groups:
            nested = own.nested(name)
            _check_widths(nested, widths, norms)
            self.soft[name] = SoftFloats(nested, widths, *(low or ()))
        self.norms: dict[str, tuple[Tensor, nn.Parameter]] = {}
        for name, tensor in own.kept.items():
            if norms and name.endswith("norm.weight"):
                start = tensor.float()
                self.norms[name] = start, nn.Parameter(torch.zeros_like(start))
        self._module: FissileDecoderLayer = empty_layer(model.config, layer_idx)
        self._module.load_state_dict(own.kept, strict=False, assign=True)
        self._module.requires_grad_(False)

    def parameters(self) -> dict[str, nn.Parameter]:
        found = {name: moved for name, (_, moved) in self.norms.items()}
        for name, soft in self.soft.items():
            found |= {f"{name}.{key}": parameter for key, parameter in soft.named().items()}
        return found

    def forward(
        self,
        bits: Mapping[str, int],
        stored: bool,
        hidden_BSD: Tensor,
        route: Route | None,
        context: dict[str, Any],
    ) -> Tensor:
        state = {name: start * (1 + moved) for name, (start, moved) in self.norms.items()}
        for name, soft in self.soft.items():
            own = bits[name]
            state[name] = soft.finish().dequantize(own) if stored else soft.dense(own)
        with exact_routers(self._module):
            out_BSD: Tensor = functional_call(self._module, state, (hidden_BSD, route, context))
        return out_BSD

    @torch.no_grad()
    def finish(self) -> dict[str, Tensor]:
        changed = {name: start * (1 + moved) for name, (start, moved) in self.norms.items()}
        for name, soft in self.soft.items():
            nested = soft.finish()
            for k in soft.moved:
                theta = layout.encode_theta(nested.scale[k], nested.zero[k])
                changed[f"{name}.theta_{k}"] = theta
        return changed


def _check_widths(nested: NestedWeight, widths: Sequence[int], norms: bool) -> None:
    if not set(widths) <= set(nested.widths):
        raise ValueError(f"widths {list(widths)}, stored: {list(nested.widths)}")
    wide = nested.widths[-1] > layout.STORED_BITS
    if wide and (norms or max(widths) >= layout.STORED_BITS):
        raise ValueError(
            "6 and 8 bits rest on the floats of 4 and on the norms: neither may move with them"
        )
