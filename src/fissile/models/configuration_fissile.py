"""Configuration of a Fissile model: its backbone's own fields, plus routing and nested weights.

This file is copied into every artifact and must work there without the fissile package.
"""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any

from transformers import PretrainedConfig

from fissile.kernels.layout import LAYOUT_VERSION


class FissileConfig(PretrainedConfig):
    """Every field of the backbone's stock configuration, and the five below.

    Args:
        backbone: where the stock attention, norm and rotary classes live, and how a layer joins:
            `module`, `prefix`, `norm_layout` ("pre", "sandwich", "post"), `scaled_embedding`,
            `rotary_per_layer_type`, `sdpa`, `attention_linears`, `activation`.
        num_base_layers: decoder layers. `num_hidden_layers` counts one more when a pre-gating
            router keeps its keys and values in the cache as a layer of its own.
        routing: None for a dense model, else `kind`, `num_experts`, `top_k`, `shared_sizes`,
            `expert_sizes`, `per_layer`, `layout`, `blocks`, `router`, and optionally
            `restore` (see `modules.restored`), `selector` ("linear", "softmax" with `normalize`,
            "glu", "spectral") with `selector_rank`, `selection_bias`, `shared_gate`, `threshold`
            (one per layer) with `max_k` (see `routers.choose`). `router` holds `block`
            ("attention", "token", "readme"), `query_heads`, `inner_dim`, and `attention_dim` or,
            for "readme", `width`.
        nested: None for float weights, else `layout`, `widths`, `group_size`, `modules`, and
            optionally `groups` and `companding` by module, `tied` (see `layout`), and `mixed`: the
            width of every weight by name, of a stack one for all of its
            experts or a list of one for each.
        bits: width that is served, one of `nested["widths"]`; None with float weights, or where
            `mixed` says it.
    """

    model_type = "fissile"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    base_model_tp_plan = {  # noqa: RUF012
        "router.layers.*.q_proj": "colwise",
        "router.layers.*.k_proj": "colwise",
        "router.layers.*.v_proj": "colwise",
        "router.layers.*.o_proj": "rowwise",
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.shared.gate_proj": "colwise",
        "layers.*.mlp.shared.up_proj": "colwise",
        "layers.*.mlp.shared.down_proj": "rowwise",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        num_base_layers: int = 0,
        routing: dict[str, Any] | None = None,
        nested: dict[str, Any] | None = None,
        bits: int | None = None,
        rope_parameters: dict[str, Any] | None = None,
        layer_types: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.backbone = backbone or {}
        self.num_base_layers = num_base_layers
        self.routing = routing
        self.nested = nested
        self.bits = bits
        self.rope_parameters = rope_parameters
        self.layer_types: list[str] = layer_types or []
        # The base class looks at them while it reads the scaling of a rotary embedding, which is
        # before it sets what it is given.
        for name in ("max_position_embeddings", "original_max_position_embeddings"):
            if name in kwargs:
                setattr(self, name, kwargs[name])
        super().__init__(**kwargs)
        if routing and routing["kind"] != "static":
            # Serving engines read these three to recognise a mixture of experts.
            self.num_experts = routing["num_experts"]
            self.num_experts_per_tok = slots_of(routing)
            sizes = routing["expert_sizes"]
            self.moe_intermediate_size = sizes[0] if len(set(sizes)) == 1 else list(sizes)

    def check_bits(self) -> int | None:
        """Return the width to serve, or None with float weights.

        Raises:
            ValueError: `bits` is not one of the widths that were stored, or another version's
                layout.
        """
        if self.nested is None:
            if self.bits is not None:
                raise ValueError(
                    f"bits={self.bits}: this model has float weights; leave bits unset"
                )
            return None
        if self.nested.get("layout") != LAYOUT_VERSION:
            found = self.nested.get("layout")
            raise ValueError(f"nested.layout is {found!r}, this version reads {LAYOUT_VERSION}")
        widths = self.nested["widths"]
        bits = widths[-1] if self.bits is None else self.bits
        if bits not in widths:
            raise ValueError(f"bits={bits}: this model serves {', '.join(map(str, widths))}")
        return bits

    def widths_of(self, name: str) -> int | list[int]:
        """Width of a nested weight, or a list: that of every expert of a stack.

        Raises:
            ValueError: a width is not one of those that were stored.
        """
        bits = self.check_bits()
        assert self.nested is not None
        assert bits is not None
        found = bits if self.bits is not None else self.nested.get("mixed", {}).get(name, bits)
        several = found if isinstance(found, list) else [found]
        if not several or any(width not in self.nested["widths"] for width in several):
            raise ValueError(f"nested.mixed of {name}: {found} are not among the stored widths")
        return found


def slots_of(routing: dict[str, Any]) -> int:
    """Most experts that a token may choose: `max_k` where a threshold decides, else `top_k`."""
    return int(routing["max_k"] if routing.get("threshold") else routing["top_k"])


def stock_module(config: FissileConfig) -> ModuleType:
    """Import the transformers module that holds the backbone's classes.

    Raises:
        ValueError: the name in the config is no plain module name.
    """
    name = str(config.backbone["module"])
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"config.backbone.module {name!r} is not a module of transformers.models")
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def stock_class(config: FissileConfig, suffix: str) -> Any:
    """Return the backbone's class, e.g. "Attention" -> LlamaAttention."""
    return getattr(stock_module(config), config.backbone["prefix"] + suffix)
