"""Constants and shapes from which peak memory, disk and time of a stage are computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fissile.families.base import Dims
from fissile.quant.effort import ERROR_VALUES


@dataclass(frozen=True)
class Costs:
    """Constants of the model; everything else follows from shapes and the recipe.

    Attributes:
        interpreter: python with torch, transformers and this package imported.
        allocator: share of what a stage works with that freed blocks keep: the C library returns
            blocks above 32 MiB at once, smaller ones stay in the heap in pieces.
        float_bytes: weights, activations and the stream are float32 while they are worked on.
        ffn_copies: activations of width F alive at once in a gated FFN (act, up, product).
        attend_copies: activations of width D alive at once in attention and its norms.
        held_copies: activations of width D alive beside the FFN's.
        hessian_add: bytes per entry while tokens are added: float64 sums (8), a float32 product (4)
            and its float64 copy (8).
        hessian_prepare: bytes per entry while a Hessian is factored: float64 sums (8), mean (4) and
            normalised copy (4) in float32, the factor in float64 (8) and what it is made of (4).
        hessian_solve: bytes per entry during the solve: sums (8), mean, copy and factor (12).
        solver_chunk: bytes of the errors of one chunk of rows at all widths, in float32.
        solver_buffers: buffers of about that size that are alive at once.
        expert_hessians: bytes of experts' Hessians in float64 that are alive at once.
        written_windows: most windows that the dense model writes at once.
        written_cache: most bytes of keys and values while the dense model writes text.
        store_copies: bytes per weight of a linear while it is decoded and its loss measured.
        train_copies_d: activations of width D per layer that autograd keeps.
        train_copies_f: activations of width F per layer that autograd keeps.
        logit_copies: arrays of tokens x vocabulary in a distillation step, forward and backward.
        scoring: logits of a scoring chunk (2^24 float32) with its softmax.
        gflops_core: slowest and fastest plausible float32 rate of one core, in products.
        floor_seconds: per stage, what no rate removes (reading, writing, hashing).
    """

    interpreter: float = 450e6
    allocator: float = 0.15
    float_bytes: int = 4
    ffn_copies: float = 3.0
    attend_copies: float = 8.0
    held_copies: float = 4.0
    hessian_add: float = 20.0
    hessian_prepare: float = 28.0
    hessian_solve: float = 20.0
    solver_chunk: float = 4.0 * ERROR_VALUES
    solver_buffers: float = 7.0
    expert_hessians: float = 2.0**30
    written_windows: int = 64
    written_cache: float = 2.0**30
    store_copies: float = 16.0
    train_copies_d: float = 14.0
    train_copies_f: float = 5.0
    logit_copies: float = 6.0
    scoring: float = 200e6
    gflops_core: tuple[float, float] = (8.0, 50.0)
    floor_seconds: float = 1.0


COSTS = Costs()


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of the recipe's work that costs depend on.

    Attributes:
        dims: sizes of the backbone.
        sdpa: attention never holds all scores at once.
        shared: neurons always computed, S (F in a dense model).
        expert: neurons of a routed expert, M.
        num_experts: routed experts, E; 0 in a dense model.
        top_k: experts chosen per token.
        attention: (outputs, inputs) of every attention linear.
        artifact_bytes: tensors of the artifact as stored.
        layer_bytes: those of one of its layers.
        computed: share of the source's FFN neurons that it computes for a token; 1 if dense.
        widest: neurons of its largest expert; None if dense.
        domains: domains of the calibration text, for the size of statistics.
    """

    dims: Dims
    sdpa: bool
    shared: int
    expert: int
    num_experts: int
    top_k: int
    attention: tuple[tuple[int, int], ...]
    artifact_bytes: int
    layer_bytes: int
    computed: float = 1.0
    widest: int | None = None
    domains: int = 8

    @property
    def at_once(self) -> int:
        """Neurons of the source that are computed at once: of one expert, or all."""
        return self.widest or self.dims.ffn

    @property
    def active_weights(self) -> float:
        """Weights of one layer of the source that are multiplied for a token."""
        idle = 3 * self.dims.hidden * self.dims.ffn * (1 - self.computed)
        return self.layer_weights - idle

    @property
    def layer_weights(self) -> int:
        """Weights of one dense layer."""
        return sum(o * i for o, i in self.attention) + 3 * self.dims.hidden * self.dims.ffn

    @property
    def outer_weights(self) -> int:
        """Weights outside the layers: embeddings, and the head where it is not tied."""
        return self.dims.vocab * self.dims.hidden * (1 if self.dims.tied else 2)

    @property
    def total_weights(self) -> int:
        """All weights of the dense model."""
        return self.dims.layers * self.layer_weights + self.outer_weights

    def linears(self, with_attention: bool) -> list[tuple[int, int, int]]:
        """(count, outputs, inputs) of what is solved together: linears with the same input."""
        width = self.dims.hidden
        found = []
        if with_attention:
            by_input: dict[int, int] = {}
            for outputs, inputs in self.attention[:-1]:
                by_input[inputs] = by_input.get(inputs, 0) + outputs
            found += [(1, outputs, inputs) for inputs, outputs in by_input.items()]
            found.append((1, *self.attention[-1]))
        if self.shared:
            found += [(1, 2 * self.shared, width), (1, width, self.shared)]
        if self.num_experts:
            found.append((self.num_experts, 2 * self.expert, width))
            found.append((self.num_experts, width, self.expert))
        return found


@dataclass(frozen=True)
class StageCost:
    """What one stage needs.

    Attributes:
        stage: its name.
        memory: named terms in bytes; their sum is the peak.
        disk: bytes it leaves in the run folder.
        seconds: fast and slow estimate.
    """

    stage: str
    memory: Mapping[str, int]
    disk: int
    seconds: tuple[float, float]

    @property
    def peak(self) -> int:
        """Peak memory in bytes."""
        return sum(self.memory.values())
