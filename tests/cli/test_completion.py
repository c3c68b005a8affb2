"""Completion scripts, run in the shells they are for."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fissile.cli.common import STAGES
from fissile.cli.completion import SHELLS, described
from fissile.cli.main import COMMANDS, build_parser
from fissile.recipe_files import shipped_recipes

Cli = Callable[..., tuple[int, str, str]]

RUNNERS = {
    "bash": (
        ["bash", "--norc", "-c"],
        'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _fissile; '
        'printf "%s\\n" "${COMPREPLY[@]}"',
    ),
    # Without a terminal zsh's own widgets do not run: what they would be given is printed.
    "zsh": (
        ["zsh", "-f", "-c"],
        "compdef() { :; }; compadd() { shift; print -l -- $@; }; _files() { :; }; "
        '_describe() { print -l -- ${${(P)2}%%:*}; }; source "$0"; words=("$@"); '
        "CURRENT=$#; _fissile",
    ),
    "fish": (
        ["fish", "--no-config", "-c"],
        'source $argv[1]; complete -C (string join " " -- $argv[2..-1]) | cut -f1',
    ),
}


@pytest.fixture(params=sorted(SHELLS))
def complete(
    request: pytest.FixtureRequest, tmp_path: Path, run_cli: Cli
) -> Callable[..., list[str]]:
    """Words of a line, the last one unfinished, to what the shell would offer."""
    shell = str(request.param)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    code, script, _ = run_cli("completion", shell)
    assert code == 0
    file = tmp_path / "script"
    file.write_text(script)
    command, program = RUNNERS[shell]

    def ask(*words: str) -> list[str]:
        done = subprocess.run(
            [*command, program, str(file), "fissile", *words],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env={"PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": str(tmp_path)},
        )
        assert done.stderr == ""
        # zsh's compadd filters by what is typed; the stub above does not.
        found = [line for line in done.stdout.splitlines() if line.startswith(words[-1])]
        return [line for line in found if line not in ("", "script")]

    return ask


def test_commands_are_listed(complete: Callable[..., list[str]]) -> None:
    assert set(COMMANDS) <= set(complete(""))
    assert set(complete("re")) == {name for name in COMMANDS if name.startswith("re")}


def test_recipes_follow_the_commands_that_read_them(complete: Callable[..., list[str]]) -> None:
    recipes = set(shipped_recipes())
    assert set(complete("plan", "")) == recipes
    assert set(complete("run", "--model", "some/folder", "qwen3/")) == {
        name for name in recipes if name.startswith("qwen3/")
    }
    assert set(complete("recipes", "show", "demo/")) == {"demo/experts", "demo/moe-nested"}
    assert not {*complete("run", "--model", "")} & recipes


def test_flags_and_their_words(complete: Callable[..., list[str]]) -> None:
    assert set(complete("plan", "demo/moe-nested", "--m")) == {"--model"}
    assert set(complete("run", "x", "--stop-after", "")) == set(STAGES)
    assert set(complete("completion", "")) == set(SHELLS)
    assert "schema" in complete("recipes", "s")


def test_every_flag_of_every_command_is_described() -> None:
    parser, commands = build_parser()
    found = described(parser, commands, [])
    for name, command in commands.items():
        options = {flag for action in command._actions for flag in action.option_strings}
        assert found[name].flags.keys() == options
        assert found[name].summary
        assert "--json" not in found[name].values
        assert all(found[name].flags.values())


@pytest.mark.parametrize("shell", sorted(SHELLS))
def test_scripts_are_text_that_a_quote_cannot_end(shell: str) -> None:
    """Help texts hold apostrophes and backslashes."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    parser, commands = build_parser()
    made = described(parser, commands, ["it's/a\\recipe"])
    done = subprocess.run(
        [shell, "-n"], input=SHELLS[shell](made), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_misspelt_shell_is_suggested(run_cli: Cli) -> None:
    code, _, err = run_cli("completion", "bsh")
    assert code == 2
    assert "did you mean 'bash'" in err
