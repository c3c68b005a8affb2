"""An artifact with tied floats, and everything that reads one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fissile import models
from fissile.cli.main import main
from fissile.export.verify import _floats, verify
from fissile.export.weights import open_weights
from fissile.io.headers import open_checkpoint_headers
from fissile.kernels import layout
from fissile.models.modeling_fissile import unserved
from fissile.models.nested_fissile import NestedTensor
from fissile.models.source import CheckpointSource, load_source
from fissile.run.inspect import inspect_source
from fissile.serve.batching import Limits, make_scheduler
from fissile.serve.engine import Engine
from fissile.serve.generate import serving
from fissile.serve.options import ServeOptions
from fissile.serve.requests import Request
from fissile.serve.shape import model_shape
from fissile.serve.store import Parts
from fissile.serve.vllm_plugin.shards import Cut, Ranks, Shard

Cli = Callable[..., tuple[int, str, str]]
WIDTHS = (2, 3, 4, 6)
LINEAR = "model.layers.1.self_attn.q_proj.weight"
STACK = "model.layers.1.mlp.experts.down_proj"
IDS = torch.tensor([[5, 17, 230, 8, 99, 41, 7, 3, 1000, 12, 4, 66]])


@pytest.fixture(scope="module")
def run(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, small_recipe: list[str]
) -> Path:
    """A run folder of the tiny model with tied floats, up to the artifact; read-only."""
    out = tmp_path_factory.mktemp("tied") / "out"
    words = ["run", "demo/moe-nested", "-q", "--model", str(tiny_model), "--out", str(out)]
    items = ["quantize.tied=true", f"quantize.widths={list(WIDTHS)}", "quantize.companding=1.5"]
    more = [part for item in items for part in ("--set", item)]
    assert main([*words, *small_recipe, *more, "--stop-after", "export"]) == 0
    return out


@pytest.fixture(scope="module")
def artifact(run: Path) -> Path:
    return run / "model"


def nested_of(artifact: Path) -> dict[str, Any]:
    """The entry of config.json."""
    nested = models.load_config(artifact).nested
    assert nested is not None
    return nested


def stored(artifact: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in artifact.glob("*.safetensors"):
        found |= load_file(path)
    return found


def by_hand(parts: dict[str, Tensor], name: str, bits: int) -> np.ndarray:
    """A weight of two or three bits from the bytes of the file, by numpy alone."""
    own = {k.removeprefix(f"{name}."): v for k, v in parts.items() if k.startswith(f"{name}.")}
    planes = {k: v.numpy() for k, v in own.items() if k.startswith("plane")}
    code = np.stack([(planes["plane_2"] >> (2 * j)) & 3 for j in range(4)], -1)
    code = code.reshape(*code.shape[:-2], -1).astype(int)
    if bits == 3:
        last = np.unpackbits(planes["plane_3"], axis=-1, bitorder="little")
        code = np.array(layout.COMPANDED[1.5][3])[2 * code + last]
    theta = own["theta_4"].numpy().view(np.float16).astype(np.float64)
    ties = own[f"tied_{bits}"].numpy().view(np.float16).astype(np.float64)
    a, o, e = (ties[..., i, None] for i in range(3))
    scale = (a * theta[..., 0]).astype(np.float32).astype(np.float16).astype(np.float32)
    zero = (o * theta[..., 0] + e * theta[..., 1]).astype(np.float32)
    zero = zero.astype(np.float16).astype(np.float32)
    grouped = code.reshape(*scale.shape, -1).astype(np.float32)
    return (grouped * scale[..., None] + zero[..., None]).reshape(code.shape)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def test_the_file_holds_one_width_of_floats_and_three_numbers_a_row(artifact: Path) -> None:
    parts, nested = stored(artifact), nested_of(artifact)
    assert nested["tied"] is True
    for name in nested["modules"]:
        own = [k.rpartition(".")[2] for k in parts if k.startswith(f"{name}.")]
        assert sorted(own) == sorted(layout.stored_names(WIDTHS, tied=True))
    assert parts[f"{STACK}.tied_2"].shape == (*parts[f"{STACK}.plane_2"].shape[:2], 3)
    # Trained by nothing, so nothing stands in the way of the solver's own numbers.
    ties = layout.decode_tied(parts[f"{LINEAR}.tied_2"])
    assert (ties[:, 0] > 1).all()
    assert ties.std(0).gt(0).all()


@pytest.mark.parametrize("bits", [2, 3])
def test_transformers_loads_what_the_bytes_say(artifact: Path, bits: int) -> None:
    parts = stored(artifact)
    model = AutoModelForCausalLM.from_pretrained(artifact, trust_remote_code=True, bits=bits)
    for name in (LINEAR, STACK):
        weight = model.get_submodule(name)
        want = by_hand(parts, name, bits)
        assert np.array_equal(weight.dense(torch.float32).numpy(), want)
        assert np.array_equal(CheckpointSource(artifact, bits)._stored(name).numpy(), want)
        assert want.std() > 0


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_model_computes_with_its_weights_and_loses_nothing(artifact: Path, bits: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        artifact, trust_remote_code=True, bits=bits, dtype=torch.float32
    ).eval()
    before = {name: part.clone() for name, part in model.state_dict().items()}
    fresh = models.load(artifact, bits=bits)
    got = logits(fresh)
    want = logits(load_source(CheckpointSource(artifact, bits)).double())
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=2e-5)
    assert torch.equal(logits(model), got)
    for weight in (m for m in fresh.modules() if isinstance(m, NestedTensor)):
        assert weight.held is not None
        kept = {name for name, part in weight.named_buffers() if not name.startswith("held")}
        # Beside what is multiplied by stay the floats that this width is tied to.
        assert kept == ({"theta_4", f"tied_{bits}"} if bits < 4 else set())
    after = fresh.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], part) for name, part in before.items())
    packed = [m for m in fresh.modules() if isinstance(m, NestedTensor)]
    for weight in packed:
        size = layout.loaded_bytes(weight.shape, weight.group_size, bits, WIDTHS, tied=True)
        assert sum(buffer.nbytes for buffer in weight.buffers()) == size
    assert torch.equal(logits(fresh.to(torch.float32)), got)


def test_plan_and_inspect_count_the_bytes_of_the_file(run: Path, artifact: Path) -> None:
    found = inspect_source(artifact)
    planned = json.loads((run / "plan.json").read_text())
    infos = {name: info for name, (_, info) in open_checkpoint_headers(artifact).tensors.items()}
    modules = set(found_modules(artifact))
    plain = sum(i.nbytes for n, i in infos.items() if n.rpartition(".")[0] not in modules)
    assert found["tied_floats"] is True
    for row in found["by_width"][:-1]:
        names = layout.segment_names(row["bits"], WIDTHS, tied=True)
        wanted = sum(infos[f"{name}.{part}"].nbytes for name in modules for part in names)
        assert row["loaded_bytes"] == wanted + plain
        assert planned["loaded_bytes"][str(row["bits"])] == row["loaded_bytes"]
        assert planned["bits_per_weight"][str(row["bits"])] == pytest.approx(
            row["bits_per_weight"], abs=1e-4
        )
    assert found["by_width"][-1]["loaded_bytes"] == sum(i.nbytes for i in infos.values())


def found_modules(artifact: Path) -> list[str]:
    return list(nested_of(artifact)["modules"])


def test_only_the_parts_of_other_widths_stay_on_disk(artifact: Path) -> None:
    config, mixed = models.load_config(artifact), {LINEAR: 2, STACK: 6}
    config.nested, config.bits = {**nested_of(artifact), "mixed": mixed}, None
    widths = {name: mixed.get(name, 6) for name in found_modules(artifact)}
    patterns = [re.compile(pattern) for pattern in unserved(config)]
    for name, bits in widths.items():
        for part in layout.stored_names(WIDTHS, tied=True):
            left = any(p.search(f"{name}.{part}") for p in patterns)
            assert left == (part not in layout.segment_names(bits, WIDTHS, tied=True))


def test_verify_finds_it_whole_and_a_negative_scale(artifact: Path, tmp_path: Path) -> None:
    report = verify(artifact)
    assert [check for check in report.checks if not check.ok] == []
    assert {f"logits without fissile at {k} bits" for k in WIDTHS} <= {
        check.name for check in report.checks
    }
    copy = Path(shutil.copytree(artifact, tmp_path / "negative"))
    (path,) = copy.glob("*.safetensors")
    parts = load_file(path)
    ties = layout.decode_tied(parts[f"{LINEAR}.tied_3"])
    parts[f"{LINEAR}.tied_3"] = layout.encode_tied(ties * torch.tensor([-1.0, 1.0, 1.0]))
    save_file(parts, path, {"format": "pt"})
    wrong = [check.detail for check in _floats(open_checkpoint_headers(copy)) if not check.ok]
    assert wrong == [f"first negative one in {LINEAR}.tied_3"]


@pytest.mark.parametrize("bits", [2, 4])
def test_experts_are_read_from_their_files(artifact: Path, bits: int) -> None:
    want = torch.from_numpy(CheckpointSource(artifact, bits)._stored(STACK).numpy())[3]

    def decode(parts: Parts, width: int | None) -> Tensor:
        assert width == bits
        own = {part: tensor for (weight, part), tensor in parts.items() if weight == "down_proj"}
        return layout.dequantize(own, bits, 1.5)

    seen: list[Tensor] = []

    def pick(_: int, logits_V: Tensor) -> int:
        seen.append(logits_V)
        return int(logits_V.argmax())

    options = ServeOptions(bits=bits)
    limits = Limits(options.batch_tokens, options.batch_requests, options.max_wait)
    with serving(artifact, options) as (model, store):
        assert torch.equal(store.fetch(1, 3, decode), want)
        engine = Engine(model, store, make_scheduler("fcfs"), limits, pick=pick)
        assert len(list(engine.run([Request(0, tuple(IDS[0].tolist()), 1)]))) == 1
        assert store.files.planes_of(bits) == {2: 1, 4: 3}[bits]
        names = layout.segment_names(bits, WIDTHS, tied=True)
        infos = open_checkpoint_headers(artifact).tensors
        own = [i.nbytes for n, (_, i) in infos.items() if ".experts." in n and n.endswith(names)]
        assert store.files.total_bytes() == sum(own)
    resident = logits(models.load(artifact, bits=bits))[0, -1]
    torch.testing.assert_close(seen[0], resident, rtol=1e-4, atol=1e-6)


def test_the_simulator_reads_tied_floats_with_the_planes_that_need_them(artifact: Path) -> None:
    config, infos = models.load_config(artifact), open_checkpoint_headers(artifact).tensors
    assert config.routing is not None
    experts = config.routing["num_experts"]
    first = ("plane_2", "theta_4", "tied_2")
    groups = [first, ("plane_3", "tied_3"), ("plane_4",), ("plane_6", "theta_6")]
    for i, row in enumerate(model_shape(artifact, [0, 1], experts, 1).planes):
        own = {n: info for n, (_, info) in infos.items() if f"layers.{i}.mlp.experts." in n}
        want = [sum(x.nbytes for n, x in own.items() if n.endswith(g)) // experts for g in groups]
        assert list(row) == want


@pytest.mark.parametrize(
    ("cut", "size", "name"), [("halves", 2, STACK), ("inputs", 4, STACK), ("rows", 2, LINEAR)]
)
def test_shares_of_several_processes_are_the_weight(
    artifact: Path, cut: Cut, size: int, name: str
) -> None:
    whole = models.load(artifact, bits=3).get_submodule(name)
    assert isinstance(whole, NestedTensor)
    parts, shares = whole.parts(), []
    for rank in range(size):
        shard = Shard(whole, name, cut, Ranks(rank, size))
        own = {part: shard.share(tensor, part) for part, tensor in parts.items()}
        assert {k: tuple(v.shape) for k, v in own.items()} == {
            k: tuple(getattr(shard, k).shape) for k in own
        }
        shares.append(layout.dequantize(own, 3, 1.5))
    if cut == "halves":
        halves = [share.chunk(2, dim=-2) for share in shares]
        found = torch.cat([half[i] for i in (0, 1) for half in halves], dim=-2)
    else:
        found = torch.cat(shares, dim=-1 if cut == "inputs" else -2)
    assert torch.equal(found, whole.dense(torch.float32))


def test_exports_read_codes_and_floats_of_a_width(artifact: Path) -> None:
    weights = open_weights(artifact, 2)
    assert weights.is_coded(LINEAR)
    codes, scale, zero = weights.coded(LINEAR)
    decoded = codes.unflatten(-1, (-1, 32)) * scale[..., None] + zero[..., None]
    torch.testing.assert_close(decoded.flatten(-2), weights.fetch(LINEAR), rtol=1e-6, atol=1e-7)
    assert codes.max() == 3


def test_token_widths_have_all_widths_of_tied_floats(
    run_cli: Cli, artifact: Path, text_file: Path
) -> None:
    items = [f"calibration={text_file}", f"held_out={text_file}", "tokens=512", "steps=0"]
    items += ["seen_tokens=256", "held_out_tokens=300", "context=64", "mean_bits=[3.0]"]
    given = [part for item in items for part in ("--set", item)]
    code, text, err = run_cli("bench", "widths", artifact, "-q", "--json", *given)
    assert code == 0, err
    rows = {(r["method"], r["wanted_bits"]): r for r in json.loads(text)["rows"]}
    ppl = [next(iter(rows["uniform", bits]["ppl_by_domain"].values())) for bits in WIDTHS]
    assert len(set(ppl)) == len(WIDTHS)
    assert rows["static plan", 3.0]["bits"] == pytest.approx(3.0, abs=0.5)
    assert rows["uniform", 2]["bits"] == 2


def test_training_of_tied_floats_is_refused(
    run_cli: Cli, artifact: Path, text_file: Path, tmp_path: Path, tiny_model: Path
) -> None:
    out = tmp_path / "task.safetensors"
    code, _, err = run_cli("tune", artifact, "--data", text_file, "--out", out)
    assert code == 2
    assert "floats are tied to the widest's: fitted, not trained" in err
    assert err.count("\n") == 1
    assert not out.exists()
    words = ["plan", "demo/moe-nested", "--model", tiny_model, "--set", "quantize.tied=true"]
    code, _, err = run_cli(*words, "--set", "quantize.block.steps=3")
    assert code == 2
    assert "tied: floats are fitted, not trained: block.steps 3, accepted: 0" in err
    assert err.count("\n") == 1
