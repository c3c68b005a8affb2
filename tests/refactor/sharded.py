"""What test_distributed.py compares: full training whole, or cut over the processes of a launch."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from fissile.config import Recover, Route
from fissile.models.build import with_routing
from fissile.models.source import CheckpointSource, load_source
from fissile.models.stream import StreamedModel
from fissile.refactor.convert import ConvertedSource, routing_of
from fissile.refactor.partition import random_partition
from fissile.refactor.recover import Recovered, train_to_teacher
from fissile.refactor.router import DistilledRouter, distill_router, new_router
from fissile.workers import Workers, join_workers

SETTINGS = {
    "method": "full",
    "steps": 4,
    "batch_tokens": 128,
    "context": 32,
    "accumulate": 2,
    "checkpoint_every": 2,
}
ROUTE = Route(attention_dim=16, inner_dim=16)


def trained(model: Path, workers: Workers, checkpoint: Path, half: Path | None = None) -> Recovered:
    """Train all weights of a routed model on made-up text; `half` gets the state at two steps."""

    def show(_stage: str, done: int, _total: int, _detail: str) -> None:
        if done == 2 and half is not None:
            shutil.copy(checkpoint, half)

    source = CheckpointSource(model)
    partitions = []
    for i in range(source.config.num_base_layers):
        down = source.layer_state(i)["mlp.shared.down_proj.weight"].norm(dim=0)
        partitions.append(random_partition(down, shared_size=128, num_experts=4, seed=i))
    routing = routing_of("pregate", partitions, 2, ROUTE)
    router = dict(new_router(with_routing(source.config, routing), 3).state_dict())
    ids_NS = torch.randint(0, 8000, (16, 32), generator=torch.Generator().manual_seed(1))
    return train_to_teacher(
        load_source(ConvertedSource(source, partitions, routing, router=router)),
        load_source(source),
        ids_NS,
        Recover.model_validate(SETTINGS),
        seed=0,
        checkpoint=checkpoint,
        progress=show,
        workers=workers,
    )


def routed(model: Path, workers: Workers) -> DistilledRouter:
    """Train a router whose load counts on made-up targets; two processes get unequal parts."""
    source = CheckpointSource(model)
    down = source.layer_state(0)["mlp.shared.down_proj.weight"].norm(dim=0)
    partitions = [random_partition(down, shared_size=128, num_experts=4, seed=0)] * 2
    config = with_routing(source.config, routing_of("pregate", partitions, 2, ROUTE))
    rng = torch.Generator().manual_seed(2)
    ids_NS = torch.randint(0, 8000, (8, 32), generator=rng)
    targets_HTE = 3 * torch.randn(1, 8 * 32, 4, generator=rng)
    settings = ROUTE.model_copy(update={"steps": 5, "batch_tokens": 96, "balance": 20.0})
    dense = StreamedModel(source)
    return distill_router(dense, config, ids_NS, targets_HTE, settings, seed=0, workers=workers)


if __name__ == "__main__":
    together, out = join_workers(), Path(sys.argv[2])
    model, half = Path(sys.argv[1]), out / "half.safetensors"
    result = trained(model, together, out / "training.safetensors", half)
    together.wait()
    again = trained(model, together, half)
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name
    state = {k: v for k, v in result.model.state_dict().items() if k != "lm_head.weight"}
    state["curve"] = torch.tensor([*result.curve, result.before, result.after])
    state["router"] = torch.tensor(routed(model, together).curve)
    state["norms"] = torch.tensor(result.norms)
    save_file(state, out / f"model_{together.rank}.safetensors")
