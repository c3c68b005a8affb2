"""Recorded traces against generation step by step, and the file against damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fissile.errors import CorruptCheckpoint, FissileError, UnsupportedModel, UsageError
from fissile.eval.routing import find_routers
from fissile.eval.run import load_model, read_config
from fissile.serve.record import record_trace
from fissile.serve.synthetic import synthetic_trace, unit_model
from fissile.serve.trace import ModelShape, Trace, read_trace, write_trace

SMALL: dict[str, Any] = {"requests": 3, "prompt": (4, 9), "output": (2, 5), "seed": 4}


def step_by_step(model: Any, ids: list[int], prompt: int, output: int) -> list[list[set[int]]]:
    """Sets of every row and router while the model generates with its cache."""
    routers = find_routers(model, "model")
    rows: list[list[set[int]]] = []
    seen: list[Any] = []
    handles = [
        r.module.register_forward_hook(lambda _m, a, y, r=r: seen.append(r.read(a, y)))
        for r in routers
    ]
    cache, fed = None, ids[:prompt]
    for _ in range(output):
        seen.clear()
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([fed]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows += [
            [{int(e) for e in router[s] if e >= 0} for router in seen] for s in range(len(fed))
        ]
        fed = [int(out.logits[0, -1].argmax())]
    for handle in handles:
        handle.remove()
    return rows


@pytest.fixture(scope="module")
def mixtral(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture of experts of transformers with the demo model's tokenizer."""
    import shutil

    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=8192,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=None,
    )
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_model / name, folder / name)
    return folder


def check_against_generation(folder: Path, trace: Trace, ids: list[list[int]]) -> None:
    model = load_model(folder, read_config(folder))
    for r, (prompt, output) in enumerate(zip(trace.prompt, trace.output, strict=True)):
        truth = step_by_step(model, ids[r], int(prompt), int(output))
        first = int(trace.first_row[r])
        assert len(truth) == prompt + output - 1
        for offset, row in enumerate(truth):
            found = [{int(e) for e in d if e >= 0} for d in trace.routes[first + offset]]
            assert found == (row if trace.decisions > 1 else row[:1])


def gate_recall(folder: Path, trace: Trace, ids: list[list[int]]) -> float:
    """How well the second layer's gate knows its choices from the first layer's input."""
    model = load_model(folder, read_config(folder))
    gates = [layer.mlp.gate for layer in model.model.layers]
    seen: list[torch.Tensor] = []
    gates[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    shares = []
    for r, row in enumerate(ids):
        seen.clear()
        with torch.inference_mode():
            model(input_ids=torch.tensor([row]), use_cache=False)
            logits = seen[0].reshape(len(row), -1) @ gates[1].weight.T
        guess = logits.topk(2).indices.numpy()
        first = int(trace.first_row[r])
        truth = trace.routes[first : first + len(row), 1]
        shares.append(
            np.mean([len(set(a) & set(b)) / 2 for a, b in zip(guess, truth, strict=True)])
        )
    return float(np.mean(shares))


@pytest.fixture
def fed_ids(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids that `record_trace` runs, request by request."""
    import fissile.serve.record as record

    seen: list[list[int]] = []
    before = record._choices

    def watch(model: Any, routers: Any, ids: Any, where: str) -> Any:
        seen.append(list(ids))
        return before(model, routers, ids, where)

    monkeypatch.setattr(record, "_choices", watch)
    return seen


def test_a_stock_model_is_recorded_as_it_generates(
    mixtral: Path, text_file: Path, fed_ids: list[list[int]]
) -> None:
    trace = record_trace(mixtral, text_file, generate=True, **SMALL)
    check_against_generation(mixtral, trace, fed_ids)
    assert trace.decisions == 2
    assert trace.model.layers == 2
    assert trace.model.experts == 6
    # 3 matrices of 32 x 48 in 16 bits.
    assert trace.model.planes == ((3 * 32 * 48 * 2,),)
    assert trace.model.expert_flops == 2 * 3 * 32 * 48
    assert trace.weights is not None
    assert trace.weights.sum(-1) == pytest.approx(1, abs=2e-3)
    assert trace.scores is not None
    assert trace.candidates is not None
    assert trace.source["next_gate_recall"] == pytest.approx(gate_recall(mixtral, trace, fed_ids))
    # The chosen experts are those of highest score, in order.
    assert (np.sort(trace.candidates[..., :2]) == np.sort(trace.routes)).all()
    assert (np.diff(trace.scores.astype(np.float64), axis=-1) <= 0).all()


def test_an_artifact_is_recorded_as_it_generates(
    finished_run: Path, text_file: Path, fed_ids: list[list[int]]
) -> None:
    trace = record_trace(finished_run, text_file, generate=True, **SMALL)
    check_against_generation(finished_run / "model", trace, fed_ids)
    config = read_config(finished_run / "model")
    assert trace.decisions == 1
    assert trace.source["decides"] == "pregate"
    assert trace.source["next_gate_recall"] is None
    assert trace.model.layers == 2
    assert trace.model.experts == config["routing"]["num_experts"]
    sizes = config["routing"]["expert_sizes"]
    for layer, neurons in enumerate(sizes):
        weights, (base, *more) = 3 * 64 * neurons, trace.model.plane_bytes(layer)
        # Two bits, then one and one; on top scale and zero of a group of 32, 4 bytes each.
        assert base == weights / 4 + weights / 32 * 4
        assert more == [weights / 8 + weights / 32 * 4] * 2
    assert trace.scores is not None
    assert trace.scores.shape[-1] == min(4, 2 * trace.routes.shape[-1])


def test_the_text_that_follows_is_the_output(
    mixtral: Path, text_file: Path, fed_ids: list[list[int]]
) -> None:
    trace = record_trace(mixtral, text_file, **SMALL)
    assert [len(ids) for ids in fed_ids] == (trace.prompt + trace.output - 1).tolist()
    assert all(ids[0] == 0 for ids in fed_ids)
    assert set(trace.domains) == {"english", "python"}
    again = record_trace(mixtral, text_file, **SMALL)
    assert (again.routes == trace.routes).all()
    assert (again.arrival == trace.arrival).all()


def test_what_cannot_be_recorded_is_refused_first(
    demo_model: Path, mixtral: Path, text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModel, match="dense model"):
        record_trace(demo_model, text_file)
    with pytest.raises(UsageError, match="room for 128"):
        record_trace(mixtral, text_file, prompt=(4, 100), output=(4, 40))
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "a few words", "domain": "prose"}\n')
    with pytest.raises(UsageError, match="domain 'prose' has"):
        record_trace(mixtral, short, prompt=(40, 60), output=(4, 9))


def test_a_trace_survives_its_file(tmp_path: Path) -> None:
    model = ModelShape("m", 3, 5, 2, ((4, 2), (6, 2), (8, 1)), 7.0, 1.5, 2.5, 3.5)
    trace = synthetic_trace(
        "zipf", model, requests=9, prompt=(1, 4), output=(1, 6), one_decision=False, seed=2
    )
    path = tmp_path / "t.safetensors"
    write_trace(trace, path)
    found = read_trace(path)
    assert found.model == model
    assert found.model.total_bytes == 5 * (6 + 8 + 9)
    assert found.source == trace.source
    for name in ("routes", "prompt", "output", "arrival", "domain"):
        assert (getattr(found, name) == getattr(trace, name)).all()
        assert getattr(found, name).dtype == getattr(trace, name).dtype
    part = found.head(4)
    rows = int((part.prompt + part.output - 1).sum())
    assert (part.routes == trace.routes[:rows]).all()
    assert part.at_rate(2.0).arrival[-1] == pytest.approx(3 / 2.0)
    assert part.at_rate(np.inf).arrival.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("tensor", "value", "problem"),
    [
        ("routes", 99, "the model has 5"),
        ("prompt", 0, "no prompt"),
        ("output", 50, "rows of routes"),
        ("arrival", -1e9, "not ascending"),
        ("domain", 7, "is of domain 7"),
    ],
)
def test_contents_that_contradict_each_other_are_refused(
    tmp_path: Path, tensor: str, value: float, problem: str
) -> None:
    from safetensors.numpy import load_file, save_file

    from fissile.io.headers import read_header

    model = unit_model(1, 5)
    path = tmp_path / "t.safetensors"
    write_trace(synthetic_trace("uniform", model, requests=6, output=(2, 2)), path)
    arrays, metadata = load_file(path), read_header(path).metadata
    arrays[tensor].reshape(-1)[-1] = value
    save_file(arrays, path, metadata)
    with pytest.raises(CorruptCheckpoint, match=problem):
        read_trace(path)


def test_files_that_are_no_traces_are_refused(tmp_path: Path, demo_model: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_trace(synthetic_trace("uniform", unit_model(1, 5), requests=6), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(CorruptCheckpoint, match=r"t\.safetensors: truncated"):
        read_trace(path)
    path.write_bytes(whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(UsageError, match="format 9"):
        read_trace(path)
    path.write_bytes(whole.replace(b'\\"top_k\\": 1', b'\\"top_k\\": 7'))
    with pytest.raises(CorruptCheckpoint, match="mixture of experts"):
        read_trace(path)
    with pytest.raises(UsageError, match="not a trace"):
        read_trace(demo_model / "model.safetensors")
    with pytest.raises(UsageError, match="no such folder"):
        write_trace(synthetic_trace("uniform", unit_model(1, 5), requests=6), tmp_path / "a" / "b")


@pytest.mark.parametrize("kind", ["uniform", "zipf", "local"])
def test_synthetic_traces_have_the_statistics_they_are_named_for(kind: str) -> None:
    trace = synthetic_trace(
        kind,
        unit_model(4, 6, 2),
        requests=300,
        prompt=(20, 30),
        output=(10, 20),
        one_decision=False,
        rate=5.0,
        stay=0.6,
        skew=1.0,
        seed=1,
    )
    routes = np.sort(trace.routes, axis=-1)
    assert (routes[..., 0] < routes[..., 1]).all()
    assert trace.arrival[-1] == pytest.approx(300 / 5, rel=0.2)
    share = np.stack([np.bincount(trace.routes[:, d].ravel(), minlength=6) for d in range(4)])
    share = share / share.sum(1, keepdims=True)
    begins = np.zeros(len(routes), dtype=bool)
    begins[trace.first_row] = True
    same = (routes[1:] == routes[:-1]).all((1, 2))[~begins[1:]].mean()
    if kind == "uniform":
        assert share == pytest.approx(1 / 6, abs=0.01)
        assert same < 0.01
    elif kind == "zipf":
        # Two of six without replacement, weights 1/rank: the most popular is in most pairs.
        weights = 1 / np.arange(1, 7)
        p = weights / weights.sum()
        pair = p[:, None] * p[None, :] / (1 - p[:, None])
        np.fill_diagonal(pair, 0)
        truth = np.sort((pair.sum(0) + pair.sum(1)) / 2)
        assert np.sort(share, axis=1) == pytest.approx(np.tile(truth, (4, 1)), abs=0.01)
    else:
        assert same == pytest.approx(0.6, abs=0.03)
    single = synthetic_trace(kind, unit_model(4, 6, 2), requests=3, output=(5, 5))
    assert single.decisions == 1


def test_the_commands_record_simulate_and_report(
    finished_run: Path,
    text_file: Path,
    tmp_path: Path,
    run_cli: Callable[..., tuple[int, str, str]],
) -> None:
    path = tmp_path / "t.safetensors"
    words = ["trace", finished_run, "--data", text_file, "--requests", "6", "--prompt", "4,20"]
    code, out, err = run_cli(*words, "--output", "2,8", "--out", path, "--json", "-q")
    assert code == 0, err
    assert json.loads(out)["decisions"] == 1
    words = ["simulate", path, "--capacity", "0.3,0.6", "--out", tmp_path / "s", "-q"]
    code, out, err = run_cli(*words, "--system", "fissile", "--system", "mine=fcfs,none,lfu")
    assert code == 0, err
    rows = json.loads((tmp_path / "s" / "serving.json").read_text())["rows"]
    assert [(r["name"], r["share"]) for r in rows] == [
        (n, s) for n in ("fissile", "mine") for s in (0.3, 0.6)
    ]
    assert [line.split()[0] for line in out.splitlines()[1:5]] == ["fissile", "mine"] * 2
    page = (tmp_path / "s" / "serving.html").read_text()
    assert page.count("<img") == 3
    code, out, err = run_cli(
        "trace", "--synthetic", "local", "--out", path, "--requests", "5", "-q"
    )
    assert code == 0, err
    code, out, err = run_cli("simulate", path, "--json", "-q", "--limit", "2", "--rate", "inf")
    assert code == 0, err
    assert len({r["name"] for r in json.loads(out)["rows"]}) == 8


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["simulate", "T", "--system", "fisile"], "did you mean 'fissile'"),
        (["simulate", "T", "--system", "a=fcfs,none,lruu"], "unknown cache 'lruu'"),
        (["simulate", "T", "--system", "a=fcfs,none,lru,cpu"], "executor 'cpu'"),
        (["simulate", "T", "--system", "a=first"], "scheduler 'first'"),
        (["simulate", "T", "--capacity", "2"], "at most 1"),
        (["simulate", "T", "--capacity", "x"], "list of shares"),
        (["simulate", "T", "--hardware", "a100-pcie3"], "did you mean 'a100-pcie4'"),
        (["simulate", "T", "--planes", "3"], "3 planes: synthetic has 1"),
        (["simulate", "T", "--rate", "0"], "rate 0"),
        (["trace", "--out", "t"], "give a model, or --synthetic"),
        (["trace", "M", "--out", "t"], "needs --data"),
        (["trace", "--synthetic", "even", "--out", "t"], "'even' is not one of"),
        (["trace", "--synthetic", "zipf", "--out", "t", "--prompt", "9,3"], "1 <= A <= B"),
    ],
)
def test_wrong_words_are_one_clear_line(
    words: list[str], problem: str, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    path = tmp_path / "t.safetensors"
    write_trace(synthetic_trace("uniform", unit_model(1, 5), requests=6), path)
    code, out, err = run_cli(*[str(path) if word == "T" else word for word in words])
    assert code == 2
    assert out == ""
    assert problem in err
    assert len(err.splitlines()) == 1


def test_hardware_files(tmp_path: Path) -> None:
    from fissile.serve.hardware import MACHINES, read_hardware

    path = tmp_path / "box.yaml"
    path.write_text("flops: 1.0e+12\nmemory_bandwidth: 5.0e+10\nlink_bandwidth: 2.0e+9\n")
    found = read_hardware(str(path))
    assert (found.name, found.flops, found.link_latency) == ("box", 1e12, 0)
    assert found.transfer(4e9) == pytest.approx(2)
    assert found.expert(1e9, 1e9, 10) == pytest.approx(0.02)
    assert found.expert(1e9, 1e9, 100) == pytest.approx(0.1)
    for text, problem in (
        ("flops: 1\nmemory_bandwidth: 1\n", "link_bandwidth: Field required"),
        ("flops: -1\nmemory_bandwidth: 1\nlink_bandwidth: 1\n", "greater than 0"),
        ("flops: 1\nmemory_bandwith: 1\nlink_bandwidth: 1\n", "memory_bandwidth"),
        ("- a\n", "expected a mapping"),
        ("a: [", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(FissileError, match=problem):
            read_hardware(str(path))
    assert {m.name for m in MACHINES.values()} == set(MACHINES)
