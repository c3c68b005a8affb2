"""Full training with every weight cut over the processes (FSDP2), where a launch asks for it.

Each process holds a part of every parameter, of its gradient and of the optimiser's moments, and
has a decoder layer whole only while it computes with it. Adapters are small: with LoRA, every
process keeps the whole model.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from fissile.config import Recover
from fissile.errors import UsageError
from fissile.models.modeling_fissile import FissileForCausalLM
from fissile.models.source import MemorySource, load_source
from fissile.workers import Workers


def shards(settings: Recover, workers: Workers) -> bool:
    """Whether the weights of this training are cut over the processes.

    That is what `accelerate launch --use_fsdp --fsdp_version 2` asks for.

    Raises:
        UsageError: it asks for FSDP 1, or the training freezes parts in turn.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not asked or workers.count == 1 or settings.method != "full":
        return False
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UsageError(f"FSDP version {version} was asked for, accepted: --fsdp_version 2")
    if settings.alternate.rounds:
        raise UsageError("recover.alternate freezes parts in turn: launch it without --use_fsdp")
    return True


def shard(model: FissileForCausalLM, workers: Workers) -> None:
    """Cut every parameter over the processes and move it to the device, layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(workers.device.type, (workers.count,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    # Cut again after every forward pass, so that what is trained is always the parts.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def unsharded(model: FissileForCausalLM) -> FissileForCausalLM:
    """The same model whole, on the CPU, in every process."""
    state = {name: whole(tensor).cpu() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return load_source(MemorySource(model.config, state))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, whether it is cut or not; every process asks for it then."""
    cut: Any = tensor
    return cut.full_tensor() if is_cut(tensor) else tensor


def is_cut(tensor: Tensor) -> bool:
    """Whether a process holds only its part of a tensor."""
    return hasattr(tensor, "full_tensor")


def like(full: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, known to every process, as a parameter holds its own values."""
    if not is_cut(parameter):
        return full.to(parameter.device)
    from torch.distributed.tensor import distribute_tensor

    own: Any = parameter
    there = full.to(own.device_mesh.device_type)
    return distribute_tensor(there, own.device_mesh, own.placements, src_data_rank=None)
