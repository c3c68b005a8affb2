"""Peers beside ours: what their codes decode to and cost, the table, refusals, and a real run."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fissile.errors import CorruptCheckpoint, UsageError
from fissile.kernels import layout
from fissile.models.source import CheckpointSource, load_source
from fissile.quant.baselines import rtn
from fissile.run import peers_driver
from fissile.run.peers import Job, decode, gap_of, read_weights, replaced, stored_bits
from fissile.run.peers_env import ensure, failure, installed
from fissile.run.peers_own import Ours, OwnJob
from fissile.run.peers_plot import markdown, plot
from fissile.run.peers_table import Measured, table

Cli = Callable[..., tuple[int, str, str]]
ENVIRONMENT = os.environ.get("FISSILE_PEERS")
NO_ENVIRONMENT = "FISSILE_PEERS names no environment that `fissile bench peers` has built"


def grid(bits: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (6, 128), scales and integer zeros (6, 2)."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (6, 128), generator=rng)
    scale = (torch.rand(6, 2, generator=rng) + 0.1).half()
    return codes.to(torch.uint8), scale, torch.randint(0, 1 << bits, (6, 2), generator=rng)


# -- codes and bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_decoded_weights_are_our_own_formula(bits: int) -> None:
    # A grid of ours, W = s q + z: in the peers' form the zero is -z / s.
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(bits))
    ours = rtn(weight, bits, 64)
    scale, zero = ours.scale[bits], -ours.zero[bits] / ours.scale[bits]
    codes = ours.codes >> (layout.STORED_BITS - bits)
    found = decode(codes, scale, zero, bits)
    assert torch.allclose(found, ours.dequantize(bits), rtol=0, atol=1e-6)
    assert (found - weight).abs().max() > 1e-3
    # And back: the integers of a decoded weight.
    again, off = peers_driver.codes_of(found, scale, zero, bits)
    assert torch.equal(again, codes)
    assert off < 1e-4


def test_a_symmetric_grid_has_its_zero_in_the_middle() -> None:
    codes, scale, _ = grid(3)
    explicit = decode(codes, scale, torch.full_like(scale, 4.0), 3)
    assert torch.equal(decode(codes, scale, None, 3), explicit)


@pytest.mark.parametrize("damage", ["off the grid", "-1 to", "to 4 of"])
def test_weights_off_their_grid_are_refused(damage: str) -> None:
    codes, scale, zero = grid(2)
    weight = decode(codes, scale, zero.to(torch.uint8), 2)
    step = {"off the grid": 0.3, "-1 to": -4.0, "to 4 of": 4.0}[damage]
    place = int((codes[0] == (0 if step < 0 else 3)).nonzero()[0])
    weight[0, place] += math.copysign(min(abs(step), 1.0), step) * float(scale[0, place // 64])
    with pytest.raises(ValueError, match=damage):
        peers_driver.codes_of(weight, scale.float(), zero, 2)


def test_bits_are_counted_with_their_floats() -> None:
    codes = torch.zeros(4, 128, dtype=torch.uint8)
    scale = torch.zeros(4, 2, dtype=torch.float16)
    integer, real = torch.zeros(4, 2, dtype=torch.uint8), torch.zeros(4, 2, dtype=torch.float16)
    # 512 codes of 3 bits, 8 scales of 16 bits, 8 zeros of 3, of 16 or of no bits.
    assert stored_bits(codes, scale, integer, 3) == 1536 + 128 + 24
    assert stored_bits(codes, scale, real, 3) == 1536 + 128 + 128
    assert stored_bits(codes, scale, None, 3) == 1536 + 128
    # Float zeros are what ours are: counted alike.
    assert stored_bits(codes, scale, real, 3) / 512 == layout.bits_per_weight((4, 128), 64, 3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_words_of_a_gptq_checkpoint(bits: int) -> None:
    """Against packing by Python's own big integers; 3-bit codes straddle words."""
    codes, scale, zero = grid(bits, seed=1)

    def packed(values_RC: Tensor) -> Tensor:
        columns = []
        for column in values_RC.T.tolist():
            stream = sum(value << (bits * i) for i, value in enumerate(column))
            raw = stream.to_bytes(len(column) * bits // 8, "little")
            columns.append(torch.frombuffer(bytearray(raw), dtype=torch.int32))
        return torch.stack(columns, 1)

    # Checkpoints hold inputs along the rows, and zeros of whole words of columns.
    padded = torch.zeros(32, 2, dtype=torch.int64)
    padded[:6] = zero
    state = {
        "a.qweight": packed(codes.T),
        "a.qzeros": packed(padded).T.contiguous(),
        "a.scales": scale.T,
        "a.g_idx": torch.arange(128, dtype=torch.int32) // 64,
    }
    weight, scales, zeros = peers_driver.gptq_weights(state, bits, 64)["a"]
    assert torch.equal(zeros, zero)
    assert torch.equal(weight, decode(codes, scale, zero.to(torch.uint8), bits))
    assert torch.equal(scales, scale.float())
    with pytest.raises(ValueError, match="not contiguous"):
        peers_driver.gptq_weights(state | {"a.g_idx": state["a.g_idx"].flip(0)}, bits, 64)


# -- results on disk -----------------------------------------------------------------------------


def saved(root: Path, job: Job, source: CheckpointSource, skip: str = "") -> dict[str, Tensor]:
    """Round-to-nearest codes of every linear, as the driver leaves them; the decoded weights."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    stored: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    for name, linear in peers_driver.linears(model).items():
        if name == skip:
            continue
        made = rtn(linear.weight.detach(), job.bits, job.group_size)
        scale = made.scale[job.bits].half()
        zero = (-made.zero[job.bits] / made.scale[job.bits]).half()
        codes = made.codes >> (layout.STORED_BITS - job.bits)
        stored |= {f"{name}.codes": codes, f"{name}.scale": scale, f"{name}.zero": zero}
        grouped = codes.float().unflatten(1, (-1, job.group_size)) - zero.float()[..., None]
        decoded[f"{name}.weight"] = (grouped * scale.float()[..., None]).flatten(1)
    job.folder(root).mkdir(parents=True)
    save_file(stored, job.folder(root) / "weights.safetensors")
    result = {"settings": {}, "seconds": 2.0, "processor_seconds": 1.0, "versions": {}}
    (job.folder(root) / "result.json").write_text(json.dumps(result))
    return decoded


def test_a_model_of_a_peers_weights(tiny_model: Path, tmp_path: Path) -> None:
    """The model that is scored gives the logits of the stock model with those weights."""
    from transformers import AutoModelForCausalLM

    job, source = Job("hqq", 2, 32, 0), CheckpointSource(tiny_model)
    decoded = saved(tmp_path, job, source)
    weights, bits = read_weights(job, tmp_path)
    assert bits == 2 + 32 / 32
    assert weights.keys() == decoded.keys()
    stock = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.randint(0, 8192, (2, 24), generator=torch.Generator().manual_seed(0))
    before = stock(input_ids=ids).logits
    assert not stock.load_state_dict(decoded, strict=False).unexpected_keys
    expected = stock(input_ids=ids).logits
    found = load_source(replaced(source, weights))(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert (before - expected).abs().max() > 0.01


def test_weights_that_are_missing_or_too_many(tiny_model: Path, tmp_path: Path) -> None:
    job, source = Job("hqq", 2, 32, 0), CheckpointSource(tiny_model)
    saved(tmp_path, job, source, skip="model.layers.1.mlp.up_proj")
    weights, _ = read_weights(job, tmp_path)
    with pytest.raises(CorruptCheckpoint, match=r"layers\.1\.mlp\.up_proj.*floating point"):
        replaced(source, weights)
    name = "model.layers.1.mlp.up_proj.weight"
    whole = weights | {name: torch.zeros(256, 64), "lm_head.weight": torch.zeros(1)}
    with pytest.raises(CorruptCheckpoint, match=r"lm_head.*no decoder linear"):
        replaced(source, whole)
    (tmp_path / "hqq.g32").rename(tmp_path / "hqq.g64")
    with pytest.raises(CorruptCheckpoint, match="do not fit"):
        read_weights(Job("hqq", 2, 64, 0), tmp_path)


# -- table ---------------------------------------------------------------------------------------


def result(gap: float, bits: float = 2.5, **more: Any) -> dict[str, Any]:
    return {"gap": gap, "by_domain": {"a": 9.0}, "bits_per_weight": bits, **more}


def test_rows_over_seeds_beside_the_best_peer() -> None:
    ours, theirs = ("dedicated", "fast", 2, 64), ("auto-round", None, 2, 64)
    rows = table(
        [
            Measured(ours, result(0.2)),
            Measured(ours, result(0.4)),
            Measured(theirs, result(0.5, 2.28, seconds=10.0)),
            Measured(theirs, result(0.7, 2.28, seconds=20.0)),
            Measured(("hqq", None, 2, 64), result(0.9)),
            Measured(("hqq", None, 2, 32), result(0.8, 3.0)),
            Measured(("hqq", None, 2, 128), result(0.1, 2.25)),
            Measured(("hqq", None, 3, 64), {"missing": "no wheel"}),
        ]
    )
    assert [(r["system"], r["bits"], r["group_size"]) for r in rows] == [
        ("hqq", 2, 32),
        ("dedicated", 2, 64),
        ("auto-round", 2, 64),
        ("hqq", 2, 64),
        ("hqq", 2, 128),
        ("hqq", 3, 64),
    ]
    own, best, other = rows[1], rows[2], rows[5]
    assert own["gap"] == pytest.approx(0.3)
    assert own["gap_sd"] == pytest.approx(math.sqrt(0.02))
    assert own["best_peer"] == "auto-round"
    assert own["of_best_peer"] == pytest.approx(0.5)
    # Ours takes 2.5 bits: of those that take no fewer, groups of 32 are better.
    assert own["of_best_peer_at_cost"] == pytest.approx(0.3 / 0.8)
    assert best["seconds"] == 15.0
    assert "of_best_peer" not in best
    assert other["missing"] == "no wheel"
    text = markdown(rows)
    assert (
        "| fissile dedicated (fast) | 2 | 64 | 2.500 | 0.3000 | 0.1414 | 0.50 | 0.38 |  |" in text
    )
    assert "| hqq | 3 | 64 | no wheel |" in text
    drawn = plot(rows)
    assert drawn.startswith(b"<?xml")
    assert b"fissile dedicated (fast)" in drawn
    assert b"3 bits" not in drawn
    assert plot([other]).startswith(b"<?xml")


def test_ratios_to_our_own_baselines() -> None:
    gaps: dict[tuple[str, str | None], float] = {
        ("nested", "best"): 0.3,
        ("dedicated", "fast"): 0.4,
        ("dedicated", "best"): 0.25,
    }
    gaps |= {("decoupleq", "fast"): 0.5, ("gptq", None): 1.0}
    rows = table([Measured((*key, 2, 64), result(gap)) for key, gap in gaps.items()])
    nested = next(row for row in rows if row["system"] == "nested")
    # Dedicated of the same effort; of the others there is one.
    ratios = {key: value for key, value in nested.items() if key.startswith("of_")}
    assert ratios == pytest.approx({"of_dedicated": 1.2, "of_decoupleq": 0.6, "of_gptq": 0.3})
    other = table([Measured(("gptq", None, 3, 64), result(1.0)), *map(_at_two, gaps.items())])
    assert "of_decoupleq" not in next(row for row in other if row["bits"] == 3)


def _at_two(item: tuple[tuple[str, str | None], float]) -> Measured:
    (system, effort), gap = item
    return Measured((system, effort, 2, 64), result(gap))


def test_the_gap_is_a_mean_over_domains() -> None:
    dense = {"a": 10.0, "b": 30.0}
    assert gap_of({"a": 20.0, "b": 30.0}, dense) == pytest.approx(math.log(2) / 2)
    assert gap_of({"a": 20.0, "b": None}, dense) == math.inf


# -- environment ---------------------------------------------------------------------------------


def test_a_folder_that_is_no_environment(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no environment"):
        ensure(tmp_path, ["hqq"], lambda *_: None)


def test_an_environment_that_exists_is_taken_as_it_is(tmp_path: Path) -> None:
    import sys

    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    reasons = ensure(tmp_path, ["no-such-package-of-anyone"], lambda *_: None)
    assert reasons == {"no-such-package-of-anyone": f"not installed in {tmp_path.name}"}


def test_the_line_that_tells_why() -> None:
    log = "Collecting x\nERROR: No matching distribution\n[notice] update pip\n"
    assert failure(log) == "ERROR: No matching distribution"
    assert failure("a\nValueError: bad shape\nstill going\n") == "ValueError: bad shape"
    assert failure("") == "no message"


# -- command -------------------------------------------------------------------------------------


def settings(folder: Path, text: Path, *more: str) -> list[str]:
    items = [
        f"calibration={text}",
        f"held_out={text}",
        f"folder={folder}",
        "seeds=[3]",
        "group_sizes=[32]",
        "tokens=1024",
        "context=64",
        "held_out_tokens=600",
        "efforts=[fast]",
        *more,
    ]
    return [part for item in items for part in ("--set", item)]


def test_refusals_are_one_line(run_cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    for words, message in (
        ([], "needs the folder of one dense model"),
        ([tiny_model, "--set", "peers=[awq]"], "peers.0: Input should be"),
        ([tiny_model, "--set", "widths=[]"], "peers needs widths and seeds"),
        ([tiny_model, "--set", "calibration=no.jsonl"], "no.jsonl: cannot be read"),
        ([tmp_path], "config.json"),
    ):
        given = ["--set", f"folder={tmp_path / 'runs'}"]
        code, out, err = run_cli("bench", "peers", *words, *given)
        assert (code, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1


def test_what_each_of_ours_is_trained_on() -> None:
    def told(system: Ours) -> tuple[int, bool, bool]:
        found = OwnJob(system, "best", (2,), 64, 0).settings(4096, "bfloat16")
        return found.generated, found.block.steps > 0, found.tune.steps > 0

    assert told("dedicated") == told("nested") == (2, True, True)
    # As published: the calibration text alone, and no training of the whole model.
    assert told("decoupleq") == (0, True, False)


def test_ours_beside_a_peer_that_ran_and_one_that_did_not(
    run_cli: Cli, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    saved(tmp_path, Job("hqq", 4, 32, 3), CheckpointSource(tiny_model))
    given = settings(tmp_path, text_file, "widths=[4]", "ours=[dedicated, rtn]")
    given += ["--set", "peers=[hqq, auto-round]"]
    code, text, err = run_cli("bench", "peers", tiny_model, "-q", "--json", *given)
    assert code == 0, err
    row = json.loads(text)
    rows = {r["system"]: r for r in row["rows"]}
    assert rows.keys() == {"dedicated", "rtn", "hqq", "auto-round"}
    # The peer's weights were round-to-nearest's, but for a zero rounded in other units.
    assert rows["hqq"]["gap"] == pytest.approx(rows["rtn"]["gap"], abs=2e-3)
    assert rows["hqq"]["bits_per_weight"] == rows["rtn"]["bits_per_weight"] == 5.0
    assert rows["rtn"]["best_peer"] == "hqq"
    assert rows["rtn"]["seconds"] > 0
    assert rows["dedicated"]["settings"]["block"] == {"steps": 0}
    assert "settings" not in rows["rtn"]
    assert "--set environment=DIR" in rows["auto-round"]["missing"]
    assert "auto-round" in (tmp_path / "peers.md").read_text()
    assert (tmp_path / "peers.svg").stat().st_size > 1000
    again = [*given, "--set", "tokens=2048"]
    code, _, err = run_cli("bench", "peers", tiny_model, "-q", *again)
    assert code == 2
    assert "holds results with another tokens" in err


@pytest.mark.skipif(ENVIRONMENT is None, reason=NO_ENVIRONMENT)
def test_the_driver_with_hqq(
    run_cli: Cli, tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    assert ENVIRONMENT is not None
    if "hqq" not in installed(Path(ENVIRONMENT), ["hqq"]):
        pytest.skip(f"{ENVIRONMENT} holds no hqq")
    given = settings(tmp_path, text_file, "widths=[3]", "ours=[rtn]", "peers=[hqq]")
    given += ["--set", f"environment={ENVIRONMENT}"]
    code, text, err = run_cli("bench", "peers", tiny_model, "-q", "--json", *given)
    assert code == 0, err
    rows = {r["system"]: r for r in json.loads(text)["rows"]}
    assert rows["hqq"]["bits_per_weight"] == rows["rtn"]["bits_per_weight"] == 4.0
    assert rows["hqq"]["settings"]["nbits"] == 3
    weights, _ = read_weights(Job("hqq", 3, 32, 3), tmp_path)
    dense = dict(load_source(CheckpointSource(tiny_model)).named_parameters())
    weight = dense["model.layers.0.self_attn.q_proj.weight"].detach()
    error = (weights["model.layers.0.self_attn.q_proj.weight"] - weight).norm()
    # Better than chance by far, and no better than a grid of eight levels can be.
    assert 0.05 < error / weight.norm() < 0.3
