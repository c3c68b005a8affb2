"""What every subcommand shares: the parser class, the common flags and argument types."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeAlias, get_args

from fissile.config import Stage
from fissile.errors import UsageError
from fissile.registry import suggest

Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"

STAGES: tuple[str, ...] = get_args(Stage)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError` where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        """Raise the message as the one line that the user sees.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{message} (see {self.prog} --help)")


def add_command(
    subparsers: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    description: str,
    example: str,
) -> Parser:
    """Register a subcommand together with the flags that all of them have.

    Args:
        subparsers: what `add_subparsers` returned.
        name: the word on the command line.
        run: called with the parsed arguments; returns the exit code.
        summary: one line in `fissile --help`.
        description: paragraph at the top of the command's own help.
        example: command line that can be copied, shown at the end of the help.
    """
    parser = subparsers.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 96),
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run, command=name)
    common = parser.add_argument_group("common flags")
    common.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    loudness = common.add_mutually_exclusive_group()
    loudness.add_argument(
        "-v", "--verbose", action="count", default=0, help="log to stderr; twice for details"
    )
    loudness.add_argument("-q", "--quiet", action="store_true", help="no progress, no warnings")
    common.add_argument(
        "--threads", type=positive, metavar="N", help="threads for tensor arithmetic"
    )
    return parser


def add_overrides(
    parser: Parser,
    what: str = "a value of the recipe",
    example: str = "quantize.group_size=128",
) -> None:
    """Add the repeatable `--set KEY=VALUE`.

    Args:
        parser: of the command.
        what: is changed, in words.
        example: KEY=VALUE.
    """
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"change {what}, e.g. {example} (repeatable)",
    )


def add_output(parser: Parser, what: str) -> None:
    """Add `--out` and the two ways to deal with a folder that is already there.

    Args:
        parser: of the subcommand.
        what: the thing written, as it reads in the help text.
    """
    parser.add_argument("--out", required=True, metavar="DIR", help=f"folder for {what}")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue where an earlier call with this --out stopped",
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="start again; what is in --out is replaced"
    )


def add_download(parser: Parser) -> None:
    """Add the flag without which nothing is fetched from the Hugging Face hub."""
    parser.add_argument(
        "--download", action="store_true", help="the model is a hub id (org/name); fetch it"
    )


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """Return every option string of a parser, sorted."""
    return sorted(flag for action in parser._actions for flag in action.option_strings)


def positive(text: str) -> int:
    """Argument type: an integer of at least 1.

    Raises:
        argparse.ArgumentTypeError: not a number, or below 1.
    """
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def at_least_zero(text: str) -> int:
    """Argument type: an integer of at least 0.

    Raises:
        argparse.ArgumentTypeError: not a number, or below 0.
    """
    return 0 if text == "0" else positive(text)


def integers(text: str) -> list[int]:
    """Argument type: comma-separated integers, e.g. 2,3,4.

    Raises:
        argparse.ArgumentTypeError: an item is not an integer.
    """
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a comma-separated list of integers, e.g. 2,3,4"
        ) from None


@dataclass(frozen=True)
class OneOf:
    """Argument type that accepts certain words and suggests near ones.

    Attributes:
        words: what is accepted, in the order it is listed in the error.
    """

    words: tuple[str, ...]

    def __call__(self, text: str) -> str:
        """Return the word.

        Raises:
            argparse.ArgumentTypeError: not one of them.
        """
        if text not in self.words:
            hint = suggest(text, list(self.words))
            known = ", ".join(self.words)
            raise argparse.ArgumentTypeError(f"{text!r} is not one of {known}{hint}")
        return text


def one_of(words: tuple[str, ...]) -> Callable[[str], str]:
    """Return an argument type that accepts these words and suggests near ones."""
    return OneOf(words)


def limit_threads(count: int | None) -> None:
    """Bound the threads of this process and of those it starts; None leaves the defaults.

    The libraries read the variables when they load, which happens after the command line is parsed.

    Args:
        count: number of threads, at least 1.
    """
    if count is None:
        return
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(count)
