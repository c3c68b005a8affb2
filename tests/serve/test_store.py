"""The expert store against the resident model: same tokens, fewer bytes, no more memory."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export.converted import convert, plan_of, with_plan, write
from tests.serve.resident import half, resident_answer

from fissile.errors import UsageError
from fissile.io.headers import open_checkpoint_headers
from fissile.kernels.layout import dequantize, segment_names
from fissile.serve.generate import open_store, serving
from fissile.serve.options import Budget, ServeOptions
from fissile.serve.order import Order
from fissile.serve.reader import WEIGHTS, ExpertFiles
from fissile.serve.requests import Request
from fissile.serve.store import Parts

PROMPT = tuple(range(40, 70))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_answers_are_those_of_the_resident_model_bit_for_bit(
    served: Path, prompt: tuple[int, ...], bits: int, play: Callable[..., Any]
) -> None:
    tokens, logits_SV = resident_answer(served, bits, prompt, 12)
    assert logits_SV.std() > 0.1
    for prefetch in (False, True):
        seen: list[torch.Tensor] = []

        def pick(_: int, logits_V: torch.Tensor, seen: list[torch.Tensor] = seen) -> int:
            seen.append(logits_V)
            return int(logits_V.argmax())

        options = ServeOptions(memory=half(served, bits), bits=bits, prefetch=prefetch)
        found = play(served, [Request(0, prompt, 12)], options, pick)
        assert found.tokens[0] == tokens
        assert torch.equal(torch.stack(seen), logits_SV)
        assert found.stats.evictions > 0


def test_experts_with_widths_of_their_own(
    served: Path, prompt: tuple[int, ...], play: Callable[..., Any], tmp_path: Path
) -> None:
    """Bit for bit the resident model; what is read is what the plan names."""
    rng = random.Random(0)
    plans = [[rng.choice((2, 2, 3, 4)) for _ in range(12)] for _ in range(6)]
    plans[2] = [3] * 12
    mixed = plan_of(served, lambda layer: 3 if layer == 2 else plans[layer])
    folder = with_plan(tmp_path / "planned", served, mixed)
    tokens, logits_SV = resident_answer(folder, None, prompt, 12)
    seen: list[torch.Tensor] = []

    def pick(_: int, logits_V: torch.Tensor) -> int:
        seen.append(logits_V)
        return int(logits_V.argmax())

    options = ServeOptions()
    with closing(open_store(folder, options)) as store:
        files, least = store.files, store.files.expert_bytes(4)
        served_bytes = sum(
            files.size((layer, expert, plane))
            for layer, bits_E in enumerate(plans)
            for expert, bits in enumerate(bits_E)
            for plane in range((2, 3, 4).index(bits) + 1)
        )
        assert store.stats().budget_bytes == served_bytes < files.total_bytes()
    found = play(folder, [Request(0, prompt, 12)], options, pick)
    assert found.tokens[0] == tokens
    assert torch.equal(torch.stack(seen), logits_SV)
    assert found.stats.bytes_read <= served_bytes
    tight = play(folder, [Request(0, prompt, 12)], replace(options, memory=3 * least))
    assert tight.tokens[0] == tokens
    assert tight.stats.evictions > 0
    for bits in (2, 4):
        assert play(folder, [Request(0, prompt, 4)], ServeOptions(bits=bits)).tokens[0]


def test_an_expert_of_two_widths_is_not_read_whole(served: Path, tmp_path: Path) -> None:
    mixed = plan_of(served, lambda _: 3)
    mixed["model.layers.1.mlp.experts.down_proj"] = 2
    folder = with_plan(tmp_path / "planned", served, mixed)
    with pytest.raises(UsageError, match=r"experts of layer 1 .* give bits or a budget"):
        open_store(folder, ServeOptions())


def test_memory_order_and_policy_change_no_token_of_many_requests(
    served: Path, mixed: Callable[..., Any], play: Callable[..., Any]
) -> None:
    work = mixed(6, (8, 24), (8, 8))
    resident = play(served, work.requests, ServeOptions(scheduler="fcfs"))
    smallest = ExpertFiles(open_checkpoint_headers(served), (4,))
    smallest.close()
    assert len({tuple(t) for t in resident.tokens.values()}) > 1
    cases: tuple[tuple[str, Order, int], ...] = (
        ("lru", "index", half(served, 4)),
        ("belady", "johnson", half(served, 4)),
        ("belady", "hottest", smallest.expert_bytes(4)),
    )
    for policy, order, memory in cases:
        options = ServeOptions(memory=memory, policy=policy, order=order, scheduler="fcfs")
        found = play(served, work.requests, options)
        assert found.tokens == resident.tokens
        assert found.stats.peak_bytes <= memory


def test_mixed_text_reads_a_fifth_less_than_lru_on_demand(
    served: Path, mixed: Callable[..., Any], play: Callable[..., Any]
) -> None:
    work, memory = mixed(12, (24, 48), (16, 24)), half(served, 4)
    ours = ServeOptions(memory=memory, batch_requests=6, batch_tokens=128)
    plain = replace(ours, policy="lru", prefetch=False, scheduler="fcfs")
    found = {o.policy: play(served, work.requests, o, work.follow()) for o in (ours, plain)}
    computed = {name: sum(p.tokens for p in one.passes) for name, one in found.items()}
    assert computed["lru"] == computed["belady"]
    assert found["belady"].stats.bytes_read <= 0.8 * found["lru"].stats.bytes_read
    for one in found.values():
        assert 0.5 * memory < one.stats.peak_bytes <= memory
        assert one.stats.bytes_read >= memory / 2


@pytest.mark.parametrize("bits", [2, 3])
def test_reads_are_exactly_the_planes_asked_for(
    served: Path, bits: int, play: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = open_checkpoint_headers(served)
    nested = headers.config["nested"]
    wanted: dict[int, int] = {}
    for layer in range(headers.config["num_base_layers"]):
        for weight in WEIGHTS:
            for part in segment_names(bits, nested["widths"]):
                name = f"model.layers.{layer}.mlp.experts.{weight}.{part}"
                info = headers.tensors[name][1]
                size = info.nbytes // info.shape[0]
                wanted |= {info.begin + e * size: size for e in range(info.shape[0])}
    reads: list[tuple[int, int]] = []
    real = os.preadv

    def watched(descriptor: int, buffers: Any, offset: int) -> int:
        got = real(descriptor, buffers, offset)
        reads.append((offset, sum(map(len, buffers))))
        return got

    monkeypatch.setattr(os, "preadv", watched)
    found = play(
        served, [Request(0, PROMPT, 4)], ServeOptions(memory=half(served, bits), bits=bits)
    )
    assert all(wanted.get(offset) == size for offset, size in reads)
    assert found.stats.bytes_read == sum(size for _, size in reads)


def test_an_expert_is_what_the_file_holds(served: Path) -> None:
    """Decoded through the store, and by loading the whole tensor with safetensors."""
    from safetensors import safe_open

    def decode(parts: Parts, bits: int | None) -> torch.Tensor:
        assert bits == 3
        own = {part: tensor for (weight, part), tensor in parts.items() if weight == "down_proj"}
        return dequantize(own, 3)

    with serving(served, ServeOptions(bits=3)) as (_, store):
        got = store.fetch(2, 5, decode)
    with safe_open(served / "model.safetensors", "pt") as file:
        names = {p: f"model.layers.2.mlp.experts.down_proj.{p}" for p in segment_names(3)}
        parts = {part: file.get_tensor(name)[5] for part, name in names.items()}
    assert torch.equal(got, dequantize(parts, 3))
    assert got.std() > 0


def test_widths_under_a_budget_follow_use_and_keep_to_it(
    served: Path, mixed: Callable[..., Any], play: Callable[..., Any]
) -> None:
    options = ServeOptions(budget=Budget(3.2, "bpw"), scheduler="fcfs")
    work = mixed(4, (24, 32), (12, 12))
    store = open_store(served, options)
    budget = store.stats().budget_bytes
    base = {store.widths.bits(0, e) for e in range(12)}
    store.close()
    assert base == {2}
    first = play(served, work.requests, options)
    again = play(served, work.requests, replace(options, memory=budget * 2))
    assert first.tokens == again.tokens  # what is in memory decides nothing
    assert first.stats.peak_bytes <= budget
    four = play(served, work.requests, replace(options, budget=None, bits=4))
    two = play(served, work.requests, replace(options, budget=None, bits=2))
    assert two.stats.bytes_used < first.stats.bytes_used < four.stats.bytes_used


def weights(parts: Parts, bits: int | None) -> int:
    """Number of codes of an expert's highest plane, which has one bit for each weight."""
    return sum(8 * part.numel() for (_, name), part in parts.items() if name == f"plane_{bits}")


def test_what_is_known_is_read_before_it_is_asked_for(served: Path) -> None:
    needs = [{1: 5, 2: 9}, {0: 1}, {3: 2, 4: 2, 5: 2}, {7: 1}, {8: 1}, {11: 3}]
    wanted = {(layer, number) for layer, counts in enumerate(needs) for number in counts}
    with serving(served, ServeOptions(memory=half(served, 4))) as (model, store):
        store.begin([needs])
        deadline = time.monotonic() + 60
        while any(store.resident().get(place, 0) < 3 for place in wanted):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        config = model.config
        for layer, counts in enumerate(needs):
            size = 3 * config.hidden_size * config.routing["expert_sizes"][layer]
            order = store.reach(layer, counts)
            assert [counts[number] for number in order] == sorted(counts.values(), reverse=True)
            assert [store.fetch(layer, number, weights) for number in order] == [size] * len(order)
        stats = store.stats()
    assert (stats.waits, stats.stall_seconds) == (0, 0.0)
    assert (stats.uses, stats.hits) == (3 * 9, 0)  # each was read for this use


@pytest.mark.parametrize("policy", ["belady", "lru"])
def test_what_is_known_to_be_needed_again_stays(served: Path, policy: str) -> None:
    """A pass of two experts a layer, one of all the others, and the first again."""
    few, others = [{0: 1, 1: 1}] * 6, [dict.fromkeys(range(2, 12), 1)] * 6
    options = ServeOptions(memory=half(served, 4), policy=policy, prefetch=False)
    with serving(served, options) as (_, store):
        for coming in ([few, others, few], [others, few], [few]):
            hits = store.stats().hits
            store.begin(coming)
            for layer, counts in enumerate(coming[0]):
                for number in store.reach(layer, counts):
                    store.fetch(layer, number, weights)
        stats = store.stats()
    assert stats.hits - hits == (6 * 2 * 3 if policy == "belady" else 0)
    assert stats.reads == stats.uses - stats.hits


@pytest.mark.parametrize("kind", ["pregate", "layerwise"])
@pytest.mark.parametrize("group", [None, 32])
def test_every_kind_of_routing_and_of_weight(
    kind: Any, group: int | None, tiny_model: Path, tmp_path: Path, play: Callable[..., Any]
) -> None:
    """Routers inside the layers tell nothing beforehand; float experts are one plane."""
    folder = write(convert(tiny_model, kind, 2), tmp_path / "artifact", group=group)
    bits = None if group is None else 4
    prompt = tuple(random.Random(0).choices(range(3, 8000), k=20))
    tokens, logits_SV = resident_answer(folder, bits, prompt, 8)
    seen: list[torch.Tensor] = []

    def pick(_: int, logits_V: torch.Tensor) -> int:
        seen.append(logits_V)
        return tokens[len(seen) - 1]

    found = play(folder, [Request(0, prompt, 8)], ServeOptions(memory=half(folder, bits)), pick)
    # With floats transformers sums the experts in an order of its own.
    tolerance = 0.0 if group else 1e-4 * float(logits_SV.std())
    torch.testing.assert_close(torch.stack(seen), logits_SV, rtol=0.0, atol=tolerance)
    assert found.stats.reads > 0
    assert all(bool(p.needs) == (kind == "pregate") for p in found.passes)
