"""Cutting the weights of a gated FFN along a partition, and putting them together again.

Pure indexing: every number of the dense FFN appears in exactly one place, so the sum over all
experts is the dense FFN. Tensor names are the canonical ones below `model.layers.{i}.mlp.`.
Shapes: D model width, F FFN width, S shared neurons, E routed experts, M neurons per expert,
P neurons in membership blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fissile.refactor.domains import MembershipPartition
from fissile.refactor.partition import Partition


def take_neurons(
    gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, index: Tensor, name: str = "shared"
) -> dict[str, Tensor]:
    """A smaller gated FFN of the given neurons: also the static model of the controls.

    Args:
        gate_FD: gate projection (F, D).
        up_FD: up projection (F, D).
        down_DF: down projection (D, F).
        index: int64, the neurons to take, in this order.
        name: prefix of the tensor names.

    Returns:
        `{name}.gate_proj.weight` (n, D), `{name}.up_proj.weight` (n, D), `{name}.down_proj.weight`
        (D, n); nothing where `index` is empty.

    Raises:
        ValueError: the three weights do not have the shapes of one FFN.
    """
    if gate_FD.ndim != 2 or up_FD.shape != gate_FD.shape or down_DF.shape != gate_FD.T.shape:
        shapes = [tuple(w.shape) for w in (gate_FD, up_FD, down_DF)]
        raise ValueError(f"gate, up, down of shapes {shapes} are not (F, D), (F, D), (D, F)")
    if not len(index):
        return {}
    return {
        f"{name}.gate_proj.weight": gate_FD[index],
        f"{name}.up_proj.weight": up_FD[index],
        f"{name}.down_proj.weight": down_DF[:, index].contiguous(),
    }


def split_gated_mlp(
    gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, partition: Partition
) -> dict[str, Tensor]:
    """Shared and disjoint routed experts of a dense gated FFN.

    Returns:
        The tensors of `take_neurons` for the shared neurons, `experts.gate_up_proj` (E, 2M, D) with
        rows [gate; up], and `experts.down_proj` (E, D, M).

    Raises:
        ValueError: the partition is not of this FFN's width, or the shapes do not fit.
    """
    if len(gate_FD) != len(partition.order_F):
        raise ValueError(f"partition of {len(partition.order_F)} neurons for {len(gate_FD)}")
    tensors = take_neurons(gate_FD, up_FD, down_DF, partition.shared)
    if partition.num_experts and partition.expert_size:
        index_EM = partition.experts_EM
        tensors["experts.gate_up_proj"] = torch.cat([gate_FD[index_EM], up_FD[index_EM]], dim=1)
        tensors["experts.down_proj"] = down_DF[:, index_EM].transpose(0, 1).contiguous()
    return tensors


def split_membership_mlp(
    gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, partition: MembershipPartition
) -> dict[str, Tensor]:
    """Permanent neurons and the pool of overlapping experts.

    Returns:
        `shared.*` and `pool.*` as of `take_neurons`; the pool's neurons in the order of the blocks.
    """
    shared = take_neurons(gate_FD, up_FD, down_DF, partition.shared)
    return shared | take_neurons(gate_FD, up_FD, down_DF, partition.pool, name="pool")


def merge_gated_mlp(
    tensors: dict[str, Tensor], partition: Partition
) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse of `split_gated_mlp`: the dense gate (F, D), up (F, D) and down (D, F)."""
    parts: tuple[list[Tensor], ...] = ([], [], [])
    if partition.shared_size:
        for part, name in zip(parts, ("gate_proj", "up_proj", "down_proj"), strict=True):
            part.append(tensors[f"shared.{name}.weight"])
    if "experts.down_proj" in tensors:
        gate_EMD, up_EMD = tensors["experts.gate_up_proj"].chunk(2, dim=1)
        down_DEM = tensors["experts.down_proj"].transpose(0, 1)
        parts[0].append(gate_EMD.flatten(0, 1))
        parts[1].append(up_EMD.flatten(0, 1))
        parts[2].append(down_DEM.flatten(1))
    place_F = torch.argsort(partition.order_F)
    gate, up, down = torch.cat(parts[0]), torch.cat(parts[1]), torch.cat(parts[2], dim=1)
    return gate[place_F], up[place_F], down[:, place_F]
