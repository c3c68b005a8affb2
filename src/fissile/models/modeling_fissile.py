"""The model an artifact runs as: a stock backbone whose FFNs are shared and routed experts.

Attention, norms and rotary embeddings are the backbone's own classes from transformers. This file
is copied into every artifact and must work there without the fissile package. Rules that serving
engines impose are marked "engine:".

Shapes: B batch, S sequence, T = B*S tokens, D model width, V vocabulary, E routed experts,
K chosen per token, L layers.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from fissile.kernels.layout import stack_names, stored_names
from fissile.models.configuration_fissile import FissileConfig, stock_class
from fissile.models.modules_fissile import FissileExperts, RoutedMLP, nest_linears
from fissile.models.nested_fissile import one_step
from fissile.models.routers_fissile import (
    PreGateRouter,
    ReadMeRouter,
    Route,
    Selector,
    build_router,
    choose_layers,
)
from fissile.models.stacks_fissile import NestedStack


def build_embedding(config: FissileConfig) -> nn.Embedding:
    """The backbone's token embedding, scaled where the family scales it."""
    if not config.backbone["scaled_embedding"]:
        return nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
    scaled = stock_class(config, "TextScaledWordEmbedding")
    scale = config.hidden_size**0.5
    return scaled(config.vocab_size, config.hidden_size, config.pad_token_id, embed_scale=scale)


def unserved(config: FissileConfig) -> list[str]:
    """Patterns of the stored parts of widths that are not served; they stay on disk."""
    nested = config.nested
    if config.check_bits() is None or nested is None:
        return []
    kept = (nested["widths"], bool(nested.get("tied")))
    stored = set(stored_names(*kept))
    mixed = config.bits is None and "mixed" in nested
    owners: dict[tuple[str, ...], list[str]] = {}
    for name in nested["modules"]:
        widths = config.widths_of(name)
        needed = stack_names([widths] if isinstance(widths, int) else widths, *kept)
        owners.setdefault(needed, []).append(name)
    patterns = []
    for needed, names in owners.items():
        left = "|".join(sorted(stored - set(needed)))
        owner = f"({'|'.join(map(re.escape, names))})" if mixed else ""
        if left:
            patterns.append(rf"{owner}\.({left})$")
    return patterns


def build_context(
    config: FissileConfig,
    rotary: nn.Module,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
) -> dict[str, dict[str, Any]]:
    """Attention mask and rotary embedding of every attention type in the model.

    Returns:
        Attention type ("full_attention", "sliding_attention") to the keyword arguments
        `attention_mask`, `position_embeddings`, `position_ids`, `past_key_values` of a layer.
    """
    if position_ids is None:
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        steps = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        position_ids = (steps + past).unsqueeze(0)
    make = {
        "full_attention": create_causal_mask,
        "sliding_attention": create_sliding_window_causal_mask,
    }
    context = {}
    for kind in sorted(set(config.layer_types)):
        mask = make[kind](
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        which = (kind,) if config.backbone["rotary_per_layer_type"] else ()
        context[kind] = {
            "attention_mask": mask,
            "position_embeddings": rotary(inputs_embeds, position_ids, *which),
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }
    return context


class FissileDecoderLayer(nn.Module):
    """Stock attention and norms around a routed MLP.

    `norm_layout` says where the norms sit: "pre" before each half, "post" after each half (OLMo 2),
    "sandwich" before and after (Gemma).
    """

    def __init__(self, config: FissileConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        self.layout = config.backbone["norm_layout"]
        self.self_attn = stock_class(config, "Attention")(config, layer_idx)
        nest_linears(config, self.self_attn, f"model.layers.{layer_idx}.self_attn")
        self.mlp = RoutedMLP(config, layer_idx)
        names = {
            "pre": ("input_layernorm", "post_attention_layernorm"),
            "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
            "sandwich": (
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ),
        }[self.layout]
        norm = stock_class(config, "RMSNorm")
        for name in names:
            self.add_module(name, norm(config.hidden_size, eps=config.rms_norm_eps))

    def norm(self, name: str, x_BSD: Tensor) -> Tensor:
        """Apply one of the layer's norms, "input_layernorm" ..., to (B, S, D)."""
        return self.get_submodule(name)(x_BSD)

    def attend(self, hidden_BSD: Tensor, context: dict[str, Any], **kwargs: Any) -> Tensor:
        """First half of the layer: the residual stream after attention, (B, S, D)."""
        x = hidden_BSD if self.layout == "post" else self.norm("input_layernorm", hidden_BSD)
        y, _ = self.self_attn(hidden_states=x, **context[self.layer_type], **kwargs)
        after = self.layout != "pre"
        return hidden_BSD + (self.norm("post_attention_layernorm", y) if after else y)

    def mlp_input(self, residual_BSD: Tensor) -> Tensor:
        """What the MLP reads from the residual stream, (B, S, D)."""
        if self.layout == "post":
            return residual_BSD
        if self.layout == "pre":
            return self.norm("post_attention_layernorm", residual_BSD)
        return self.norm("pre_feedforward_layernorm", residual_BSD)

    def combine(self, residual_BSD: Tensor, y_BSD: Tensor) -> Tensor:
        """Second half of the layer: add the MLP's output to the residual stream."""
        if self.layout != "pre":
            y_BSD = self.norm("post_feedforward_layernorm", y_BSD)
        return residual_BSD + y_BSD

    def forward(
        self,
        hidden_states: Tensor,
        route: Route | None = None,
        context: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        assert context is not None
        residual = self.attend(hidden_states, context, **kwargs)
        return self.combine(residual, self.mlp(self.mlp_input(residual), route))


class FissilePreTrainedModel(PreTrainedModel):
    """Loading rules: the width is checked, and a tensor that is missing is an error."""

    config_class = FissileConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _no_split_modules = ["FissileDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": FissileDecoderLayer}  # noqa: RUF012

    def __init__(self, config: FissileConfig, *args: Any, **kwargs: Any) -> None:
        config.check_bits()
        if not config.backbone["sdpa"] and config._attn_implementation in (None, "sdpa"):
            config._attn_implementation = "eager"
        if config._experts_implementation is None:
            # Grouped and batched products are taken where they are asked for by name.
            config._experts_implementation = "eager"
        super().__init__(config, *args, **kwargs)
        # engine: what is listed here is never looked at, so nothing that is served may be listed.
        self._keys_to_ignore_on_load_unexpected = unserved(config)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Always: transformers looks for the experts' decorator in this file, it is in another."""
        return True

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but absent or misshapen tensors raise instead of staying random.

        Raises:
            ValueError: tensors are missing or have another shape, or `bits` is not stored.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if names := sorted(map(str, info[kind])):
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ValueError(f"checkpoint and model disagree: {kind}: {names[0]}{more}")
        return (model, info) if output_loading_info else model

    def get_parameter_or_buffer(self, target: str) -> Any:
        """As in transformers; a stack of several widths has none, but answers to its parts."""
        path, _, name = target.rpartition(".")
        module = self.get_submodule(path)
        if isinstance(module, NestedStack) and name in module.segments:
            return getattr(module, name)
        return super().get_parameter_or_buffer(target)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # The functions of `init` leave tensors alone that came from the checkpoint.
        if isinstance(module, FissileExperts):
            for weight in (module.gate_up_proj, module.down_proj):
                init.normal_(weight, std=self.config.initializer_range)
        elif isinstance(module, RoutedMLP | Selector | PreGateRouter | ReadMeRouter):
            for name, weight in module.named_parameters(recurse=False):
                if name.startswith("norm"):
                    init.ones_(weight)
                elif name in ("restore", "balance", "bias"):
                    init.zeros_(weight)
                else:
                    init.normal_(weight, std=self.config.initializer_range)
        elif hasattr(module, "scalar_embed_scale"):
            init.constant_(module.embed_scale, module.scalar_embed_scale)
        elif isinstance(module, stock_class(self.config, "RotaryEmbedding")):
            # Computed buffers are in no checkpoint and hold nothing after loading on "meta".
            with torch.device("cpu"):
                fresh = type(module)(self.config)
            for name, buffer in fresh.named_buffers():
                init.copy_(module.get_buffer(name), buffer)


class FissileModel(FissilePreTrainedModel):
    """Embeddings, router, layers and final norm."""

    def __init__(self, config: FissileConfig) -> None:
        super().__init__(config)
        layers = config.num_base_layers
        self.embed_tokens = build_embedding(config)
        self.router = build_router(config)
        self.layers = nn.ModuleList([FissileDecoderLayer(config, i) for i in range(layers)])
        self.norm = stock_class(config, "RMSNorm")(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = stock_class(config, "RotaryEmbedding")(config)
        self.post_init()

    def route(
        self,
        inputs_embeds: Tensor,
        input_ids: Tensor | None,
        context: dict[str, Any],
        **kwargs: Any,
    ) -> list[Route | None]:
        """One route per layer; the same one for all unless the router has per-layer heads."""
        if self.router is None:
            return [None] * len(self.layers)
        where = context.get("full_attention", {})
        logits_HTE = self.router(inputs_embeds, input_ids, **where, **kwargs)
        train = self.training and torch.is_grad_enabled()
        return [*choose_layers(self.config, logits_HTE, self.router.balance, train)]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if "bits" in kwargs:
            raise ValueError("bits is chosen when a model is loaded, one for all tokens of a batch")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        context = build_context(
            self.config,
            self.rotary_emb,
            inputs_embeds,
            attention_mask,
            position_ids,
            past_key_values,
        )
        routes = self.route(inputs_embeds, input_ids, context, **kwargs)
        hidden_states = inputs_embeds
        with one_step(hidden_states):
            for layer, route in zip(self.layers, routes, strict=True):
                hidden_states = layer(hidden_states, route, context, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )


class FissileForCausalLM(FissilePreTrainedModel, GenerationMixin):
    """FissileModel with a language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: FissileConfig) -> None:
        super().__init__(config)
        self.model = FissileModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def logits(self, hidden_BSD: Tensor) -> Tensor:
        """Vocabulary logits (B, S, V), soft-capped where the backbone does."""
        logits = self.lm_head(hidden_BSD)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.logits(outputs.last_hidden_state[:, kept, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
