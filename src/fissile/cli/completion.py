"""`fissile completion`: scripts that complete commands, flags, their values and recipes in a shell.

The scripts are made from the parser itself and call nothing while one types.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from fissile.cli.common import OneOf, Parser, Subparsers, add_command, one_of
from fissile.cli.output import emit


@dataclass(frozen=True)
class Command:
    """What can follow a command.

    Attributes:
        summary: one line.
        flags: option string to its help.
        values: option string to the words it accepts; empty where it takes anything, e.g. a file.
        words: by position, the words an argument may be; files go with all of them.
    """

    summary: str
    flags: dict[str, str] = field(default_factory=dict)
    values: dict[str, tuple[str, ...]] = field(default_factory=dict)
    words: tuple[tuple[str, ...], ...] = ()


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "completion",
        run,
        summary="a script that completes fissile's commands in your shell",
        description="Print the completion script of a shell. bash: source it in ~/.bashrc. zsh: "
        "save it as _fissile in a folder of $fpath. fish: save it as "
        "~/.config/fish/completions/fissile.fish.",
        example="fissile completion bash",
    )
    parser.add_argument("shell", type=one_of(tuple(SHELLS)), metavar="SHELL", help=_named(SHELLS))
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    from fissile.cli.main import build_parser
    from fissile.recipe_files import shipped_recipes

    parser, commands = build_parser()
    script = SHELLS[args.shell](described(parser, commands, list(shipped_recipes())))
    emit(args, {"shell": args.shell, "script": script}, [script])
    return 0


def described(
    parser: Parser, commands: Mapping[str, Parser], recipes: Iterable[str]
) -> dict[str, Command]:
    """Every command by its name.

    Args:
        parser: the whole one, which holds the summaries.
        commands: the parser of each command.
        recipes: names for arguments called RECIPE, and for those of `fissile recipes`.
    """
    choices = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    summaries = {a.dest: a.help or "" for action in choices for a in action._choices_actions}
    return {
        name: _command(summaries.get(name, ""), command, tuple(recipes))
        for name, command in commands.items()
    }


def _command(summary: str, parser: Parser, recipes: tuple[str, ...]) -> Command:
    found = Command(summary)
    words: list[tuple[str, ...]] = []
    of_recipes = parser.get_default("command") == "recipes"
    for action in parser._actions:
        accepted = _accepted(action, recipes)
        for flag in action.option_strings:
            found.flags[flag] = (action.help or "").split("\n")[0]
            if action.nargs != 0:
                found.values[flag] = accepted
        if not action.option_strings:
            words.append(accepted or (recipes if of_recipes else ()))
    return Command(summary, found.flags, found.values, tuple(words))


def _accepted(action: argparse.Action, recipes: tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(action.type, OneOf):
        return action.type.words
    if action.choices is not None:
        return tuple(map(str, action.choices))
    return recipes if action.metavar == "RECIPE" else ()


def _named(words: Iterable[str]) -> str:
    return ", ".join(words)


def _cases(commands: Mapping[str, Command], quote: Callable[[str], str]) -> dict[str, list[str]]:
    """Branches of a `case` that bash and zsh share: by flag, by position, and flags by command."""
    values, words, takes, flags = [], [], [], []
    for name, command in commands.items():
        for flag, accepted in command.values.items():
            takes.append(f"{name}\\ {flag}")
            if accepted:
                values.append(f"    {name}\\ {flag}) found={quote(' '.join(accepted))} ;;")
        for place, accepted in enumerate(command.words):
            if accepted:
                words.append(f"    {name}\\ {place}) found={quote(' '.join(accepted))} ;;")
        flags.append(f"    {name}) found={quote(' '.join(command.flags))} ;;")
    return {"values": values, "words": words, "takes": takes, "flags": flags}


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


_LOGIC = """  # Words before the cursor that are neither flags nor their values.
  place=0 i={first}
  while (( i < {cursor} )); do
    word={word}
    case "$command $word" in
      {takes}) (( i += 1 )) ;;
      *\\ -*) ;;
      *) (( place += 1 )) ;;
    esac
    (( i += 1 ))
  done
  found=''
  case "$command $previous" in
{values}
    {takes}) {files}; return ;;
  esac
  if [[ -z $found && $current == -* ]]; then
    case "$command" in
{flags}
    esac
  elif [[ -z $found ]]; then
    case "$command $place" in
{words}
    esac
  fi"""


def _logic(commands: Mapping[str, Command], **names: str) -> str:
    cases = {k: "\n".join(v) for k, v in _cases(commands, _quoted).items() if k != "takes"}
    takes = "|".join(_cases(commands, _quoted)["takes"])
    return _LOGIC.format(takes=takes, **cases, **names)


def bash(commands: Mapping[str, Command]) -> str:
    """The script for bash; file names are completed wherever no word fits."""
    logic = _logic(
        commands,
        first="2",
        cursor="COMP_CWORD",
        word='"${COMP_WORDS[i]}"',
        files="COMPREPLY=()",
    )
    return f"""# bash completion for fissile; in ~/.bashrc: source <(fissile completion bash)
_fissile() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
  local command="${{COMP_WORDS[1]}}" found place i word
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W {_quoted(" ".join([*commands, "--help", "--version"]))} -- "$current"))
    return
  fi
{logic}
  COMPREPLY=($(compgen -W "$found" -- "$current"))
}}
complete -o bashdefault -o default -F _fissile fissile"""


def zsh(commands: Mapping[str, Command]) -> str:
    """The script for zsh, to be found as `_fissile` in $fpath or sourced."""
    logic = _logic(commands, first="3", cursor="CURRENT", word='"${words[i]}"', files="_files")
    described = [_quoted(f"{name}:{command.summary}") for name, command in commands.items()]
    return f"""#compdef fissile
# zsh completion for fissile; save as _fissile in a folder of $fpath, or source it
_fissile() {{
  local current="${{words[CURRENT]}}" previous="${{words[CURRENT-1]}}" command="${{words[2]}}"
  local found place i word
  local -a commands
  if (( CURRENT == 2 )); then
    commands=({" ".join(described)})
    _describe command commands
    return
  fi
{logic}
  [[ -n $found ]] && compadd -- ${{=found}}
  [[ $current != -* ]] && _files
  return 0
}}
if [[ $funcstack[1] == _fissile ]]; then _fissile "$@"; else compdef _fissile fissile; fi"""


def fish(commands: Mapping[str, Command]) -> str:
    """The script for fish."""
    lines = ["# fish completion for fissile; save as ~/.config/fish/completions/fissile.fish"]
    first = "__fish_use_subcommand"
    for name, command in commands.items():
        summary = _fish(command.summary)
        lines.append(f"complete -c fissile -f -n {first} -a {name} -d {summary}")
    for name, command in commands.items():
        here = f"complete -c fissile -n '__fish_seen_subcommand_from {name}'"
        for flag, text in command.flags.items():
            kind = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
            if flag in command.values:
                kind += " -r"
                if accepted := command.values[flag]:
                    kind += f" -f -a {_fish(' '.join(accepted))}"
            lines.append(f"{here} {kind} -d {_fish(text)}")
        lines += [f"{here} -a {_fish(' '.join(words))}" for words in command.words if words]
    return "\n".join(lines)


def _fish(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: Mapping[str, Callable[[Mapping[str, Command]], str]] = {
    "bash": bash,
    "zsh": zsh,
    "fish": fish,
}
