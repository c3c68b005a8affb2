"""Recovery training of the demo model, routed among random experts by an untrained router."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from fissile.config import Recover, Route
from fissile.errors import UsageError
from fissile.eval.documents import read_documents
from fissile.eval.tokens import load_tokenizer
from fissile.eval.windows import sample_windows
from fissile.io.units import UnitStore
from fissile.models.build import with_routing
from fissile.models.modeling_fissile import FissileForCausalLM
from fissile.models.modules_fissile import FissileExperts, run_experts
from fissile.models.routers_fissile import choose
from fissile.models.source import CheckpointSource, load_source
from fissile.refactor.alternate import router_loss
from fissile.refactor.convert import AnyPartition, ConvertedSource, routing_of
from fissile.refactor.domains import membership_partition
from fissile.refactor.grouped import grouped_experts, ready_to_train
from fissile.refactor.partition import random_partition
from fissile.refactor.recover import train_to_teacher
from fissile.refactor.router import new_router
from fissile.refactor.teacher import distill_loss

CONTEXT = 64
ROUTE = Route(attention_dim=16, inner_dim=16)


@pytest.fixture(scope="module")
def source(demo_model: Path) -> CheckpointSource:
    return CheckpointSource(demo_model)


@pytest.fixture(scope="module")
def windows(source: CheckpointSource, demo_model: Path, text_file: Path) -> Tensor:
    tokenizer, documents = load_tokenizer(demo_model), read_documents(text_file)
    return sample_windows(documents, tokenizer, 2048, CONTEXT, 0, config=source.config)[0]


@pytest.fixture(scope="module")
def routed(source: CheckpointSource) -> Callable[[str], FissileForCausalLM]:
    """A fresh routed model: "disjoint" random experts or "membership" overlapping ones."""

    def make(layout: str = "disjoint") -> FissileForCausalLM:
        partitions: list[AnyPartition] = []
        for i in range(source.config.num_base_layers):
            down = source.layer_state(i)["mlp.shared.down_proj.weight"]
            rng = torch.Generator().manual_seed(i)
            if layout == "disjoint":
                made: AnyPartition = random_partition(
                    down.norm(dim=0), shared_size=512, num_experts=8, seed=i
                )
            else:
                ranks = torch.rand(3, down.shape[1], generator=rng).argsort().argsort()
                made = membership_partition(ranks < down.shape[1] // 2)
            partitions.append(made)
        top_k = 2 if layout == "disjoint" else 1
        routing = routing_of("pregate", partitions, top_k, ROUTE)
        router = new_router(with_routing(source.config, routing), 3).state_dict()
        return load_source(ConvertedSource(source, partitions, routing, router=dict(router)))

    return make


def text_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return distill_loss(model(input_ids=ids, use_cache=False).logits, None, ids, kd_weight=0.0)


def of_router(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if ".router." in k}


def of_rest(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if ".router." not in k}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


# -- the step ------------------------------------------------------------------------------------


def test_the_language_model_loss_alone_reaches_the_router(routed: Any, windows: Tensor) -> None:
    model = routed().train()
    text_loss(model, windows[:4]).backward()
    for name, parameter in model.model.router.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_straight_through_weights_are_one_in_value(routed: Any, windows: Tensor) -> None:
    scores = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    _, weights = choose(scores, 2, straight_through=True)
    torch.testing.assert_close(weights, torch.ones(64, 2), rtol=0, atol=1.2e-7)
    model, ids = routed(), windows[:4]
    plain = text_loss(model.eval(), ids)
    torch.testing.assert_close(text_loss(model.train(), ids), plain, rtol=1e-5, atol=0)


def test_grouped_experts_equal_the_loop_and_its_gradients() -> None:
    """Eight experts, one of them unused, some slots of weight zero; float64."""
    rng = torch.Generator().manual_seed(5)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    experts: Any = nn.Module()
    experts.gate_up_proj = nn.Parameter(values(8, 12, 10))
    experts.down_proj = nn.Parameter(values(8, 10, 6))
    x = values(40, 10).requires_grad_(True)
    weights = (1 + 0.1 * values(40, 3)).masked_fill(torch.rand(40, 3, generator=rng) < 0.2, 0)
    weights.requires_grad_(True)
    index = torch.rand(40, 7, generator=rng).argsort(1)[:, :3]
    act = nn.functional.silu
    leaves = [x, weights, experts.gate_up_proj, experts.down_proj]
    pull = values(40, 10)

    def loop() -> Tensor:
        up, down = experts.gate_up_proj, experts.down_proj
        return run_experts(lambda e: (up[e], down[e]), act, x, index, weights)

    experts.act_fn = act
    got, expected = grouped_experts(experts, x, index, weights), loop()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad((got * pull).sum(), leaves)
    theirs = torch.autograd.grad((expected * pull).sum(), leaves)
    # Slots of weight zero are not computed, so nothing flows back into their weights either.
    for mine, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-10, atol=1e-12)
    assert float(ours[2][7].abs().max()) == 0 < float(ours[2][3].abs().max())


def test_bfloat16_steps_choose_the_experts_of_float32(routed: Any, windows: Tensor) -> None:
    model, ids, seen = routed().train(), windows[:8], []
    exact = text_loss(model, ids)
    forward = FissileExperts.forward
    with ready_to_train(model):
        model.model.router.register_forward_hook(lambda _m, _a, out: seen.append(out))
        for low in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                loss = text_loss(model, ids)
            loss.backward()
    assert torch.equal(seen[0], seen[1])
    assert seen[1].dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-3, atol=0)
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    assert model.model.layers[0].mlp.experts.forward.__func__ is forward


# -- whole runs ----------------------------------------------------------------------------------


def settings(**changes: Any) -> Recover:
    base = {"method": "full", "steps": 6, "batch_tokens": 256, "learning_rate": 3e-4}
    return Recover(**{**base, **changes})


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_lowers_the_held_out_loss(
    routed: Any, source: CheckpointSource, windows: Tensor, precision: str
) -> None:
    kind = settings(method="lora", precision=precision, learning_rate=1e-3, steps=8, accumulate=2)
    result = train_to_teacher(routed(), load_source(source), windows, kind, seed=0)
    assert result.after < 0.95 * result.before
    assert result.tokens == 8 * 2 * 256
    assert len(result.norms) == len(result.curve) == 8
    assert all(p.dtype == torch.float32 for p in result.model.parameters())


def test_killed_training_ends_in_the_same_bits(
    routed: Any, source: CheckpointSource, windows: Tensor, tmp_path: Path
) -> None:
    kind = settings(method="lora", schedule="refined", probe=0.4, checkpoint_every=1, accumulate=2)
    teacher = load_source(source)
    calm = train_to_teacher(routed(), teacher, windows, kind, seed=2)
    assert len(calm.curve) == 4  # the probe took two of the six steps
    # It leaves only its norms behind: training begins where it would have without it.
    short = settings(method="lora", steps=1, accumulate=2)
    assert train_to_teacher(routed(), teacher, windows, short, seed=2).curve == calm.curve[:1]

    class Killed(RuntimeError):
        pass

    def stop(_stage: str, done: int, _total: int, _detail: str) -> None:
        if done == 2:
            raise Killed

    path, store = tmp_path / "state.safetensors", UnitStore(tmp_path / "teacher")
    how: dict[str, Any] = {"seed": 2, "checkpoint": path, "targets": store}
    with pytest.raises(Killed):
        train_to_teacher(routed(), teacher, windows, kind, progress=stop, **how)
    rough = train_to_teacher(routed(), teacher, windows, kind, **how)
    assert (rough.curve, rough.norms) == (calm.curve, calm.norms)
    assert (rough.before, rough.after) == (calm.before, calm.after)
    assert same(dict(rough.model.state_dict()), dict(calm.model.state_dict()))


def test_a_budget_of_tokens_counts_what_is_read(
    routed: Any, source: CheckpointSource, windows: Tensor
) -> None:
    kind = Recover(tokens=1024, method="lora", batch_tokens=256, rank=2)
    result = train_to_teacher(routed(), load_source(source), windows, kind, seed=0)
    assert (len(result.curve), result.tokens) == (4, 1024)
    kind = Recover(seconds=0.5, method="lora", batch_tokens=256, rank=2)
    result = train_to_teacher(routed(), load_source(source), windows[:16], kind, seed=0)
    assert 0.5 <= result.seconds < 5


def test_budgets_exclude_each_other() -> None:
    assert Recover().steps == 200
    assert Recover(tokens=10).steps is None
    assert not Recover(steps=0).trains
    assert Recover(seconds=3.0).limited(7).steps_of(100) == 7
    with pytest.raises(ValidationError, match="give one budget, not steps and tokens"):
        Recover(steps=5, tokens=100)
    assert Recover.model_validate({"alternate": 4}).alternate.rounds == 4


# -- alternation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["disjoint", "membership"])
def test_alternation_trains_one_side_at_a_time(
    routed: Any, source: CheckpointSource, windows: Tensor, layout: str, tmp_path: Path
) -> None:
    rules = {"rounds": 2, "router_share": 0.5, "router_rate": 3e-3, "expert_rate": 5e-4}
    kind = settings(steps=16, kd_weight=0.0, alternate=rules)
    path = tmp_path / "state.safetensors"
    model = routed(layout)
    states: list[tuple[str, dict[str, Tensor], dict[str, Tensor]]] = []
    states.append(("start", of_router(model), of_rest(model)))

    def watch(_stage: str, done: int, total: int, detail: str) -> None:
        assert total == 16
        if done % 4 == 0:
            states.append((detail.split()[0], of_router(model), of_rest(model)))

    result = train_to_teacher(
        model, load_source(source), windows, kind, seed=0, progress=watch, checkpoint=path
    )
    assert [name for name, _, _ in states[1:]] == ["router", "rest", "router", "rest"]
    for (_, router0, rest0), (name, router1, rest1) in itertools.pairwise(states):
        assert same(router0, router1) == (name == "rest")
        assert same(rest0, rest1) == (name == "router")
    assert result.after < result.before
    assert len(result.curve) == len(result.router_curve) == 8
    assert sum(result.router_curve[-2:]) < sum(result.router_curve[:2])
    # Every stage has its own file: a second call has nothing left to do.
    again = train_to_teacher(
        routed(layout), load_source(source), windows, kind, seed=0, checkpoint=path
    )
    assert same(dict(again.model.state_dict()), dict(result.model.state_dict()))


def test_alternation_needs_a_router(source: CheckpointSource, windows: Tensor) -> None:
    with pytest.raises(UsageError, match="no router to train"):
        train_to_teacher(
            load_source(source), load_source(source), windows, settings(alternate=2), seed=0
        )


def test_router_targets_are_the_norms_of_the_present_experts(routed: Any, windows: Tensor) -> None:
    """The loss against a computation of every expert by hand, layer by layer."""
    model, ids = routed().eval(), windows[:2]
    inputs: dict[int, Tensor] = {}
    logits: list[Tensor] = []
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda _m, args, i=i: inputs.update({i: args[0].flatten(0, 1)})
        )
    model.model.router.register_forward_hook(lambda _m, _a, out: logits.append(out))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        z = []
        for i, layer in enumerate(model.model.layers):
            experts, norms = layer.mlp.experts, []
            for e in range(8):
                gate, up = (inputs[i] @ experts.gate_up_proj[e].T).chunk(2, -1)
                y = (nn.functional.silu(gate) * up) @ experts.down_proj[e].T
                norms.append(y.norm(dim=-1))
            n = torch.stack(norms, -1)
            n = n - n.mean(-1, keepdim=True)
            z.append(n / n.square().mean().sqrt())
        p = torch.softmax(torch.stack(z).mean(0) / 0.7, -1)
        q = torch.softmax(logits[0][0], -1)
        expected = (p * (p.log() - q.log())).sum(-1).mean()
    got = router_loss(model.requires_grad_(True), ids, 0.7)
    torch.testing.assert_close(got.detach(), expected, rtol=1e-4, atol=1e-6)
    got.backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched
    embeddings = "model.embed_tokens.weight"
    assert all(".router." in name for name in touched - {embeddings})
