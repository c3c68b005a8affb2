"""Plans of huge models made of headers only, exact artifact sizes, refusals and shortfalls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

from fissile.config import Recipe
from fissile.errors import CorruptCheckpoint, RecipeError, ResourceError, UsageError
from fissile.families import FAMILIES, dense_names
from fissile.io.headers import open_checkpoint_headers
from fissile.recipe_files import parse_recipe
from fissile.run import machine, plan
from fissile.run.plan import Plan, make_plan
from fissile.run.sizing import artifact_sizes

LLAMA_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
TINY: dict[str, Any] = {
    **LLAMA_7B,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


def sparse(folder: Path, config: dict[str, Any], shards: int = 1) -> Path:
    """A checkpoint with valid headers and holes instead of data: any size, no disk."""
    folder.mkdir(parents=True)
    family = FAMILIES[config["model_type"]]
    shapes = {s.name: s.stored for _, s in dense_names(family, config)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    names, weight_map = list(shapes), {}
    for k in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{k}.safetensors"
        header, end = {}, 0
        for name in names[k::shards]:
            begin, end = end, end + 2 * prod(shapes[name])
            entry = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [begin, end]}
            header[name], weight_map[name] = entry, file
        raw = json.dumps(header).encode()
        with open(folder / file, "wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            out.truncate(8 + len(raw) + end)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse(tmp_path_factory.mktemp("big") / "llama-7b", LLAMA_7B, shards=3)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return sparse(tmp_path / "tiny", TINY)


def recipe(**sections: Any) -> Recipe:
    """A recipe of sections given as mappings."""
    return parse_recipe({"name": "test", **sections})


SMALL = {"num_experts": 4, "top_k": 2, "multiple": 16}


def test_seven_billion_in_five_seconds_without_torch(big: Path) -> None:
    script = (
        "import json, sys; from pathlib import Path\n"
        "from fissile.config import Recipe; from fissile.run.plan import make_plan\n"
        "plan = make_plan(Recipe(), Path(sys.argv[1]))\n"
        "loaded = sorted({m.partition('.')[0] for m in sys.modules} & {'torch', 'transformers'})\n"
        "print(json.dumps({'loaded': loaded, **plan.to_dict()}))\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script, str(big)], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - began < 5
    found = json.loads(done.stdout)
    assert found["loaded"] == []
    assert found["parameters"] == 6_738_415_616
    assert found["bytes_in"] == 2 * 6_738_415_616
    stages = [row["stage"] for row in found["stages"]]
    assert stages == [
        "calibrate",
        "extract",
        "route",
        "recover",
        "quantize",
        "export",
        "verify",
        "evaluate",
        "report",
    ]
    # Training holds student and teacher in float32: 54 GB before anything else.
    assert found["peak_stage"] == "recover"
    assert found["peak_memory_bytes"] > 8 * found["parameters"]
    quantize = found["stages"][4]
    assert 2e9 < quantize["peak_memory_bytes"] < 16e9
    assert sum(quantize["memory"].values()) == quantize["peak_memory_bytes"]
    assert found["experts"] == {
        "shared": 6400,
        "expert": 576,
        "num_experts": 8,
        "active_share": (6400 + 3 * 576) / 11008,
    }


def test_artifact_bytes_are_those_of_the_layout(tiny: Path) -> None:
    """Against bytes counted tensor by tensor, by the formulas of the format."""
    wanted = recipe(extract={"enabled": False}, quantize={"group_size": 32}, export={})
    found = make_plan(wanted, tiny)
    nested = floats = nested_params = 0
    loaded = {2: 0, 3: 0, 4: 0}
    for name, (_, info) in open_checkpoint_headers(tiny).tensors.items():
        count = prod(info.shape)
        if "proj" not in name:
            floats += 2 * count
            continue
        nested_params += count
        groups = count // 32
        nested += count // 2 + 3 * 4 * groups
        for bits in loaded:
            loaded[bits] += count * bits // 8 + 4 * groups
    assert found.sizes.stored == nested + floats
    assert found.sizes.loaded == {bits: size + floats for bits, size in loaded.items()}
    assert found.sizes.bits_per_weight == {2: 3.0, 3: 4.0, 4: 5.0}
    assert nested_params == 2 * (4 * 64 * 64 + 3 * 64 * 256)


def test_one_width_stores_less_than_three(tiny: Path) -> None:
    def stored(**quantize: Any) -> int:
        settings = {"group_size": 32, **quantize}
        return make_plan(recipe(extract={"enabled": False}, quantize=settings), tiny).sizes.stored

    assert stored(widths=[2]) < stored(widths=[2, 3]) < stored(widths=[2, 3, 4])
    assert stored(widths=[4]) < stored(widths=[2, 3, 4])
    assert stored(enabled=False) == open_checkpoint_headers(tiny).total_bytes
    assert stored(attention=False) > stored()


def test_stages_follow_the_switches(tiny: Path) -> None:
    def names(stop_after: str | None = None, **sections: Any) -> list[str]:
        found = make_plan(recipe(**sections), tiny, stop_after=stop_after)
        return [cost.stage for cost in found.stages]

    last = ["export", "verify", "evaluate", "report"]
    assert names(extract={"enabled": False}) == ["quantize", *last]
    assert names(extract={"enabled": False}, quantize={"enabled": False}) == last
    everything = names(extract=SMALL)
    assert everything[:5] == ["calibrate", "extract", "route", "recover", "quantize"]
    assert names(extract=SMALL, stop_after="route") == everything[:3]
    assert "route" not in names(extract=SMALL, route={"kind": "static"})
    assert names(extract={"enabled": False}, quantize={"effort": "best"})[1] == "tune"
    no_recovery = {"refit": False, "method": "none"}
    assert "recover" not in names(extract=SMALL, recover=no_recovery)
    with pytest.raises(UsageError, match="stage 'rout' is not one of calibrate"):
        names(extract=SMALL, stop_after="rout")


GROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "calibrate": ("calibrate", {"calibrate": {"tokens": 10_000_000}}),
    "batch": ("calibrate", {"calibrate": {"batch_tokens": 500_000}}),
    "sketch": ("extract", {"calibrate": {"sketch_dim": 512}}),
    "oracle": ("route", {"calibrate": {"tokens": 10_000_000}}),
    "train": ("recover", {"recover": {"batch_tokens": 500_000, "steps": 10}}),
    "full": ("recover", {"recover": {"method": "full", "steps": 200}}),
    "stream": ("quantize", {"quantize": {"tokens": 10_000_000, "effort": "fast"}}),
    "block": ("quantize", {"quantize": {"block": {"batch_tokens": 100_000}}}),
    "drift": ("quantize", {"quantize": {"blend": 0.5, "block": {"steps": 0}}}),
    "scoring": ("evaluate", {"evaluate": {"batch_tokens": 500_000}}),
}
BEFORE: dict[str, dict[str, Any]] = {"drift": {"quantize": {"effort": "fast"}}}


@pytest.mark.parametrize("case", GROWS)
def test_what_is_raised_costs_memory(case: str, big: Path) -> None:
    stage, sections = GROWS[case]
    before = make_plan(recipe(**BEFORE.get(case, {})), big).stage(stage).peak
    after = make_plan(recipe(**sections), big).stage(stage).peak
    assert after > before


def test_streams_beside_each_other_lie_in_files(big: Path) -> None:
    few = make_plan(recipe(), big).stage("quantize")
    many = make_plan(recipe(quantize={"tokens": 131072}), big).stage("quantize")
    assert many.peak == few.peak
    # Three widths, the float model and its outputs, in float32.
    assert many.disk - few.disk == 5 * 4 * 65536 * 4096


def test_effort_and_tokens_cost_time(big: Path) -> None:
    def seconds(**sections: Any) -> float:
        return make_plan(recipe(**sections), big).stage("quantize").seconds[1]

    fast, best = (seconds(quantize={"effort": name}) for name in ("fast", "best"))
    assert fast < seconds() < best
    assert seconds(quantize={"tokens": 1_000_000}) > seconds()
    low, high = make_plan(recipe(), big).seconds
    assert 0 < low < high


def test_long_contexts_are_cut_to_the_model(tiny: Path) -> None:
    short = recipe(extract=SMALL, calibrate={"context": 64, "batch_tokens": 64})
    long = recipe(extract=SMALL, calibrate={"context": 4096, "batch_tokens": 64})
    assert make_plan(short, tiny).stages[0] == make_plan(long, tiny).stages[0]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "too many experts": (
        {"extract": {"num_experts": 8, "multiple": 64}},
        "8 experts of at least 64 neurons need 512, the FFN has 256; lower",
    ),
    "share too small": (
        {"extract": {**SMALL, "active_share": 0.2}},
        r"256 \* 0\.8 / 2 = 102 neurons.* only up to 64; raise active_share to 0\.500",
    ),
    "share of a control": (
        {"extract": SMALL, "evaluate": {"shares": [0.75, 0.1]}},
        r"active_share 0\.1 .*raise active_share",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_recipes_that_do_not_fit_the_model(case: str, tiny: Path) -> None:
    sections, expected = REFUSED[case]
    with pytest.raises(RecipeError, match=expected):
        make_plan(recipe(**sections), tiny)


def test_damaged_checkpoints_are_refused(tiny: Path) -> None:
    os.truncate(tiny / "model.safetensors", (tiny / "model.safetensors").stat().st_size - 1)
    with pytest.raises(CorruptCheckpoint, match="truncated"):
        make_plan(recipe(extract=SMALL), tiny)


def _notes(plan: Plan) -> str:
    return "\n".join(plan.warnings)


def test_warnings_name_what_will_be_different(tiny: Path, tmp_path: Path) -> None:
    assert "multiples of 16" not in _notes(make_plan(recipe(extract=SMALL), tiny))
    coarse = {"num_experts": 2, "top_k": 1, "multiple": 64, "active_share": 0.9}
    assert "active share becomes 0.750 instead of 0.9" in _notes(
        make_plan(recipe(extract=coarse, evaluate={"shares": [0.75]}), tiny)
    )
    narrow = {"num_experts": 4, "top_k": 2, "multiple": 8, "active_share": 0.7}
    notes = _notes(make_plan(recipe(extract=narrow, evaluate={"shares": [0.75]}), tiny))
    assert "layers.0.mlp.experts.down_proj and 1 more stay in floating point: 40 inputs" in notes
    wide = _notes(make_plan(recipe(extract=SMALL, quantize={"group_size": 128}), tiny))
    assert "get groups of 64 instead of 128" in wide
    few = _notes(make_plan(recipe(extract=SMALL, quantize={"tokens": 100}), tiny))
    assert "an expert sees about 50 tokens for 64 inputs" in few
    bits = recipe(extract={"enabled": False}, quantize={"widths": [2]})
    assert "2 bits are served by default" in _notes(make_plan(bits, tiny))
    (tiny / "tokenizer.json").unlink()
    assert "has no tokenizer" in _notes(make_plan(recipe(extract=SMALL), tiny))


def test_shortfalls_name_stage_need_and_way_out(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda: 16_000_000_000)
    monkeypatch.setattr(plan, "free_disk", lambda _: 1_000_000)
    found = make_plan(recipe(), big, tmp_path / "new" / "run")
    assert found.to_dict()["fits"] is False
    with pytest.raises(ResourceError) as caught:
        found.check()
    message = str(caught.value)
    assert "recover needs" in message
    assert "16.00 GB are free (set recover.method=none" in message
    best = recipe(extract={"enabled": False}, quantize={"effort": "best"})
    writes, tunes, _ = make_plan(best, big).shortfalls()
    assert "quantize.generated=0" in writes
    assert "quantize.tune.steps=0" in tunes
    assert "of disk under" in message
    assert "\n" not in message
    only = recipe(extract={"enabled": False}, quantize={"tokens": 16384})
    monkeypatch.setattr(plan, "free_disk", lambda _: 10**12)
    make_plan(only, big, tmp_path, stop_after="verify").check()


def test_unknown_memory_is_no_shortfall(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda: None)
    make_plan(recipe(extract=SMALL), tiny).check()


def test_lines_and_json_tell_the_same(tiny: Path, tmp_path: Path) -> None:
    found = make_plan(recipe(extract=SMALL), tiny, tmp_path)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    text = "\n".join(found.lines())
    assert f"experts of {data['experts']['expert']}" in text
    assert all(row["stage"] in text for row in data["stages"])
    assert all(warning in text for warning in data["warnings"])
    assert f"peak memory {data['peak_memory_bytes'] / 1e9:.2f} GB" in text


def test_sizes_of_every_family_follow_its_tensors(tmp_path: Path) -> None:
    """Without quantization the artifact holds exactly the source's weights."""
    off = recipe(extract={"enabled": False}, quantize={"enabled": False})
    dense = {name: family for name, family in FAMILIES.items() if family.experts is None}
    for name, family in dense.items():
        config = {**TINY, "model_type": family.model_types[0], "num_key_value_heads": 2}
        folder = tmp_path / name
        sparse_config = {**config, "head_dim": 16}
        folder.mkdir()
        shapes = {s.name: s.stored for _, s in dense_names(family, sparse_config)}
        planned = {
            **sparse_config,
            "model_type": "fissile",
            "backbone": {"family": name},
            "num_base_layers": 2,
        }
        sizes = artifact_sizes(off, family, planned)
        assert sizes.stored == 2 * sum(map(prod, shapes.values()))


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., Path]:
    """A root folder with the given memory files."""

    def build(**files: str) -> Path:
        root = tmp_path / "root"
        for name, text in files.items():
            path = root / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return root

    return build


def test_memory_respects_the_container(fake: Callable[..., Path]) -> None:
    meminfo = "MemTotal: 100 kB\nMemAvailable: 80 kB\n"
    root = fake(proc__meminfo=meminfo)
    assert machine.available_memory(root) == 80 * 1024
    assert machine.total_memory(root) == 100 * 1024
    cgroup = {
        "sys__fs__cgroup__memory_dot_max": "50000\n",
        "sys__fs__cgroup__memory_dot_current": "30000\n",
        "sys__fs__cgroup__memory_dot_stat": "anon 20000\ninactive_file 5000\n",
    }
    assert machine.available_memory(fake(**cgroup)) == 25_000
    assert machine.available_memory(fake(sys__fs__cgroup__memory_dot_max="max\n")) == 80 * 1024
    assert machine.available_memory(Path("/nowhere")) is None


def test_disk_is_that_of_the_nearest_folder(tmp_path: Path) -> None:
    assert machine.free_disk(tmp_path / "a" / "b") == pytest.approx(
        machine.free_disk(tmp_path), rel=0.05
    )


def test_processors_respect_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert machine.processors() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    assert machine.processors() == len(os.sched_getaffinity(0))


def test_layers_and_the_rest_make_the_whole(tiny: Path) -> None:
    wanted = recipe(extract={"enabled": False}, quantize={"group_size": 32})
    outer = 2 * (2 * TINY["vocab_size"] * 64 + 64)
    sizes = make_plan(wanted, tiny).sizes
    assert sizes.layers + outer == sizes.stored


def test_predicted_memory_of_a_measured_layer(tmp_path: Path) -> None:
    """One layer of a 1.1B model, 16384 tokens in batches of 8192: 2.65 GB were measured."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048}
    folder = sparse(tmp_path / "one", {**LLAMA_7B, **sizes, **heads})
    wanted = recipe(extract={"enabled": False}, quantize={"tokens": 16384, "effort": "fast"})
    assert make_plan(wanted, folder).stage("quantize").peak == pytest.approx(2.655e9, rel=0.15)
