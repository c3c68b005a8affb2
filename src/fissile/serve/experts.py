"""A model whose routed experts stay in their files: everything else is in memory.

Shapes: T tokens, D model width, K slots per token, R tokens times experts.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from fissile.errors import CorruptCheckpoint, UnsupportedModel
from fissile.io.headers import open_checkpoint_headers
from fissile.io.reader import TensorReader
from fissile.kernels.columns import (
    FEW_ROWS,
    multiply,
    multiply_decoded,
    to_columns,
    unavailable,
)
from fissile.kernels.layout import dequantize
from fissile.models import load_config
from fissile.models.build import empty_model
from fissile.models.configuration_fissile import FissileConfig
from fissile.models.modeling_fissile import FissileDecoderLayer, FissileForCausalLM
from fissile.models.source import filled
from fissile.serve.reader import WEIGHTS
from fissile.serve.store import ExpertStore, Parts


class StoredExperts(nn.Module):
    """The experts of one layer, taken from a store one at a time.

    They are computed in the order in which they arrive and summed in the order of the resident
    model, so that the bits of the result depend neither on the order nor on what was in memory.

    Args:
        store: where the experts are.
        config: of the model.
        layer_idx: the layer.
    """

    def __init__(self, store: ExpertStore, config: FissileConfig, layer_idx: int) -> None:
        super().__init__()
        self.store, self.layer_idx = store, layer_idx
        self.act_fn = ACT2FN[config.backbone["activation"]]
        prefix = f"model.layers.{layer_idx}.mlp.experts"
        tables = (config.nested or {}).get("companding", {})
        self.companding = [tables.get(f"{prefix}.{weight}", 1.0) for weight in WEIGHTS]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, (T, D)."""
        token_R, slot_R = torch.where(top_k_weights != 0)
        expert_R = top_k_index[token_R, slot_R]
        chosen, tokens = torch.unique(expert_R, return_counts=True)
        counts = dict(zip(chosen.tolist(), tokens.tolist(), strict=True))
        few = self._few(hidden_states, top_k_index)
        y_RD = hidden_states.new_empty(len(token_R), hidden_states.shape[-1])
        for expert in self.store.reach(self.layer_idx, counts):
            rows = torch.where(expert_R == expert)[0]
            one = partial(self._compute, hidden_states[token_R[rows]], few)
            y_RD[rows] = self.store.fetch(self.layer_idx, expert, one)
        y_RD = y_RD * top_k_weights[token_R, slot_R, None].to(y_RD.dtype)
        out_TD = torch.zeros_like(hidden_states)
        if few:
            return out_TD.index_add_(0, token_R, y_RD)
        for expert in sorted(counts):
            rows = torch.where(expert_R == expert)[0]
            out_TD = out_TD.index_add(0, token_R[rows], y_RD[rows])
        return out_TD

    def _few(self, x_TD: Tensor, index_TK: Tensor) -> bool:
        """Whether the resident model would multiply all of these tokens and experts at once."""
        nested = self.store.widths.widest is not None
        columns = x_TD.device.type == "cpu" and unavailable() is None
        return nested and columns and index_TK.numel() <= FEW_ROWS * self.store.files.num_experts

    def _compute(self, x_RD: Tensor, few: bool, parts: Parts, bits: int | None) -> Tensor:
        if bits is None:
            gate_up, down = (parts[weight, ""].to(x_RD.dtype) for weight in WEIGHTS)
            gate, up = nn.functional.linear(x_RD, gate_up).chunk(2, dim=-1)
            return nn.functional.linear(self.act_fn(gate) * up, down)
        gate, up = self._product(x_RD, few, parts, bits, 0).chunk(2, dim=-1)
        return self._product(self.act_fn(gate) * up, few, parts, bits, 1)

    def _product(self, x_RK: Tensor, few: bool, parts: Parts, bits: int, which: int) -> Tensor:
        """Return x W^T with the bits that `NestedTensor.product` gives."""
        own = {part: tensor for (name, part), tensor in parts.items() if name == WEIGHTS[which]}
        companding = self.companding[which]
        if x_RK.device.type != "cpu" or unavailable() is not None:
            weight = dequantize(own, bits, companding)
            return nn.functional.linear(x_RK, weight.to(x_RK.dtype))
        columns = to_columns(own, bits, companding)
        if few or len(x_RK) <= FEW_ROWS:
            return multiply(x_RK, columns).to(x_RK.dtype)
        return multiply_decoded(x_RK, columns)


def load_without_experts(
    folder: Path, bits: int | None = None, dtype: torch.dtype = torch.float32
) -> FissileForCausalLM:
    """Load an artifact on the CPU but for its routed experts, for `attach` to put a store there.

    Args:
        folder: the artifact, or a run folder with one in `model/`.
        bits: width of what is nested outside of the experts; default the artifact's.
        dtype: of activations and of tensors that are not nested.

    Raises:
        UnsupportedModel: there are no routed experts.
        CorruptCheckpoint: the artifact cannot be read as one.
    """
    headers = open_checkpoint_headers(folder)
    config = load_config(headers.folder)
    config.bits = config.bits if bits is None else bits
    model = empty_model(config)
    for layer in model.model.layers:
        assert isinstance(layer, FissileDecoderLayer)
        if layer.mlp.experts is None:
            raise UnsupportedModel(f"{headers.folder}: holds no experts that can be read apart")
        layer.mlp.experts = None
    state: dict[str, Tensor] = {}
    with TensorReader(headers) as reader:
        for name in model.state_dict():
            if name != "lm_head.weight" or not config.tie_word_embeddings:
                tensor = reader.load(name)
                state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    try:
        return filled(model, state).requires_grad_(False).eval()
    except RuntimeError as err:
        raise CorruptCheckpoint(f"{headers.folder}: {' '.join(str(err).split())}") from None


def attach(model: FissileForCausalLM, store: ExpertStore) -> FissileForCausalLM:
    """Let a model without experts take them from `store`; returns the model."""
    for layer_idx, layer in enumerate(model.model.layers):
        assert isinstance(layer, FissileDecoderLayer)
        layer.mlp.experts = StoredExperts(store, model.config, layer_idx)
    return model
