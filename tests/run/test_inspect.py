"""What a folder is said to be, and the environment report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from fissile import __version__, families
from fissile.errors import UsageError
from fissile.families.artifact import artifact_tensors
from fissile.io.headers import read_header
from fissile.io.manifest import Origin, write_manifest
from fissile.io.writer import DTYPE_NAMES, PlannedTensor, ShardWriter
from fissile.kernels import dispatch
from fissile.models.build import dense_config, with_nested, with_routing
from fissile.run import doctor
from fissile.run.inspect import inspect_source

LLAMA = transformers.LlamaConfig(
    vocab_size=48,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)


def as_json(found: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(found, allow_nan=False))


def test_a_dense_checkpoint(tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_config(LLAMA)
    model.save_pretrained(tmp_path)
    found = as_json(inspect_source(tmp_path))
    assert found["kind"] == "dense checkpoint"
    assert (found["family"], found["layers"], found["supported"]) == ("llama", 2, True)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["total_bytes"] == 4 * found["parameters"]
    assert found["dtypes"] == {"F32": found["tensors"]}
    assert found["tokenizer"] is False
    assert "manifest" not in found


def test_an_unknown_family_is_described(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    found = as_json(inspect_source(tmp_path))
    assert found["supported"] is False
    assert found["problem"].startswith("model_type: found 'bert'")
    assert found["total_bytes"] == 12


def test_a_damaged_checkpoint_is_described(tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_config(LLAMA).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    found = inspect_source(tmp_path)
    assert found["supported"] is False
    assert "embed_tokens.weight has shape [48, 64], expected [50, 64]" in found["problem"]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with a routed, nested artifact of zeros."""
    routing = {
        "kind": "pregate",
        "num_experts": 3,
        "top_k": 2,
        "shared_sizes": [64, 64],
        "expert_sizes": [32, 32],
        "per_layer": False,
        "layout": "disjoint",
        "shared_bias": True,
        "router": {"attention_dim": 8, "inner_dim": 24},
    }
    config = with_routing(dense_config(LLAMA.to_dict(), families.FAMILIES["llama"]), routing)
    names = [f"model.layers.{i}.mlp.experts.{x}_proj" for i in (0, 1) for x in ("gate_up", "down")]
    nested = {"layout": 1, "widths": [2, 3, 4], "group_size": 32, "modules": names}
    fields = with_nested(config, nested, 3).to_dict() | {"model_type": "fissile"}
    folder = tmp_path / "run" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    (folder.parent / "recipe.yaml").write_text("name: x")
    tensors = artifact_tensors(families.FAMILIES["llama"], fields)
    plan = [PlannedTensor(n, dtype or "BF16", shape) for n, (dtype, shape) in tensors]
    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    with ShardWriter(folder, plan, 1 << 30) as writer:
        for tensor in plan:
            writer.write(tensor.name, torch.zeros(tensor.shape, dtype=dtypes[tensor.dtype]))
    write_manifest(folder, Origin({"name": "x"}, seed=7, recipe_sha256="r"))
    return folder.parent


def test_a_run_folder_and_its_artifact(run_folder: Path) -> None:
    found = as_json(inspect_source(run_folder, hashes=True))
    assert found["kind"] == "artifact, routed, bit-nested weights"
    assert found["run"] == {
        "recipe.yaml": True,
        "plan.json": False,
        "ledger.csv": False,
        "metrics.json": False,
        "report.html": False,
    }
    assert found["routing"]["active_share"] == (64 + 2 * 32) / 160
    assert (found["widths"], found["default_bits"]) == ([2, 3, 4], 3)
    assert found["manifest"]["problems"] == []
    assert found["manifest"]["seed"] == 7
    infos = read_header(run_folder / "model" / "model.safetensors").tensors
    weights = 2 * 3 * (64 * 64 + 64 * 32)
    rows = {row["bits"]: row for row in found["by_width"]}
    for bits in (2, 3, 4):
        # Planes hold one bit a weight and width (two the first), 32 weights share 4 float bytes.
        assert rows[bits]["bits_per_weight"] == bits + 1.0
        planes = [f".plane_{k}" for k in range(2, bits + 1)]
        suffixes = (*planes, f".theta_{bits}")
        others = [n for n in infos if ".plane_" not in n and ".theta_" not in n]
        wanted = [n for n in infos if n.endswith(suffixes)] + others
        assert rows[bits]["loaded_bytes"] == sum(infos[n].nbytes for n in wanted)
    assert rows["all"]["loaded_bytes"] == found["total_bytes"]
    assert rows["all"]["bits_per_weight"] == 7.0
    assert found["parameters"] > weights


def test_changes_are_noticed_with_hashes(run_folder: Path) -> None:
    path = run_folder / "model" / "config.json"
    path.write_text(
        path.read_text().replace('"initializer_range": 0.02', '"initializer_range": 0.03')
    )
    assert inspect_source(run_folder)["manifest"]["problems"] == []
    [problem] = inspect_source(run_folder, hashes=True)["manifest"]["problems"]
    assert problem.startswith("config.json: contents changed")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        inspect_source(tmp_path)


def test_doctor_reports_and_touches_no_device() -> None:
    script = (
        "import json, sys; from fissile.run import doctor\n"
        "assert 'torch' not in sys.modules\n"
        "found = doctor.collect(); import torch\n"
        "print(json.dumps({**found, 'initialised': torch.cuda.is_initialized(),"
        " 'triton': 'triton' in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["initialised"] is False
    assert found["triton"] is False
    assert found["fissile"] == __version__
    assert found["packages"]["torch"] == torch.__version__
    assert found["memory"]["total_bytes"] >= found["memory"]["available_bytes"] > 0
    assert found["cpu"]["usable"] >= 1


def test_doctor_keeps_secrets_and_names_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = doctor.collect()
    assert "hf_secret" not in json.dumps(found)
    assert found["environment"]["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setattr(doctor, "_DRIVERS", {"nvidia": Path("/nowhere/at/all")})
    found = doctor.kernel_path()
    assert found["device"] == "cpu: no GPU driver"
    assert {found[f"{bits} bits"] for bits in (2, 3, 4, 6, 8)} == {
        "columns (packed codes, in float32)"
    }


def test_doctor_says_why_a_width_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_DRIVERS", {"nvidia": Path(__file__)})
    monkeypatch.setattr(doctor, "_capability", lambda: (8, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(dispatch, "triton_version", lambda: "3.6.0")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name)
    dispatch.refusal.cache_clear()
    found = doctor.kernel_path()
    assert found["device"].startswith("cuda: ")
    assert found["4 bits"] == "triton (triton 3.6.0, launch table default, never timed)"
    assert found["6 bits"].endswith("never timed; held as 8 bits)")
    assert found["rows of an expert"].startswith("decode kernels up to ")
    without = {"triton": None}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: without.get(name, name))
    dispatch.refusal.cache_clear()
    assert doctor.kernel_path()["4 bits"] == "decoded (triton is not installed)"
    dispatch.refusal.cache_clear()
