"""Every recipe from beginning to end on a tiny random model of its exact architecture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fissile import export, families
from fissile.cli.main import main
from fissile.models.source import CheckpointSource, load_source
from fissile.models.stream import StreamedModel
from fissile.recipe_files import PUBLISHED, load_recipe, shipped_recipes

RECIPES = [name for name, path in shipped_recipes().items() if (path.parent / PUBLISHED).is_file()]
FOLDERS = sorted({name.rpartition("/")[0] for name in RECIPES})
WHOLE = {
    name.partition("/")[0]: name
    for kind in ("w2-nested", "moe-w2-nested")
    for name in RECIPES
    if name.rpartition("/")[2] == kind
}.values()
"""One recipe of a family runs through verification and the report; the others end with the export.

With experts and nested weights where the family has such a recipe.
"""
BALANCED = "olmo2/1b/w2-nested"
"""The recipe whose blocks are trained while they are quantized, as all of them say."""

SMALL = {
    "calibrate.tokens": 512,
    "calibrate.context": 64,
    "calibrate.batch_tokens": 512,
    "calibrate.sketch_dim": 8,
    "extract.multiple": 32,
    "extract.allocation_tokens": 64,
    "extract.refine_tokens": 128,
    "extract.refine_rounds": 1,
    "route.steps": 2,
    "route.fit_steps": 2,
    "route.batch_tokens": 128,
    "recover.steps": 1,
    "recover.batch_tokens": 64,
    "recover.accumulate": 1,
    "recover.context": 64,
    "recover.refit_tokens": 256,
    "quantize.effort": "fast",
    "quantize.group_size": 32,
    "quantize.tokens": 256,
    "evaluate.tokens": 128,
    "evaluate.context": 64,
    "evaluate.shares": [0.75],
    "evaluate.controls": ["static"],
    "evaluate.baselines": ["rtn"],
    "evaluate.choices": 0,
}
"""Least work; what is done, with which experts, router, recovery and widths, is the recipe's."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of the recipes that have been run so far."""
    return {}


@pytest.fixture(scope="module")
def run(
    tiny: Callable[[str], Path],
    text_file: Path,
    runs: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    def call(name: str) -> Path:
        if name not in runs:
            out = tmp_path_factory.mktemp("run") / "out"
            words = ["run", name, "-q", "--model", str(tiny(name)), "--out", str(out)]
            data = {"calibrate.data": text_file, "evaluate.data": text_file}
            for key, value in {**SMALL, **data}.items():
                if (name, key) != (BALANCED, "quantize.effort"):
                    words += ["--set", f"{key}={value}"]
            stop = [] if name in WHOLE else ["--stop-after", "export"]
            assert main([*words, *stop]) == 0
            runs[name] = out
        return runs[name]

    return call


@pytest.mark.parametrize("folder", FOLDERS)
def test_tiny_models_are_of_a_known_architecture(folder: str, tiny: Callable[[str], Path]) -> None:
    """Read by us, whole and layer by layer, they compute what transformers' own classes do."""
    source = tiny(f"{folder}/w2-nested")
    checkpoint = CheckpointSource(source)
    assert families.find(checkpoint.headers.config).name == folder.partition("/")[0]
    stock = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.randint(3, 8192, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = stock(ids).logits
        whole = load_source(checkpoint)(ids).logits
    assert want.std() > 0.1
    assert (whole - want).abs().max() < 1e-4 * want.abs().max()
    assert (StreamedModel(checkpoint).forward(ids) - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs(name: str, run: Callable[[str], Path]) -> None:
    out = run(name)
    config = json.loads((out / "model" / "config.json").read_text())
    kind = name.rpartition("/")[2]
    routing, nested = config.get("routing"), config.get("nested")
    if kind.startswith("moe"):
        assert routing is not None
        wanted = load_recipe(shipped_recipes()[name]).extract
        found = routing["kind"], routing["num_experts"], routing["top_k"]
        assert found == ("pregate", wanted.num_experts, wanted.top_k)
    else:
        mixture = families.FAMILIES[config["backbone"]["family"]].experts is not None
        assert (routing is not None) == mixture
    if kind.endswith("w2-nested"):
        assert nested is not None
        assert nested["widths"] == [2, 3, 4]
        effort = load_recipe(out / "recipe.yaml").quantize.effort
        assert effort == ("balanced" if name == BALANCED else "fast")
        assert config["bits"] == 2
        modules = set(nested["modules"])
        linears = {n for n in modules if ".self_attn." in n or ".mlp." in n}
        # Every linear of attention and FFN, routers and norms aside.
        floats = CheckpointSource(out / "model").layer_state(0)
        kept = {f"model.layers.0.{n}" for n, t in floats.items() if t.ndim > 1} - linears
        assert all("selector" in n or "restore" in n or "shared_gate" in n for n in kept)
    else:
        assert nested is None
    assert (out / "report.html").is_file() == (name in WHOLE)


def test_artifacts_load_in_a_process_without_fissile(
    run: Callable[[str], Path], tmp_path: Path
) -> None:
    """All at once: starting Python and transformers is most of the work."""
    folders = {name: run(name) / "model" for name in RECIPES}
    ids = torch.arange(3, 43)[None]
    save_file({"ids": ids}, tmp_path / "request.safetensors")
    jobs = [[str(path), str(tmp_path / f"{i}.st")] for i, path in enumerate(folders.values())]
    script = Path(export.__file__).with_name("reload.py")
    code = (
        "import json, runpy, sys\n"
        f"main = runpy.run_path({str(script)!r})['main']\n"
        "for folder, answer in json.loads(sys.argv[1]):\n"
        f"    main(folder, {str(tmp_path / 'request.safetensors')!r}, answer, sys.argv[2])\n"
    )
    private = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, json.dumps(jobs), "0"],
        env={**os.environ, **private},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for (name, folder), (_, answer) in zip(folders.items(), jobs, strict=True):
        bits = 2 if name.endswith("w2-nested") else None
        with torch.no_grad():
            own = load_source(CheckpointSource(folder, bits=bits))(ids).logits
        strange = load_file(answer)["logits_0"]
        assert own.std() > 0.01, name
        assert (own - strange).abs().max() < 1e-3 * own.abs().max(), name


def test_the_report_of_a_mixture_names_its_own_experts(run: Callable[[str], Path]) -> None:
    card = (run("qwen3_moe/30b-a3b/w2-nested") / "model" / "README.md").read_text()
    assert "mixture-of-experts" in card


def test_a_mixture_is_not_divided_again(
    tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words: list[Any] = ["run", "llama/3.2-1b/moe", "--model", tiny("olmoe/1b-7b/w2-nested")]
    assert main([*map(str, words), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "olmoe has experts of its own" in message
    assert "set extract.enabled=false" in message
