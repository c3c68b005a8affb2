"""The model card: what it says, what it must not say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from fissile.errors import CorruptCheckpoint
from fissile.run.card import model_card


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "model"
    folder.mkdir(parents=True)
    config = {
        "model_type": "fissile",
        "backbone": {"family": "llama"},
        "num_base_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 256,
        "bits": 4,
        "routing": {
            "kind": "pregate", "num_experts": 4, "top_k": 2,
            "shared_sizes": [128, 64], "expert_sizes": [32, 48],
        },
        "nested": {"widths": [2, 3, 4], "group_size": 32},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"x" * 1234)
    run = folder.parent
    (run / "journal").mkdir()
    rows = [
        {"layer": i, "tensor": "mlp|x", "loss": {"2": 0.1 * (i + 1), "4": 0.01}} for i in (0, 1)
    ]
    (run / "journal" / "quantize.json").write_text(json.dumps({"layers": rows}))
    (run / "ledger.csv").write_text("kind,stage,layer,module,detail,value\nkept_float,q,,m,d,\n")
    (run / "recipe.yaml").write_text("name: t\ncalibrate:\n  data: /home/someone/text.jsonl\n")
    return folder


def test_the_card_says_what_the_model_is(artifact: Path, tmp_path: Path) -> None:
    source = tmp_path / "base-model"
    source.mkdir()
    (source / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    text = model_card(artifact, artifact.parent, source)
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "mit"
    assert front["base_model"] == "base-model"
    assert {"mixture-of-experts", "quantized", "2-bit", "3-bit", "4-bit"} <= set(front["tags"])
    assert "4 of 32 to 48 neurons, 2 per token" in text
    assert "1,234 bytes" in text
    assert "bits=2" in text
    assert "| 2 | 15.00 % | 20.00 % | layer 1 mlp\\|x |" in text
    assert "| kept_float | 1 |" in text


def test_the_card_names_no_folder_and_does_not_change(artifact: Path) -> None:
    text = model_card(artifact, artifact.parent)
    assert text == model_card(artifact, artifact.parent)
    assert "license: unknown" in text
    assert "data: text.jsonl" in text
    assert "someone" not in text
    assert str(artifact.parent) not in text


def test_the_card_of_a_dense_float_model(artifact: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    config |= {"routing": None, "nested": None, "bits": None}
    (artifact / "config.json").write_text(json.dumps(config))
    text = model_card(artifact)
    assert "bits=" not in text
    assert "experts" not in text.split("## Load")[0]
    (artifact / "config.json").unlink()
    with pytest.raises(CorruptCheckpoint, match=r"config\.json"):
        model_card(artifact)
