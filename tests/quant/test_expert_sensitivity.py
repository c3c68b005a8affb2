"""What one expert of a stack costs its block, and the plans that follow from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.converted import EXPERTS, convert
from tests.quant.exact import least_loss
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

from fissile.config import Quantize
from fissile.io.units import UnitStore
from fissile.models.build import empty_model
from fissile.models.nested_fissile import NestedTensor
from fissile.models.routers_fissile import Route
from fissile.models.source import filled
from fissile.models.stacks_fissile import NestedStack
from fissile.models.stream import StreamedModel
from fissile.quant.allocate import allocate
from fissile.quant.baselines import rtn
from fissile.quant.layers import quantize_model
from fissile.quant.sensitivity import expert_name, sensitivity, sharing
from fissile.quant.streams import Streams
from fissile.run.nesting import artifact_tensors_of, mixed_widths, nested_solver, width_choices

WIDTHS = (2, 3, 4)
STACKS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


def post_norm_model(folder: Path) -> Path:
    """A random model that normalises what the MLP puts out."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 128,
    }
    config = AutoConfig.for_model("olmo2", **sizes, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


class Weighted(Streams):
    """Streams whose experts count for more and less, where they are chosen before the layers."""

    def first(self, count: int, layer_idx: int) -> Iterator[tuple[Tensor, Route | None]]:
        for x_BSD, route in super().first(count, layer_idx):
            if route is not None:
                index, weights = route
                spread = torch.linspace(0.3, 1.7, weights.numel()).view_as(weights)
                route = index, weights * spread
            yield x_BSD, route


@torch.no_grad()
def share(reference: nn.Module, state: dict[str, Tensor], inputs: tuple[Any, ...]) -> Tensor:
    """Relative squared error of the block's output with other weights, by token."""
    want_BSD = reference(*inputs).double()
    off_BSD = functional_call(reference, state, inputs).double() - want_BSD
    return off_BSD.square().sum(-1) / want_BSD.square().sum(-1)


@pytest.mark.parametrize("kind", ["demo", "post-norm", "chosen in the layer"])
def test_an_experts_error_is_the_blocks(kind: str, demo_model: Path, tmp_path: Path) -> None:
    """Against the whole block, run once for every expert and width."""
    dense = post_norm_model(tmp_path / "dense") if kind == "post-norm" else demo_model
    routing: Any = "layerwise" if kind == "chosen in the layer" else "pregate"
    model = StreamedModel(convert(dense, routing, 2, shares=(2,)))
    generator = torch.Generator().manual_seed(1)
    ids_NS = torch.randint(3, model.config.vocab_size, (3, 24), generator=generator)
    streams = Weighted(model, ids_NS, (2,), 48, floats=True)
    reference, layer = model.layer(0), 0
    own = dict(reference.named_parameters())

    def decode(name: str, bits: int) -> Tensor:
        return rtn(own[name].detach(), bits, 32).dequantize(bits)

    groups = sharing(STACKS, [])
    assert groups == [STACKS]
    found = sensitivity(reference, groups, WIDTHS, decode, streams, layer)
    assert [*found] == [expert_name(STACKS[0], e) for e in range(EXPERTS)]
    batches = [(x, route, streams.context(x)) for x, route in streams.first(3, layer)]
    assert len(batches) == 2
    for e in range(EXPERTS):
        for bits in WIDTHS:
            state = {name: own[name].detach().clone() for name in STACKS}
            for name in STACKS:
                state[name][e] = decode(name, bits)[e]
            shares = [share(reference, state, inputs) for inputs in batches]
            error = found[expert_name(STACKS[0], e)][bits]
            assert error == pytest.approx(float(torch.cat(shares).mean()), rel=1e-3), (e, bits)
    # A width more costs less, and experts are not alike.
    assert all(errors[2] > errors[3] > errors[4] > 0 for errors in found.values())
    twos = [errors[2] for errors in found.values()]
    assert max(twos) > 1.05 * min(twos)


@dataclass
class Solved:
    """A routed model whose layers have been quantized, and what each width costs."""

    source: Any
    store: UnitStore

    def settings(self, budget: int) -> Quantize:
        return Quantize(effort="fast", budget=f"{budget}B", group_size=32, widths=WIDTHS)

    def floats(self) -> Iterator[tuple[str, Tensor]]:
        for i in range(self.source.config.num_base_layers):
            for name, tensor in self.source.layer_state(i).items():
                yield f"model.layers.{i}.{name}", tensor

    def plan(self, budget: int) -> dict[str, list[int]]:
        """Widths by weight; one for each expert of a stack."""
        found = mixed_widths(self.source.config, self.store, self.settings(budget))
        assert found is not None
        return {
            name: widths
            if isinstance(widths, list)
            else [widths] * (EXPERTS if ".experts." in name else 1)
            for name, widths in found.items()
        }


@pytest.fixture(scope="module")
def solved(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Solved:
    source = convert(tiny_model, "pregate", 2, shares=(2,))
    generator = torch.Generator().manual_seed(2)
    ids_NS = torch.randint(3, source.config.vocab_size, (4, 64), generator=generator)
    store = UnitStore(tmp_path_factory.mktemp("units"))
    settings = Quantize(effort="fast", budget="3bpw", widths=WIDTHS)
    solver = nested_solver(settings, 0)
    work = quantize_model(
        StreamedModel(source),
        ids_NS,
        solver,
        group_size=32,
        attention=True,
        batch_tokens=256,
        store=store,
    )
    for _ in work:
        pass
    return Solved(source, store)


def test_plans_of_experts_are_optimal_and_nested(solved: Solved) -> None:
    table, members, weights = width_choices(solved.source.config, solved.store)
    layers = solved.source.config.num_base_layers
    # Queries, keys and values; their output; two of the shared neurons; the experts.
    assert len(table) == layers * (4 + EXPERTS)
    least = sum(min(c.bytes for c in own) for own in table.values())
    most = sum(max(c.bytes for c in own) for own in table.values())
    step = max(c.bytes for own in table.values() for c in own)
    before: dict[str, list[int]] = {}
    split = 0
    for share in (i / 24 for i in range(25)):
        budget = int(least + share * (most - least))
        found = allocate(table, budget)
        assert found.bytes <= budget
        assert found.loss == pytest.approx(least_loss(table, found.bytes), rel=1e-9)
        assert allocate(table, budget + step).loss <= least_loss(table, budget) + 1e-12
        plan = solved.plan(budget)
        assert {name for names in members.values() for name in names} == {*plan}
        for name, widths in before.items():
            assert all(old <= new for old, new in zip(widths, plan[name], strict=True)), name
        for i in range(layers):
            prefix = f"model.layers.{i}.mlp.experts"
            own = [found.bits[expert_name(f"{prefix}.down_proj", e)] for e in range(EXPERTS)]
            assert plan[f"{prefix}.gate_up_proj"] == plan[f"{prefix}.down_proj"] == own
            split += len(set(plan[f"{prefix}.down_proj"])) > 1
        before = plan
    assert split > 1
    assert weights == sum(p.numel() for n, p in solved.floats() if n in before)


def test_bytes_of_a_plan_are_those_that_are_held(solved: Solved) -> None:
    table, _, _ = width_choices(solved.source.config, solved.store)
    least = sum(min(c.bytes for c in own) for own in table.values())
    budget = int(1.3 * least)
    settings = solved.settings(budget)
    config, provide = artifact_tensors_of(solved.source, solved.store, settings)
    config.bits = None
    model = empty_model(config)
    model = filled(model, {n: provide(n) for n in model.state_dict() if n != "lm_head.weight"})
    stacks = [m for m in model.modules() if isinstance(m, NestedStack)]
    assert stacks
    held = [m for m in model.modules() if isinstance(m, NestedTensor)]
    count = sum(buffer.nbytes for weight in held for buffer in weight.buffers())
    assert count == allocate(table, budget).bytes <= budget
