"""Wheel and source distribution: what is in them, and that the installed package works anywhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fissile

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("refactor", "quant", "kernels", "recipes", "eval")
BUILT_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "src", *FOLDERS)
STALE = shutil.ignore_patterns("__pycache__", "*.egg-info")


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def build(kind: str, tree: Path, out: Path) -> Path:
    """Call a hook of the build backend as pip does, in a copy, so that nothing stale is packed."""
    out.mkdir(exist_ok=True)
    done = python(f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})", tree)
    assert done.returncode == 0, done.stderr
    [built] = out.iterdir()
    return built


def packed(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.startswith("fissile/")]
        return {name: archive.read(name) for name in names}


def expected_files(tree: Path) -> dict[str, bytes]:
    """Name in the wheel to content of everything the package is made of."""
    files = {}
    for folder in ("src/fissile", *FOLDERS):
        base = tree / folder
        prefix = "fissile" if folder == "src/fissile" else f"fissile/{folder}"
        for path in base.rglob("*"):
            inner = path.relative_to(base).as_posix()
            ships = path.suffix in (".py", ".yaml") or path.name == "py.typed"
            if path.is_file() and (ships or inner.startswith("demo/model/")):
                files[f"{prefix}/{inner}"] = path.read_bytes()
    return files


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("tree")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=STALE)
        else:
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the executables of a fresh environment that holds the wheel.

    The dependencies are borrowed from the running environment by a path entry, behind the wheel's
    own site-packages; .pth files in the borrowed folder (an editable install of this repository,
    for one) are not read from there.
    """
    where = tmp_path_factory.mktemp("venv")
    venv.create(where, symlinks=True, with_pip=False)
    bin_folder = where / "bin"
    site = where / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(bin_folder / "python"), "install"]
    subprocess.run(
        [*pip, "--no-deps", "--no-index", "--ignore-installed", str(wheel)],
        check=True,
        capture_output=True,
    )
    return bin_folder


def run(command: list[str], cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_every_file_of_the_package(tree: Path, wheel: Path) -> None:
    found, wanted = packed(wheel), expected_files(tree)
    assert sorted(set(wanted) - set(found)) == []
    assert [name for name, content in wanted.items() if found[name] != content] == []
    assert not any("__pycache__" in name or name.startswith("fissile/tests") for name in found)


def test_wheel_installs_no_other_top_level_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert tops == {"fissile", f"fissile-{fissile.__version__}.dist-info"}


def test_source_distribution_builds_the_same_wheel(tree: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", tree, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        assert [item.name for item in archive if item.issym() or item.islnk()] == []
        archive.extractall(tmp_path / "unpacked", filter="data")
    [unpacked] = (tmp_path / "unpacked").iterdir()
    assert packed(build("wheel", unpacked, tmp_path / "wheel")) == packed(wheel)


def test_installed_package_works_from_a_neutral_folder(installed: Path, tmp_path: Path) -> None:
    executable = str(installed / "python")
    where = run([executable, "-c", "import fissile; print(fissile.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert "exit codes" in run([str(installed / "fissile"), "--help"], tmp_path)
    listed = run([executable, "-m", "fissile", "recipes", "list"], tmp_path)
    assert "demo/moe-nested" in listed
    code = "import fissile.quant.nested as m; print(m.__file__)"
    assert "site-packages/fissile/quant/nested.py" in run([executable, "-c", code], tmp_path)


def test_a_copy_that_lost_its_links_is_refused(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tree, copy, symlinks=True)
    (copy / "src" / "fissile" / "quant").unlink()
    (copy / "src" / "fissile" / "quant").write_text("../../quant")  # as git does without symlinks
    code = "from setuptools import build_meta; build_meta.build_wheel('.')"
    done = python(code, copy)
    assert done.returncode != 0
    assert "src/fissile/quant is not a directory: this copy of the source lost" in done.stderr


def test_makefile_and_constraints_name_the_same_torch() -> None:
    pins = re.findall(r"torch==[\d.]+", (ROOT / "constraints.txt").read_text())
    asked = re.findall(r"torch==[\d.]+", (ROOT / "Makefile").read_text())
    assert len(pins) == 1
    assert set(asked) == set(pins)


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_pin_what_the_wheel_requires(wheel: Path, version: str) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    environment = {"python_version": version, "extra": "dev"}
    chosen = {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in pins
        if pin.marker is None or pin.marker.evaluate(environment)
    }
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = Parser().parsestr(archive.read(name).decode())
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    assert len(required) > 12
    # A CUDA build of torch pins the Triton it was made with; a CPU build has none.
    required = [need for need in required if need.name != "triton"]
    for need in required:
        assert need.specifier.contains(chosen[canonicalize_name(need.name)]), need
