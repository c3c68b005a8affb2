"""A converted model written as a stock mixture of experts: no remote code, no plug-in.

Pre-gated models (one expert a token): the residual stream gets spare dimensions that carry the
router's scores from layer to layer, where each layer's own router reads nothing else. The router
itself, one Llama-style block, becomes one more layer in front. The spare dimensions hold numbers so
small that no norm notices them, and norms are rescaled to the wider stream:
rms_D(h)^2 + eps d/D = (d/D)(rms_d(h)^2 + eps).

Layer-wise linear routers: stock classes weigh experts by their scores, ours add them up. Where a
class chooses groups of experts by the sum of their two best scores, every expert gets a group of
its own with an empty expert: the empty one's score decides, and the real one's is always one half,
so that weights are exactly equal. Elsewhere scores are multiplied by a small power of two, which
keeps their order and makes them about equal. K chosen ones weigh 1/K each after normalisation; K is
restored by the class or in the down projection.

Shapes: d model width, D width of the host, E routed experts, K chosen, S shared neurons, M neurons
per expert, C = H*E score dimensions of H router heads, A width of the router's attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from fissile.errors import UnsupportedModel
from fissile.export.ffn_pieces import add_expert, add_shared, expert_rows
from fissile.export.hosts import HOSTS, Host, Known, class_fields, host_width, problems
from fissile.export.pieces import Lowered, Piece, Target, heads_pieces
from fissile.families.artifact import float_shapes
from fissile.families.base import Dims, Family
from fissile.families.names import attention_and_norms
from fissile.families.table import dims_of

if TYPE_CHECKING:
    from torch import Tensor

CODE_SCALE = 2.0**-32
"""Size of the spare dimensions relative to the embeddings: its square is what norms see of them.
Being a power of two it is undone without rounding."""
CODE_GAIN = 2.0**64
"""Gain with which a layer's router reads them: one expert gets all the weight even in classes that
do not normalise, unless two scores are equal in float32."""


@dataclass(frozen=True)
class Measured:
    """What the lowering takes from the weights; the defaults serve to plan without them.

    Args:
        known: see `Known`.
        code_scale: size of the spare dimensions, a power of two.
        selector_scales: per layer, the power of two that a layer-wise router is multiplied by.
        made: tensors that no artifact stores, by name.
    """

    known: Known = field(default_factory=Known)
    code_scale: float = CODE_SCALE
    selector_scales: tuple[float, ...] = ()
    made: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)


def choose_host(
    name: str | None,
    family: Family,
    config: Mapping[str, Any],
    known: Known,
    hosts: Mapping[str, Host] = HOSTS,
) -> Host:
    """The class of that name, or without a name the first that holds the model exactly.

    Raises:
        UnsupportedModel: it cannot hold the model; all reasons are in the message.
    """
    wanted = [hosts[name]] if name is not None else list(hosts.values())
    found: list[str] = []
    for host in wanted:
        reasons = list(problems(host, family, config, known))
        if not reasons:
            return host
        found += reasons
    raise UnsupportedModel("; ".join(found))


def lower(host: Host, family: Family, config: Mapping[str, Any], measured: Measured) -> Lowered:
    """Describe a converted model as a stock class.

    Args:
        host: a class for which `problems` finds nothing.
        family: of the backbone.
        config: of the artifact.
        measured: what its weights say.
    """
    return _Lowering(host, family, config, measured).run()


class _Lowering:
    """One model and one host; methods give the targets of a part."""

    def __init__(
        self, host: Host, family: Family, config: Mapping[str, Any], measured: Measured
    ) -> None:
        self.host, self.family, self.config, self.measured = host, family, config, measured
        self.dims: Dims = dims_of(family, config)
        self.routing: dict[str, Any] = config["routing"]
        self.pregate = self.routing["kind"] == "pregate"
        self.tied = self.dims.tied and host.ties
        router = self.routing["router"] if self.pregate else {}
        self.attends = self.pregate and router.get("block", "attention") == "attention"
        self.experts, self.top_k = self.routing["num_experts"], self.routing["top_k"]
        # Of one expert a token the weight is one whatever its score.
        self.paired = host.correction and self.top_k > 1
        self.router_dim = router["attention_dim"] if self.attends else 0
        self.inner = router["inner_dim"] if self.attends else 0
        heads = self.dims.layers if self.routing["per_layer"] else 1
        self.codes = heads * self.experts if self.pregate else 0
        self.width = host_width(family, config, host, self.router_dim + self.codes)
        self.ratio = (self.dims.hidden / self.width) ** 0.5
        self.heads = self.dims.heads if host.head_size else self.width // self.dims.head_dim
        self.code_at = self.dims.hidden + self.router_dim
        # A key norm divides by sqrt(mean k^2 + eps) with the host's smaller eps: shrink k with it.
        self.key_factor = self.ratio if family.qk_norm == "head" else 1.0
        self.shared_size, self.expert_size = self._sizes()
        self.all_experts = self.experts * (2 if self.paired else 1)

    def _sizes(self) -> tuple[int, int]:
        """Neurons of the host's shared expert and of its routed experts, alike in all layers."""
        shared = list(self.routing["shared_sizes"])
        experts = list(map(max, expert_rows(self.config)))
        if self.host.shared == "none":
            both = [s + m for s, m in zip(shared, experts, strict=True)]
            return 0, max([*both, self.inner])
        size = max(experts)
        if self.host.shared == "plain":
            return -(-max(shared) // size) * size if any(shared) else size, size
        return max([*shared, self.inner, 32]), size

    def run(self) -> Lowered:
        """The whole model."""
        targets = [*self._embedding()]
        if self.attends:
            targets += self._router_layer()
        first = 1 if self.attends else 0
        for i in range(self.dims.layers):
            targets += self._layer(i, i + first)
        width = self.width
        final = Piece("model.norm.weight", factor=self.ratio)
        targets.append(Target("model.norm.weight", (width,), (final,)))
        if not self.tied:
            head = (Piece("model.embed_tokens.weight" if self.dims.tied else "lm_head.weight"),)
            targets.append(Target("lm_head.weight", (self.dims.vocab, width), head))
        lowered = Lowered(self._config(first), tuple(targets), self.measured.made, {})
        return replace(lowered, cost=self._cost(lowered, first))

    def _cost(self, lowered: Lowered, first: int) -> dict[str, Any]:
        stored = sum(prod(shape) for _, shape in float_shapes(self.family, self.config))
        return {
            "class": self.host.architecture,
            "extra_layers": first,
            "extra_dimensions": self.width - self.dims.hidden,
            "width": self.width,
            "expert_neurons": self.expert_size,
            "shared_neurons": self.shared_size,
            "computed_neurons": self.shared_size + self.top_k * self.expert_size,
            "computed_neurons_before": self._computed(),
            "parameters": lowered.parameters,
            "parameters_before": stored,
            "empty_experts": self.all_experts - self.experts,
            "weights_exact": self.pregate or self.top_k == 1 or self.paired,
        }

    def _computed(self) -> float:
        """FFN neurons that the artifact computes for a token, mean over layers."""
        rows = [self.top_k * sum(layer) / len(layer) for layer in expert_rows(self.config)]
        shared = self.routing["shared_sizes"]
        return round(sum(s + r for s, r in zip(shared, rows, strict=True)) / len(rows), 1)

    # -- outside the layers ----------------------------------------------------------------------

    def _embedding(self) -> Iterator[Target]:
        name = "model.embed_tokens.weight"
        pieces = [Piece(name)]
        if self.pregate and (not self.attends or self.routing.get("selection_bias")):
            pieces.append(Piece("made.codes", at=(0, self.code_at)))
        yield Target(name, (self.dims.vocab, self.width), tuple(pieces))

    def _config(self, first: int) -> dict[str, Any]:
        kept = ("vocab_size", "max_position_embeddings", "rope_parameters", "initializer_range")
        tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
        config = {k: self.config[k] for k in (*kept, *tokens) if k in self.config}
        config |= {
            "model_type": self.host.model_type,
            "architectures": [self.host.architecture],
            "hidden_size": self.width,
            "num_hidden_layers": self.dims.layers + first,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.dims.kv_heads,
            "head_dim": self.dims.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.config["rms_norm_eps"] * self.ratio**2,
            "tie_word_embeddings": self.tied,
            "attention_dropout": 0.0,
            "use_cache": True,
            "num_experts_per_tok": self.top_k,
            self.host.experts_field: self.all_experts,
            # Where an expert has a field of its own, this is the width of dense layers: there are
            # none.
            "intermediate_size": self.expert_size,
            self.host.expert_size_field: self.expert_size,
        }
        if self.host.shared == "plain":
            config["n_shared_experts"] = self.shared_size // self.expert_size
            config["routed_scaling_factor"] = float(self.top_k)
        elif self.host.shared == "gated":
            config["shared_expert_intermediate_size"] = self.shared_size
        config |= class_fields(self.host, self.family, self.config)
        if self.paired:
            config |= {"n_group": self.experts, "topk_group": self.top_k}
        return config

    # -- layers ----------------------------------------------------------------------------------

    def _attention(self, source: str, target: str) -> Iterator[Target]:
        """Attention and norms of a backbone layer."""
        dims, size = self.dims, self.dims.head_dim
        for name, shape in attention_and_norms(self.family, self.config).items():
            full, wanted = f"{source}.{name}", f"{target}.{name}"
            leaf, linear = name.rpartition(".")[2], name.split(".")[-2]
            if name.startswith("self_attn."):
                scale = self.key_factor if linear in ("q_proj", "k_proj") else 1.0
                wanted_shape = self._linear_shape(linear, leaf, shape)
                if linear == "q_proj" or (linear == "o_proj" and leaf == "weight"):
                    pieces = heads_pieces(
                        full,
                        dims.heads,
                        dims.kv_heads,
                        size,
                        self.heads,
                        over_columns=linear == "o_proj",
                        vector=leaf == "bias",
                        factor=scale,
                    )
                    yield Target(wanted, wanted_shape, tuple(pieces))
                else:
                    yield Target(wanted, wanted_shape, (Piece(full, factor=scale),))
            else:
                pieces_: tuple[Piece, ...] = (Piece(full, factor=self.ratio),)
                if self.codes and name.startswith("post_attention"):
                    pieces_ += (Piece("made.ones", at=(self.code_at, 0)),)
                yield Target(wanted, (self.width,), pieces_)

    def _linear_shape(self, linear: str, leaf: str, shape: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Shape in the host; norms over heads keep theirs."""
        size = self.dims.head_dim
        if linear in ("q_norm", "k_norm"):
            return shape
        rows = {
            "q_proj": self.heads * size,
            "k_proj": self.dims.kv_width,
            "v_proj": self.dims.kv_width,
            "o_proj": self.width,
        }[linear]
        if leaf == "bias":
            return (rows,)
        return (rows, self.heads * size if linear == "o_proj" else self.width)

    def _layer(self, i: int, j: int) -> Iterator[Target]:
        source, target = f"model.layers.{i}", f"model.layers.{j}"
        yield from self._attention(source, target)
        block, mlp = f"{target}.{self.host.block}", f"{source}.mlp"
        yield from self._gate(i, block)
        shared, sizes = self.routing["shared_sizes"][i], expert_rows(self.config)[i]
        inside = shared if self.host.shared == "none" else 0
        # Weights of K experts sum to one: shared neurons inside each are counted once, experts
        # must be counted K times. The sigmoid class multiplies by K itself.
        factor = 1.0 if self.host.scoring == "sigmoid" else float(self.top_k)
        for e in range(self.experts):
            pieces: dict[str, list[Piece]] = {"gate": [], "up": [], "down": []}
            if inside:
                add_shared(pieces, mlp, 1.0)
            add_expert(pieces, mlp, self.routing, i, e, sizes[e], inside, factor)
            place = 2 * e if self.paired else e
            yield from self._gated(f"{block}.experts.{place}", pieces, self.expert_size)
            if self.paired:
                empty: dict[str, list[Piece]] = {"gate": [], "up": [], "down": []}
                yield from self._gated(f"{block}.experts.{place + 1}", empty, self.expert_size)
        if self.host.shared != "none":
            pieces = {"gate": [], "up": [], "down": []}
            if shared:
                add_shared(pieces, mlp, 2.0 if self.host.shared == "gated" else 1.0)
            yield from self._shared(block, pieces)

    def _gate(self, i: int, block: str) -> Iterator[Target]:
        shape, name = (self.all_experts, self.width), f"{block}.gate.weight"
        if self.pregate:
            head = i if self.routing["per_layer"] else 0
            at = (0, self.code_at + head * self.experts)
            yield Target(name, shape, (Piece("made.gate", at=at),))
            return
        scales = self.measured.selector_scales
        factor, source = scales[i] if scales else 1.0, f"model.layers.{i}.mlp.selector.weight"
        if not self.paired:
            yield Target(name, shape, (Piece(source, factor=factor),))
        else:
            rows = range(self.experts)
            pieces = (Piece(source, (2 * e + 1, 0), rows=(e, e + 1), factor=factor) for e in rows)
            yield Target(name, shape, tuple(pieces))
        if self.host.correction:
            bias = (Piece(f"made.correction.{i}"),)
            name = f"{block}.gate.e_score_correction_bias"
            yield Target(name, (self.all_experts,), bias, exact=True)

    def _gated(self, name: str, pieces: Mapping[str, list[Piece]], size: int) -> Iterator[Target]:
        gate, up, down = self.host.linears
        if ".experts." not in name:
            gate, up, down = "gate_proj", "up_proj", "down_proj"
        yield Target(f"{name}.{gate}.weight", (size, self.width), tuple(pieces["gate"]))
        yield Target(f"{name}.{up}.weight", (size, self.width), tuple(pieces["up"]))
        yield Target(f"{name}.{down}.weight", (self.width, size), tuple(pieces["down"]))

    def _shared(self, block: str, pieces: Mapping[str, list[Piece]]) -> Iterator[Target]:
        yield from self._gated(f"{block}.{self.host.shared_name}", pieces, self.shared_size)
        if self.host.shared == "gated":
            # sigmoid(0) is one half exactly; the down projections are twice as large.
            yield Target(f"{block}.shared_expert_gate.weight", (1, self.width))

    # -- the router as layer 0 -------------------------------------------------------------------

    def _router_layer(self) -> Iterator[Target]:
        dims, size, scale = self.dims, self.dims.head_dim, self.measured.code_scale
        router, target = "model.router", "model.layers.0"
        attention = f"{router}.layers.{dims.layers}"
        heads = self.routing["router"].get("query_heads", dims.kv_heads)
        norm_in = (Piece(f"{router}.norm_in", factor=self.ratio),)
        norm_out = (Piece(f"{router}.norm_out", factor=self.ratio),)
        # The attention's output lies right behind the d dimensions, as norm_out expects it.
        yield Target(f"{target}.input_layernorm.weight", (self.width,), norm_in)
        yield Target(f"{target}.post_attention_layernorm.weight", (self.width,), norm_out)
        for linear in ("q_proj", "k_proj", "v_proj", "o_proj"):
            name, source = f"{target}.self_attn.{linear}", f"{attention}.{linear}.weight"
            pieces: tuple[Piece, ...] = (Piece(source),)
            if linear == "q_proj":
                pieces = tuple(heads_pieces(source, heads, dims.kv_heads, size, self.heads))
            elif linear == "o_proj":
                placed = heads_pieces(
                    source,
                    heads,
                    dims.kv_heads,
                    size,
                    self.heads,
                    at=dims.hidden,
                    over_columns=True,
                    factor=scale,
                )
                pieces = tuple(placed)
            yield Target(f"{name}.weight", self._linear_shape(linear, "weight"), pieces)
            biased = self.host.bias != "none" and self.family.attention_bias == "qkv"
            if biased and linear != "o_proj":
                yield Target(f"{name}.bias", self._linear_shape(linear, "bias"))
        block = f"{target}.{self.host.block}"
        yield Target(f"{block}.gate.weight", (self.experts, self.width))
        gated = self.host.shared == "gated"
        pieces_of = self._router_mlp(2.0 if gated else 1.0)
        empty: dict[str, list[Piece]] = {"gate": [], "up": [], "down": []}
        for e in range(self.experts):
            own = empty if gated else pieces_of
            yield from self._gated(f"{block}.experts.{e}", own, self.expert_size)
        if gated:
            yield from self._shared(block, pieces_of)

    def _router_mlp(self, factor: float) -> dict[str, list[Piece]]:
        hidden, scale = self.dims.hidden, self.measured.code_scale
        joint = hidden + self.router_dim
        found: dict[str, list[Piece]] = {}
        for part in ("gate", "up"):
            source = f"model.router.{part}_proj.weight"
            found[part] = [
                Piece(source, columns=(0, hidden)),
                Piece(source, at=(0, hidden), columns=(hidden, joint), factor=1.0 / scale),
            ]
        down = Piece("model.router.down_proj.weight", at=(self.code_at, 0), factor=scale * factor)
        found["down"] = [down]
        return found
