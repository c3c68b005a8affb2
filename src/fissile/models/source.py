"""Where a model's float weights come from: a checkpoint on disk, or units of a run.

All sources answer in canonical names; see `StateSource` in stream.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fissile import families
from fissile.errors import UnsupportedModel
from fissile.families.artifact import float_shapes
from fissile.io.headers import open_checkpoint_headers
from fissile.io.reader import TensorReader, check_finite
from fissile.io.units import UnitStore
from fissile.kernels.layout import (
    dequantize,
    experts_by_width,
    segment_names,
    stack_names,
    stored_names,
)
from fissile.models.build import dense_config, empty_model, rotary_of, with_nested
from fissile.models.configuration_fissile import FissileConfig
from fissile.models.modeling_fissile import FissileForCausalLM
from fissile.models.stream import StateSource

LAYER = "model.layers."


class CheckpointSource:
    """A stock checkpoint of a known family, or a Fissile artifact (decoded at `bits`).

    Args:
        folder: the checkpoint.
        bits: width at which nested weights are decoded; default the widest stored.
        check: refuse tensors that hold NaN or infinite values.

    Raises:
        UnsupportedModel: no family, or a feature that is not handled.
        CorruptCheckpoint: files, names or shapes are not what config.json promises.
    """

    def __init__(self, folder: Path, bits: int | None = None, *, check: bool = True) -> None:
        self.headers = open_checkpoint_headers(folder)
        self.folder, stock = self.headers.folder, self.headers.config
        self.family = families.find(stock)
        families.check_checkpoint(self.headers, self.family)
        self._reader, self._check = TensorReader(self.headers), check
        self.artifact = stock.get("model_type") == FissileConfig.model_type
        if self.artifact:
            stored = FissileConfig.from_dict(stock)
            self.nested, stored.bits = stored.nested, bits
            self.bits = stored.check_bits()
            # Without a width asked for, each weight has that of the plan, where there is one.
            self._mixed = (self.nested or {}).get("mixed", {}) if bits is None else {}
            self.config = with_nested(stored, None, None)
        else:
            if bits is not None:
                raise UnsupportedModel(f"{folder}: bits={bits}, but this model has float weights")
            self.nested, self.bits = None, None
            self.config = dense_config(stock, self.family)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read from disk so far."""
        return self._reader.bytes_read

    def layer_state(self, layer_idx: int) -> dict[str, Tensor]:
        """Tensors of one layer, named relative to it, float32."""
        prefix = f"{LAYER}{layer_idx}."
        if not self.artifact:
            pairs = families.layer_names(self.family, self.headers.config, layer_idx).items()
            return {name.removeprefix(prefix): self._dense(name, place) for name, place in pairs}
        state = self._float_state(lambda name: name.startswith(prefix))
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}

    def outer_state(self) -> dict[str, Tensor]:
        """Everything outside the layers under its full name, float32."""
        if not self.artifact:
            pairs = families.outer_names(self.family, self.headers.config).items()
            return {name: self._dense(name, place) for name, place in pairs}
        return self._float_state(lambda name: not name.startswith(LAYER))

    def stored(self, name: str) -> Tensor:
        """A tensor of the files as it lies there."""
        return self._reader.load(name)

    def width_of(self, name: str) -> int | list[int] | None:
        """Bits that a nested weight is served at, of a stack one or a list of one for each expert.

        None where weights are floats.
        """
        return self._mixed.get(name, self.bits)

    def parts(self, name: str) -> dict[str, Tensor]:
        """Packed parts of a nested weight of an artifact, by suffix, those of all widths."""
        assert self.nested is not None
        names = stored_names(self.nested["widths"], bool(self.nested.get("tied")))
        return {suffix: self.stored(f"{name}.{suffix}") for suffix in names}

    def served_parts(self, name: str, bits: int | list[int]) -> dict[str, Tensor]:
        """Packed parts of a nested weight that its width, or its experts' widths, need."""
        assert self.nested is not None
        widths = [bits] if isinstance(bits, int) else bits
        names = stack_names(widths, self.nested["widths"], bool(self.nested.get("tied")))
        return {suffix: self.stored(f"{name}.{suffix}") for suffix in names}

    def _float_state(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        shapes = float_shapes(self.family, self.headers.config)
        names = [name for name, _ in shapes if wanted(name)]
        return {name: self._stored(name) for name in names}

    def _dense(self, name: str, source: families.Source) -> Tensor:
        if source.experts:
            return self._stacked(source)
        if source.rows is None:
            tensor = self._reader.load(source.name, torch.float32)
        else:
            tensor = self._reader.load_rows(source.name, *source.rows, dtype=torch.float32)
        return self._finite(source.name, tensor)

    def _stacked(self, source: families.Source) -> Tensor:
        """Experts one above the other, (E, rows, columns); one tensor of one expert at a time."""
        stack = torch.empty(source.shape)
        for expert, names in zip(stack, source.experts, strict=True):
            for part, name in zip(expert.split(source.stored[0]), names, strict=True):
                part.copy_(self._finite(name, self._reader.load(name, torch.float32)))
        return stack

    def _stored(self, name: str) -> Tensor:
        if self.nested is None or name not in self.nested["modules"]:
            return self._finite(name, self._reader.load(name, torch.float32))
        bits = self.width_of(name)
        assert bits is not None
        companding = self.nested.get("companding", {}).get(name, 1.0)
        parts = self.served_parts(name, bits)
        if isinstance(bits, int):
            return self._finite(name, dequantize(parts, bits, companding))
        return self._finite(name, _dequantize_stack(parts, bits, companding))

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if self._check:
            check_finite(name, tensor, path=self._reader.path(name) if not self.nested else None)
        return tensor


def _dequantize_stack(
    parts: Mapping[str, Tensor], bits_E: Sequence[int], companding: float = 1.0
) -> Tensor:
    """Weights of a stack whose experts have widths of their own: float32 (E, N, K).

    Args:
        parts: what `stack_names` lists for `bits_E`, of all experts.
        bits_E: width of every expert.
        companding: of this weight, see `COMPANDED`.

    Raises:
        ValueError: a part is missing, or a width is not stored.
    """
    quarter = parts["plane_2"]
    found = torch.empty(*quarter.shape[:-1], 4 * quarter.shape[-1], device=quarter.device)
    for bits, experts in experts_by_width(bits_E).items():
        own = {name: parts[name][experts] for name in segment_names(bits) if name in parts}
        found[experts] = dequantize(own, bits, companding)
    return found


class UnitSource:
    """A model that a stage left in its units: "outer" and one unit a layer."""

    def __init__(self, config: FissileConfig, store: UnitStore) -> None:
        self.config, self._store = config, store

    def layer_state(self, layer_idx: int) -> dict[str, Tensor]:
        """Tensors of one layer, named relative to it, float32."""
        return self._store.load(f"layer_{layer_idx:03d}")[0]

    def outer_state(self) -> dict[str, Tensor]:
        """Everything outside the layers under its full name, float32."""
        return self._store.load("outer")[0]


class MemorySource:
    """A model held as one dictionary of canonical names."""

    def __init__(self, config: FissileConfig, state: dict[str, Tensor]) -> None:
        self.config, self._state = config, state

    def layer_state(self, layer_idx: int) -> dict[str, Tensor]:
        """Tensors of one layer, named relative to it."""
        prefix = f"{LAYER}{layer_idx}."
        return {k.removeprefix(prefix): v for k, v in self._state.items() if k.startswith(prefix)}

    def outer_state(self) -> dict[str, Tensor]:
        """Everything outside the layers under its full name."""
        return {k: v for k, v in self._state.items() if not k.startswith(LAYER)}


def load_source(source: StateSource, dtype: torch.dtype = torch.float32) -> FissileForCausalLM:
    """The whole model of a source in memory: evaluation mode, copies of all tensors in a type."""
    outer = source.outer_state()
    state = {name: tensor.to(dtype, copy=True) for name, tensor in outer.items()}
    for i in range(source.config.num_base_layers):
        for name, tensor in source.layer_state(i).items():
            state[f"{LAYER}{i}.{name}"] = tensor.to(dtype, copy=True)
    return filled(empty_model(source.config), state)


def filled(model: FissileForCausalLM, state: dict[str, Tensor]) -> FissileForCausalLM:
    """Give an empty model its tensors and what is computed rather than stored.

    Args:
        model: from `empty_model`; its config says what is tied and scaled.
        state: every tensor by name; lm_head may be absent when tied.
    """
    config = model.config
    if "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = rotary_of(config)
    if config.backbone["scaled_embedding"]:
        scale = torch.tensor(config.hidden_size**0.5)
        model.model.embed_tokens.embed_scale = scale
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def save_units(source: StateSource, store: UnitStore) -> None:
    """Keep a source's tensors as units that `UnitSource` reads, one layer in memory at a time."""
    if not store.has("outer"):
        store.save("outer", source.outer_state())
    for i in range(source.config.num_base_layers):
        if not store.has(f"layer_{i:03d}"):
            store.save(f"layer_{i:03d}", source.layer_state(i))
