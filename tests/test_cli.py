"""The command line: flags, exit codes and the one line that goes with each."""

from __future__ import annotations

import argparse
import errno
import importlib
import inspect
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, get_args

import pytest

from fissile.cli.common import STAGES, flags_of
from fissile.cli.main import COMMANDS, build_parser, main
from fissile.config import Stage
from fissile.errors import (
    CorruptCheckpoint,
    FissileError,
    Interrupted,
    QualityGate,
    RecipeError,
    ResourceError,
    UnsupportedModel,
    UsageError,
)
from fissile.families.checks import Check as FieldCheck

GOLDEN = Path(__file__).parent / "golden" / "cli_flags.json"
COMMON = {"--help", "--json", "--debug", "--verbose", "--quiet", "--threads", "-h", "-v", "-q"}

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Built:
    """As much of a corpus as the command prints."""

    documents: int


@dataclass
class Case:
    """One command line, and the library function that it comes down to."""

    words: list[str]
    target: str
    result: Any
    shows: str
    calls: list[Call] = field(default_factory=list)

    @property
    def json(self) -> list[str]:
        return [*self.words, "--json"]


def as_dict(**values: Any) -> Any:
    """A library result: attributes, and to_dict() with the same."""
    return SimpleNamespace(**values, to_dict=lambda **_: dict(values))


def plan() -> Any:
    return SimpleNamespace(
        to_dict=lambda: {"peak": 3}, lines=lambda: ["peak memory 3 GB"], check=lambda: None
    )


def cases() -> dict[str, Case]:
    """A fresh case per command; RECIPE is replaced by a file."""
    check = SimpleNamespace(name="hashes", ok=True, detail="9 files")
    verified = SimpleNamespace(ok=True, checks=[check], to_dict=lambda: {"ok": True})
    field_ok = FieldCheck("hidden_act", "silu", "silu", ok=True)
    pages = (Path("r/report.html"), Path("r/report.json"))
    ran = as_dict(report=Path("o/report.html"), ppl=float("nan"))
    run = "run RECIPE --model m --out o"
    rows = [
        ("plan", "plan RECIPE --model m --out o", "run.plan:make_plan", plan(), "3 GB"),
        ("run", run, "run.pipeline:run_recipe", ran, "o/report.html"),
        (
            "quantize",
            "quantize m --out o --widths 2,4 --data d",
            "run.pipeline:quantize_checkpoint",
            {"stored_bytes": 2_000_000},
            "2.0 MB",
        ),
        (
            "eval",
            "eval m --task perplexity --data d --bits 3 --batch-tokens 64",
            "eval.run:evaluate",
            as_dict(ppl=7.5, by_domain={"python": 6.25}),
            "6.25",
        ),
        (
            "generate",
            "generate m --prompt p --memory 1MiB --budget 2.6bpw --temperature 1",
            "serve.generate:generate",
            SimpleNamespace(report={"hit_rate": 0.875}, to_dict=lambda: {"hit_rate": 0.875}),
            "hit_rate  0.875",
        ),
        ("verify", "verify m --against d", "export.verify:verify", verified, "ok   hashes"),
        ("report", "report r", "run.report:write_report", pages, "r/report.html"),
        ("inspect", "inspect m", "run.inspect:inspect_source", {"layers": 6}, "layers  6"),
        ("families", "families --why m", "families:explain_source", [field_ok], "found silu"),
        ("corpus", "corpus --out o", "eval.corpus:build_corpus", Built(4), "documents  4"),
        ("doctor", "doctor", "run.doctor:collect", {"torch": "2.13.0"}, "torch  2.13.0"),
    ]
    return {
        name: Case(line.split(), f"fissile.{target}", result, shows)
        for name, line, target, result, shows in rows
    }


NAMES = sorted(cases())


@pytest.fixture
def prepare(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str, BaseException | None], Case]:
    """Put a recorder, or a function that raises, in the place of a command's library function."""
    recipe = tmp_path / "trial.yaml"
    recipe.write_text("name: trial\n")

    def install(name: str, error: BaseException | None = None) -> Case:
        case = cases()[name]
        case.words = [str(recipe) if word == "RECIPE" else word for word in case.words]

        def recorder(*args: Any, **kwargs: Any) -> Any:
            case.calls.append((args, kwargs))
            if error is not None:
                raise error
            sys.stdout.write("noise of a library\n")
            return case.result

        module, _, function = case.target.partition(":")
        stub = ModuleType(module)
        setattr(stub, function, recorder)
        monkeypatch.setitem(sys.modules, module, stub)
        return case

    return install


ERRORS: list[tuple[BaseException, int, str]] = [
    (UsageError("x.jsonl: line 3: no text"), 2, "fissile: error: x.jsonl: line 3: no text"),
    (RecipeError("a.yaml: seed: too big"), 2, "fissile: error: a.yaml: seed: too big"),
    (UnsupportedModel("model_type 'bert'"), 3, "fissile: error: model_type 'bert'"),
    (CorruptCheckpoint("m.safetensors: cut"), 3, "fissile: error: m.safetensors: cut"),
    (ResourceError("needs 9 GB, has 4"), 4, "fissile: error: needs 9 GB, has 4"),
    (QualityGate("starved_expert: 3, limit 0"), 5, "fissile: error: starved_expert: 3, limit 0"),
    (Interrupted("stopped after layer 3"), 130, "fissile: stopped after layer 3"),
    (FissileError("two\n  lines"), 1, "fissile: error: two lines"),
    (MemoryError(), 4, "fissile: error: not enough memory: the system refused more"),
    (OSError(errno.ENOSPC, "x", "/d/f"), 4, "fissile: error: no space left on the disk of /d/f"),
    (
        RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        4,
        "fissile: error: not enough memory: DefaultCPUAllocator: can't allocate memory: 9 bytes",
    ),
    (KeyError("k"), 1, "fissile: error: KeyError: 'k' (--debug shows the traceback)"),
]


@pytest.mark.parametrize("name", NAMES)
def test_every_error_becomes_one_line_and_its_exit_code(
    name: str, prepare: Callable[..., Case], capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code, line in ERRORS:
        case = prepare(name, error)
        assert main([*case.words, "--quiet"]) == code, error
        out, err = capsys.readouterr()
        assert (out, err) == ("", line + "\n")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("run", "fissile: stopped; continue with --resume"),
        ("quantize", "fissile: stopped; continue with --resume"),
        ("inspect", "fissile: stopped"),
    ],
)
def test_control_c(
    name: str, line: str, prepare: Callable[..., Case], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(prepare(name, KeyboardInterrupt()).words) == 130
    assert capsys.readouterr() == ("", line + "\n")


def test_debug_shows_the_traceback(
    prepare: Callable[..., Case], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*prepare("inspect", UnsupportedModel("no")).words, "--debug"]) == 3
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("fissile: error: no\n")
    with pytest.raises(ZeroDivisionError):
        main([*prepare("inspect", ZeroDivisionError()).words, "--debug"])


@pytest.mark.parametrize("name", NAMES)
def test_result_is_on_stdout_and_nothing_else(
    name: str, prepare: Callable[..., Case], capsys: pytest.CaptureFixture[str]
) -> None:
    case = prepare(name, None)
    assert main(case.words) == 0
    out, err = capsys.readouterr()
    assert case.shows in out
    assert "noise" not in out
    assert "noise of a library" in err


@pytest.mark.parametrize("name", NAMES)
def test_json_is_one_object(
    name: str, prepare: Callable[..., Case], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(prepare(name, None).json) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert isinstance(json.loads(out, parse_constant=pytest.fail), dict)


@pytest.mark.parametrize("name", NAMES)
def test_the_library_takes_the_call(name: str, prepare: Callable[..., Case]) -> None:
    """The recorded arguments fit the signature of the real function."""
    case = cases()[name]
    module, _, function = case.target.partition(":")
    real = getattr(importlib.import_module(module), function)
    case = prepare(name, None)
    assert main(case.words) == 0
    [(args, kwargs)] = case.calls
    inspect.signature(real).bind(*args, **kwargs)


def test_run_ends_with_the_path_of_the_report(
    prepare: Callable[..., Case], capsys: pytest.CaptureFixture[str]
) -> None:
    case = prepare("run", None)
    words = ["--set", "seed=7", "--stop-after", "route", "--resume", "--download"]
    assert main([*case.words, *words]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(Path("o/report.html"))
    [(args, kwargs)] = case.calls
    assert (args[0].seed, args[1], args[2]) == (7, "m", Path("o"))
    assert kwargs["stop_after"] == "route"
    assert (kwargs["resume"], kwargs["overwrite"], kwargs["download"]) == (True, False, True)


def test_quantize_flags_reach_the_section(prepare: Callable[..., Case]) -> None:
    case = prepare("quantize", None)
    assert main([*case.words, "--group-size", "128", "--effort", "fast", "--tokens", "512"]) == 0
    section = case.calls[0][1]["quantize"]
    assert (section.widths, section.group_size) == ((2, 4), 128)
    assert (section.effort, section.tokens) == ("fast", 512)


def test_a_plan_that_does_not_fit_is_shown_and_fails(
    prepare: Callable[..., Case],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse() -> None:
        raise ResourceError("needs 9 GB")

    case = prepare("plan", None)
    misfit = SimpleNamespace(to_dict=dict, lines=lambda: ["peak 9 GB"], check=refuse)
    monkeypatch.setattr(sys.modules["fissile.run.plan"], "make_plan", lambda *_: misfit)
    assert main(case.words) == 4
    assert capsys.readouterr() == ("peak 9 GB\n", "fissile: error: needs 9 GB\n")


def test_failed_checks_are_exit_codes(
    prepare: Callable[..., Case],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = prepare("verify", None)
    bad = SimpleNamespace(name="scales", ok=False, detail="layer 3: inf")
    report = SimpleNamespace(ok=False, checks=[bad], to_dict=lambda: {"ok": False})
    monkeypatch.setattr(sys.modules["fissile.export.verify"], "verify", lambda *_, **__: report)
    assert main(case.words) == 5
    out, err = capsys.readouterr()
    assert out == "FAIL scales  layer 3: inf\n"
    assert err == "fissile: error: 1 of 1 checks failed on m: scales: layer 3: inf\n"

    case = prepare("families", None)
    wrong = FieldCheck("hidden_act", "relu", "silu", ok=False, remedy="none")
    monkeypatch.setattr(sys.modules["fissile.families"], "explain_source", lambda _: [wrong])
    assert main(case.json) == 3
    out, err = capsys.readouterr()
    assert json.loads(out)["supported"] is False
    assert err == "fissile: error: m: hidden_act: found relu, accepted: silu; none\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no command given (fissile --help lists them)"),
        ("quantise m", "unknown command 'quantise'; did you mean 'quantize'?"),
        ("run r --modle m", "run has no flag --modle; did you mean '--model'?"),
        ("run r --model m", "the following arguments are required: --out"),
        ("run r --mod m --out o", "run has no flag --mod"),
        ("run demo/moe-nestd --model m --out o", "'demo/moe-nestd' is neither a file nor shipped"),
        ("run r --model m --out o --stop-after rout", "'rout' is not one of calibrate, extract"),
        ("run r --model m --out o --resume --overwrite", "not allowed with argument --resume"),
        (
            "eval m --task mmlo --data d",
            "argument --task: 'mmlo' is not one of perplexity, choices",
        ),
        ("eval m --task perplexity --data d --bits 5", "--bits 5: accepted are 2, 3, 4"),
        ("eval m --task perplexity --data d --limit 0", "--limit: '0' is not a positive integer"),
        ("quantize m --out o --widths 2,x", "'2,x' is not a comma-separated list of integers"),
        ("quantize m --out o --widths 4,2", "widths [4, 2] must be distinct and ascending"),
        ("quantize m --out o --group-size 48", "group_size: Input should be 32, 64 or 128"),
        ("verify m --target vlm", "'vlm' is not one of transformers"),
        ("recipes show", "recipes show needs the name of a recipe"),
        ("recipes list demo", "recipes list takes no name"),
        ("recipes show nowhere", "recipe 'nowhere' is neither a file nor shipped"),
    ],
)
def test_usage_errors(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fissile: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_misspelt_recipe_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "demo/moe-nestd"]) == 2
    assert "did you mean 'demo/moe-nested'" in capsys.readouterr().err


def test_flags_are_frozen() -> None:
    """A new flag is a decision: add it to the golden file on purpose."""
    _, commands = build_parser()
    found = {
        name: {
            "flags": flags_of(parser),
            "positionals": [
                action.metavar
                for action in parser._actions
                if not action.option_strings and not isinstance(action, argparse._HelpAction)
            ],
        }
        for name, parser in commands.items()
    }
    assert found == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_has_the_common_flags_and_an_example_that_parses(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in COMMON)
    example = shlex.split(text.split("example:\n")[1].splitlines()[0])
    assert example[:2] == ["fissile", name]
    parser, _ = build_parser()
    assert parser.parse_args(example[1:]).command == name


def test_stages_are_those_of_a_run() -> None:
    assert get_args(Stage) == STAGES


def test_threads_reach_the_libraries(
    prepare: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(set_num_threads=asked.append))
    assert main([*prepare("doctor", None).words, "--threads", "1"]) == 0
    assert (os.environ["OMP_NUM_THREADS"], asked) == ("1", [1])


@pytest.mark.parametrize("words", [["recipes", "schema"], ["--help"]])
def test_a_reader_that_went_away_is_no_error(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "fissile", *words],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
