"""A dense model seen as a routed one: the same weights under another order, nothing copied to disk.

Shapes: D model width, F FFN width, S shared neurons, E routed experts, M neurons per expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fissile.config import Route
from fissile.models.build import with_routing
from fissile.models.stream import StateSource
from fissile.refactor.domains import MembershipPartition
from fissile.refactor.partition import Partition
from fissile.refactor.refit import RefitLayer
from fissile.refactor.split import split_gated_mlp, split_membership_mlp

Kind = Literal["pregate", "layerwise", "static"]
AnyPartition = Partition | MembershipPartition


def routing_of(
    kind: Kind, partitions: Sequence[AnyPartition], top_k: int, settings: Route
) -> dict[str, Any]:
    """The `routing` entry of config.json.

    Args:
        kind: which router chooses; "static" drops the routed neurons.
        partitions: neurons of every layer.
        top_k: experts chosen per token.
        settings: sizes of the pre-gating router and whether it has per-layer heads.
    """
    routing: dict[str, Any] = {
        "kind": kind,
        "num_experts": partitions[0].num_experts,
        "top_k": top_k,
        "shared_sizes": [p.shared_size for p in partitions],
        "expert_sizes": [_expert_size(p) for p in partitions],
        "per_layer": settings.per_layer and kind == "pregate",
        "layout": "disjoint",
        "shared_bias": all(p.shared_size > 0 for p in partitions),
    }
    if isinstance(partitions[0], MembershipPartition):
        routing["layout"] = "membership"
        routing["blocks"] = [
            [[size, list(experts)] for size, experts in p.blocks]
            for p in partitions
            if isinstance(p, MembershipPartition)
        ]
    if kind == "pregate":
        routing["router"] = settings.router_sizes()
    return routing


def _expert_size(partition: AnyPartition) -> int:
    if isinstance(partition, Partition):
        return partition.expert_size
    members = [s for s, experts in partition.blocks if 0 in experts]
    return sum(members)


class ConvertedSource:
    """Weights of a routed model, cut from a dense source layer by layer when asked for.

    Args:
        dense: the dense model.
        partitions: neurons of every layer.
        routing: from `routing_of`.
        router: tensors of the pre-gating router, named relative to `model.router.`.
        selectors: per layer, the layer-wise router: "selector.weight" (E, D), "selector.bias" (E,).
        biases: per layer, bias of the shared down projection (D,), before any re-fit.
        refits: per layer, the re-fitted projections.
    """

    def __init__(
        self,
        dense: StateSource,
        partitions: Sequence[AnyPartition],
        routing: dict[str, Any],
        *,
        router: dict[str, Tensor] | None = None,
        selectors: Sequence[dict[str, Tensor]] | None = None,
        biases: Sequence[Tensor] | None = None,
        refits: Sequence[RefitLayer] | None = None,
    ) -> None:
        self.dense, self.partitions, self.routing = dense, partitions, routing
        self.config = with_routing(dense.config, routing)
        self.router, self.selectors = router, selectors
        self.biases, self.refits = biases, refits

    def refitted(self, refits: Sequence[RefitLayer]) -> ConvertedSource:
        """The same model with re-fitted projections, and constants per expert if they have some."""
        restore = {"restore": True} if "restore" in refits[0].tensors else {}
        return ConvertedSource(
            self.dense,
            self.partitions,
            self.routing | restore,
            router=self.router,
            selectors=self.selectors,
            biases=self.biases,
            refits=refits,
        )

    def layer_state(self, layer_idx: int) -> dict[str, Tensor]:
        """Tensors of one layer, named relative to it."""
        state = self.dense.layer_state(layer_idx)
        gate, up, down = (state.pop(f"mlp.shared.{n}_proj.weight") for n in ("gate", "up", "down"))
        partition = self.partitions[layer_idx]
        if isinstance(partition, MembershipPartition):
            mlp = split_membership_mlp(gate, up, down, partition)
        else:
            mlp = split_gated_mlp(gate, up, down, partition)
        if self.routing["kind"] == "static":
            mlp = {k: v for k, v in mlp.items() if k.startswith("shared.")}
        if self.routing["shared_bias"]:
            width = down.shape[0]
            mlp["shared.down_proj.bias"] = (
                torch.zeros(width) if self.biases is None else self.biases[layer_idx].float()
            )
        if self.refits is not None:
            mlp |= self.refits[layer_idx].tensors
        if self.selectors is not None:
            mlp |= self.selectors[layer_idx]
        return state | {f"mlp.{name}": tensor for name, tensor in mlp.items()}

    def outer_state(self) -> dict[str, Tensor]:
        """Everything outside the layers under its full name."""
        router = {f"model.router.{k}": v for k, v in (self.router or {}).items()}
        return self.dense.outer_state() | router
