"""The artifact: prefixes, bytes that are read, and loading where fissile is not installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fissile import models
from fissile.export.artifact import portable
from fissile.export.verify import fresh_logits, probe_ids, verify
from fissile.io.headers import open_checkpoint_headers
from fissile.models.source import CheckpointSource, load_source

WEIGHTS = "model.safetensors"


def codes_by_hand(tensors: dict[str, Tensor], name: str) -> dict[int, np.ndarray]:
    """Codes at every width, unpacked bit by bit with numpy."""
    two = tensors[f"{name}.plane_2"].numpy()
    high = np.stack([(two >> (2 * j)) & 3 for j in range(4)], -1).reshape(*two.shape[:-1], -1)
    bits = {}
    for width in (3, 4):
        plane = tensors[f"{name}.plane_{width}"].numpy()
        bits[width] = np.unpackbits(plane, axis=-1, bitorder="little")
    three = high * 2 + bits[3]
    return {2: high, 3: three, 4: three * 2 + bits[4]}


def weight_by_hand(tensors: dict[str, Tensor], name: str, width: int) -> np.ndarray:
    codes = codes_by_hand(tensors, name)[width].astype(np.float32)
    theta = tensors[f"{name}.theta_{width}"].numpy().view(np.float16).astype(np.float32)
    groups = codes.reshape(*codes.shape[:-1], theta.shape[-2], -1)
    return (groups * theta[..., :1] + theta[..., 1:]).reshape(codes.shape)


@pytest.fixture(scope="module")
def tensors(finished_run: Path) -> dict[str, Tensor]:
    return load_file(finished_run / "model" / WEIGHTS)


NAMES = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.shared.down_proj.weight",
    "model.layers.1.mlp.experts.gate_up_proj",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [2, 3, 4])
def test_a_width_is_a_prefix_of_the_stored_code(
    finished_run: Path, tensors: dict[str, Tensor], name: str, width: int
) -> None:
    codes = codes_by_hand(tensors, name)
    assert (codes[width] == codes[4] >> (4 - width)).all()
    source = CheckpointSource(finished_run, bits=width)
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    got = source.layer_state(int(layer))[rest].numpy()
    assert (got == weight_by_hand(tensors, name, width)).all()
    assert np.unique(got[..., :32]).size > 2


def test_two_bits_read_only_their_part_of_the_file(finished_run: Path) -> None:
    headers = open_checkpoint_headers(finished_run)
    beyond = re.compile(r"\.(plane|theta)_[34]$")
    wanted = sum(i.nbytes for n, (_, i) in headers.tensors.items() if not beyond.search(n))
    source = CheckpointSource(finished_run, bits=2)
    load_source(source)
    assert source.bytes_read == wanted
    assert wanted < sum(info.nbytes for _, info in headers.tensors.values())


def test_transformers_materialises_only_the_width_it_serves(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Count what from_pretrained takes out of the mapped file: headers aside, bytes it copies."""
    from transformers import AutoModelForCausalLM, modeling_utils

    taken: dict[str, int] = {}
    real = modeling_utils.safe_open

    class Slice:
        def __init__(self, name: str, inner: Any) -> None:
            self._name, self._inner = name, inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def __getitem__(self, index: Any) -> Tensor:
            tensor = self._inner[index]
            taken[self._name] = tensor.numel() * tensor.element_size()
            return tensor

    class Counting:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._file = real(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Any:
            self._file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self._file.__exit__(*args)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self._file.get_slice(name))

    monkeypatch.setattr(modeling_utils, "safe_open", Counting)
    folder = finished_run / "model"
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, bits=2)
    headers = open_checkpoint_headers(folder)
    beyond = re.compile(r"\.(plane|theta)_[34]$")
    assert not [name for name in taken if beyond.search(name)]
    wanted = {n: i.nbytes for n, (_, i) in headers.tensors.items() if not beyond.search(n)}
    assert taken == wanted


def test_planes_of_other_widths_do_not_matter_to_transformers(
    finished_run: Path, tmp_path: Path
) -> None:
    """Garbage in the planes beyond the width changes no logit, so they are not used."""
    import shutil

    copy = Path(shutil.copytree(finished_run / "model", tmp_path / "copy"))
    ids = probe_ids(8192)
    before = fresh_logits(copy, ids, [2])["logits_2"]
    changed = load_file(copy / WEIGHTS)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in changed.items():
        if re.search(r"\.(plane|theta)_[34]$", name):
            low, high = (0, 256) if tensor.dtype == torch.uint8 else (-32768, 32768)
            noise = torch.randint(low, high, tensor.shape, generator=generator)
            changed[name] = noise.to(tensor.dtype)
    save_file(changed, copy / WEIGHTS, metadata={"format": "pt"})
    after = fresh_logits(copy, ids, [2, 4])
    assert torch.equal(before, after["logits_2"])
    assert not torch.equal(before, after["logits_4"])


def test_file_order_is_load_order(finished_run: Path) -> None:
    headers = open_checkpoint_headers(finished_run)
    for name in NAMES:
        order = ["plane_2", "theta_2", "plane_3", "theta_3", "plane_4", "theta_4"]
        places = [headers.tensors[f"{name}.{part}"][1] for part in order]
        assert all(a.end == b.begin for a, b in pairwise(places))


def test_fresh_processes_with_and_without_fissile_agree_bit_by_bit(finished_run: Path) -> None:
    folder = finished_run / "model"
    ids = probe_ids(8192)
    strange = fresh_logits(folder, ids, [2, 3, 4])
    for width in (2, 3, 4):
        with torch.no_grad():
            own = models.load(folder, bits=width)(input_ids=ids).logits
        assert torch.equal(own, strange[f"logits_{width}"])
    assert not torch.equal(strange["logits_2"], strange["logits_4"])


def test_the_stranger_really_has_no_fissile() -> None:
    code = "import sys; sys.modules['fissile'] = None\nimport fissile"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "ModuleNotFoundError" in done.stderr


def test_shipped_code_imports_nothing_of_ours(finished_run: Path) -> None:
    for path in (finished_run / "model").glob("*.py"):
        lines = path.read_text().splitlines()
        assert not [x for x in lines if re.match(r"\s*(from|import) fissile", x)]


def test_portable_rewrites_only_our_imports() -> None:
    code = "from fissile.kernels.layout import a\nfrom transformers.x import b\n"
    assert portable(code) == "from .layout import a\nfrom transformers.x import b\n"


def test_files_can_be_read_by_others(finished_run: Path) -> None:
    for path in (finished_run / "model").iterdir():
        assert os.stat(path).st_mode & 0o044 == 0o044


def test_verify_passes_and_names_what_it_checked(finished_run: Path, tiny_model: Path) -> None:
    report = verify(finished_run, against=tiny_model)
    assert report.ok
    names = " ".join(check.name for check in report.checks)
    assert "without fissile at 2 bits" in names
    assert "tokenizer" in names
