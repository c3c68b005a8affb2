"""The vLLM plug-in's layers, in this process: what vLLM itself adds is tested by `serve-test`."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.export.converted import convert, plan_of, with_plan, write
from torch import Tensor

from fissile import models
from fissile.export.verify import probe_ids
from fissile.io.headers import open_checkpoint_headers
from fissile.io.reader import TensorReader
from fissile.kernels.layout import dequantize, segment_names
from fissile.models.build import empty_model
from fissile.models.configuration_fissile import FissileConfig
from fissile.models.nested_fissile import NestedTensor
from fissile.models.source import filled
from fissile.quant.baselines import rtn
from fissile.serve.vllm_plugin import layers
from fissile.serve.vllm_plugin.shards import Cut, Ranks, Shard

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def nested(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of 32 neurons in groups of 32: two processes have to split groups."""
    out = tmp_path_factory.mktemp("plugin") / "nested"
    model = convert(tiny_model, "pregate", 2, shares=(2,))
    return write(model, out, group=32, widths=(2, 3, 4))


@pytest.fixture(scope="module")
def planned(nested: Path) -> Path:
    """The same with a width for every expert."""
    mixed = plan_of(nested, lambda layer: [[4, 2, 3, 2], [2, 4, 4, 2]][layer])
    return with_plan(nested.with_name("planned"), nested, mixed)


@pytest.fixture(scope="module")
def demo_nested(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's shapes at widths 2, 3 and 4."""
    out = tmp_path_factory.mktemp("plugin") / "demo"
    model = convert(demo_model, "pregate", 2, shares=(1,))
    return write(model, out, group=64, dtype="bfloat16", widths=(2, 3, 4))


class Processes:
    """Several processes as threads that add up their results in lockstep."""

    def __init__(self, size: int) -> None:
        self.size, self.slots = size, [torch.empty(0)] * size
        self.barrier = threading.Barrier(size, timeout=120)
        self.own = threading.local()

    def reduce(self, x: Tensor) -> Tensor:
        self.slots[self.own.rank] = x
        self.barrier.wait()
        total = torch.stack(self.slots).sum(0)
        self.barrier.wait()
        return total

    def run(self, work: Any) -> list[Any]:
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            self.own.rank = rank
            try:
                results[rank] = work(rank)
            except BaseException as err:
                results[rank] = err
                self.barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


def float_state(path: Path) -> dict[str, Tensor]:
    """Every stored tensor that is not part of a nested weight."""
    with TensorReader(path) as reader:
        names = [n for n in reader.names() if not n.rpartition(".")[2].startswith(("pl", "the"))]
        return {name: reader.load(name, torch.float32) for name in names}


class Served(NamedTuple):
    """A model as the plug-in builds it for one process."""

    model: Any
    layers: dict[str, Any]
    shards: list[Shard]
    bytes_read: int


def served_model(path: Path, processes: Processes, rank: int, bits: int | None) -> Served:
    config = models.load_config(path)
    config.bits = bits
    model = empty_model(config)
    group = layers.LayerGroup(Ranks(rank, processes.size), processes.reduce, {})
    shards = list(layers.serve_layers(model.model, "model.", group))
    state = float_state(path)
    for name, part in model.state_dict().items():
        if name not in state and "lm_head" not in name:
            state[name] = torch.zeros(part.shape, dtype=part.dtype)
    model = filled(model, state)
    with TensorReader(path) as reader:
        for shard in shards:
            shard.read(reader, CPU)
        return Served(model, group.layers, shards, reader.bytes_read)


@pytest.mark.parametrize(("size", "bits"), [(1, 2), (2, 3), (1, None), (2, None)])
def test_processes_together_compute_the_model(
    size: int,
    bits: int | None,
    nested: Path,
    planned: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nested = planned if bits is None else nested
    ids = probe_ids(8192)
    with torch.no_grad():
        expected = models.load(nested, bits=bits)(input_ids=ids).logits
    processes = Processes(size)
    ranks = [served_model(nested, processes, rank, bits) for rank in range(size)]
    monkeypatch.setattr(
        layers, "running_layer", lambda name: ranks[processes.own.rank].layers[name]
    )

    def work(rank: int) -> Tensor:
        with torch.no_grad():
            return ranks[rank].model(input_ids=ids).logits

    assert float(expected.std()) > 0.1
    for logits in processes.run(work):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    kinds = {type(layer).__name__ for layer in ranks[0].layers.values()}
    assert kinds == {"ServedLinear", "ServedMLP", "ServedExperts"}


CUTS: list[tuple[Cut, int, int]] = [
    ("rows", 2, 32),
    ("rows", 4, 64),
    ("halves", 2, 32),
    ("inputs", 2, 32),
    ("inputs", 4, 64),  # a group lies on two processes
    ("inputs", 8, 64),
    ("whole", 1, 32),
]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("cut", "size", "group"), CUTS)
def test_shares_put_together_are_the_weight(bits: int, cut: Cut, size: int, group: int) -> None:
    torch.manual_seed(bits)
    weight_ENK = torch.randn(3, 32, 128)
    parts = [rtn(w, bits, group).parts() for w in weight_ENK]
    parts_E = {name: torch.stack([p[name] for p in parts]) for name in segment_names(bits)}
    whole_ENK = dequantize(parts_E, bits)
    shares = []
    for rank in range(size):
        shard = Shard(stored(parts_E, bits, group), "w", cut, Ranks(rank, size))
        own = {name: shard.share(part, name) for name, part in parts_E.items()}
        assert all(own[name].shape == getattr(shard, name).shape for name in own)
        shares.append(dequantize(own, bits))
    if cut == "halves":
        halves = [share.chunk(2, dim=1) for share in shares]
        found = torch.cat([half[i] for i in (0, 1) for half in halves], dim=1)
    else:
        found = torch.cat(shares, dim=-1 if cut == "inputs" else -2)
    assert torch.equal(found, whole_ENK)


def stored(parts: dict[str, Tensor], bits: int, group: int) -> NestedTensor:
    """A nested weight without a model around it."""
    nested = {"layout": 1, "widths": [2, 3, 4], "group_size": group, "modules": ["w"]}
    *lead, quarter = parts["plane_2"].shape
    return NestedTensor(FissileConfig(nested=nested, bits=bits), "w", (*lead, quarter * 4))


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("bits", [2, 4])
def test_only_the_served_width_is_read_and_held(size: int, bits: int, demo_nested: Path) -> None:
    served = served_model(demo_nested, Processes(size), 0, bits)
    infos = open_checkpoint_headers(demo_nested).tensors
    names = [f"{s.name}.{part}" for s in served.shards for part in s.segments]
    packed = sum(infos[name][1].nbytes for name in names)
    # Rows are read by range; where inputs or halves are shared out, whole tensors are.
    read = served.bytes_read
    assert read == packed if size == 1 else packed // 2 < read < packed
    buffers = [b for s in served.shards for b in s.buffers() if b is not None]
    held = sum({b.data_ptr(): b.untyped_storage().nbytes() for b in buffers}.values())
    assert packed / size <= held <= 1.15 * packed / size


def test_of_a_plan_only_every_experts_own_width_is_read(planned: Path) -> None:
    served = served_model(planned, Processes(1), 0, None)
    infos = open_checkpoint_headers(planned).tensors
    packed = 0
    for shard in served.shards:
        for part in shard.segments:
            info = infos[f"{shard.name}.{part}"][1]
            share = 1 if shard.experts is None else len(shard.experts) / info.shape[0]
            packed += int(info.nbytes * share)
    assert served.bytes_read == packed
    assert sum(shard.experts is not None for shard in served.shards) == 2 * (3 + 2)


@pytest.mark.parametrize(
    ("cut", "size", "words"),
    [("rows", 3, "cannot be shared by 3"), ("inputs", 32, "not a multiple of 8")],
)
def test_uneven_shares_are_refused(cut: Cut, size: int, words: str) -> None:
    parts = rtn(torch.randn(32, 128), 2, 32).parts()
    with pytest.raises(ValueError, match=words):
        Shard(stored(dict(parts), 2, 32), "w", cut, Ranks(0, size))


REGISTERED = """
import json, sys, types
registry = types.SimpleNamespace(register_model=lambda *names: found.append(names))
found = []
for name in ("vllm", "vllm.model_executor", "vllm.model_executor.models"):
    sys.modules[name] = types.ModuleType(name)
module = types.ModuleType("vllm.model_executor.models.registry")
module.ModelRegistry = registry
sys.modules[module.__name__] = module
from fissile.serve.vllm_plugin import register
register(); register()
from transformers import AutoConfig
kind = type(AutoConfig.from_pretrained(sys.argv[1])).__module__
print(json.dumps({"found": found, "kind": kind}))
"""


def test_registered_twice_without_remote_code(nested: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", REGISTERED, nested], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["kind"] == "fissile.models.configuration_fissile"
    (architecture, where), again = answer["found"]
    assert [architecture, where] == again
    fields = json.loads((nested / "config.json").read_text())
    assert fields["architectures"] == [architecture]
    module, _, name = where.partition(":")
    source = Path(layers.__file__).with_name(module.rpartition(".")[2] + ".py").read_text()
    assert f"class {name}(" in source


def entry_points() -> Iterator[str]:
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    lines = iter(text.splitlines())
    for line in lines:
        if "vllm.general_plugins" in line:
            yield next(lines)


def test_the_entry_point_names_the_function() -> None:
    from fissile.serve import vllm_plugin

    (line,) = entry_points()
    assert line == f'fissile = "{vllm_plugin.register.__module__}:register"'
