"""The `fissile` parser, and the way from every error to one line and an exit code."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

from fissile import __version__
from fissile.cli.common import Parser, flags_of, limit_threads
from fissile.cli.output import complain, finish
from fissile.errors import FissileError, Interrupted, Told, UsageError
from fissile.registry import Registry, suggest

COMMANDS = Registry(
    "command",
    {
        "plan": "fissile.cli.plan:add_parser",
        "run": "fissile.cli.run:add_parser",
        "quantize": "fissile.cli.quantize:add_parser",
        "tune": "fissile.cli.tune:add_parser",
        "eval": "fissile.cli.eval:add_parser",
        "generate": "fissile.cli.generate:add_parser",
        "compare": "fissile.cli.compare:add_parser",
        "export": "fissile.cli.export:add_parser",
        "verify": "fissile.cli.verify:add_parser",
        "push": "fissile.cli.push:add_parser",
        "report": "fissile.cli.report:add_parser",
        "inspect": "fissile.cli.inspect:add_parser",
        "families": "fissile.cli.families:add_parser",
        "recipes": "fissile.cli.recipes:add_parser",
        "corpus": "fissile.cli.corpus:add_parser",
        "choices": "fissile.cli.choices:add_parser",
        "routing": "fissile.cli.routing:add_parser",
        "trace": "fissile.cli.trace:add_parser",
        "simulate": "fissile.cli.simulate:add_parser",
        "bench": "fissile.cli.bench:add_parser",
        "doctor": "fissile.cli.doctor:add_parser",
        "completion": "fissile.cli.completion:add_parser",
    },
)
ENVIRONMENT = {
    # OpenMP threads that spin while they wait make a busy machine a hundred times slower.
    "GOMP_SPINCOUNT": "0",
    # Other libraries' bars and advice would tear this command's own progress display.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Read by torch and transformers when they are first loaded; what is set already stays."""
DESCRIPTION = (
    "Turn a dense language model into a router-decoupled mixture of experts "
    "with bit-nested weights."
)
EPILOG = """exit codes:
  0 ok · 1 unexpected · 2 usage or recipe · 3 model not supported · 4 not enough memory or disk
  5 quality gate missed · 130 stopped, resumable

example:
  fissile plan demo/moe-nested --model MODEL_DIR"""


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """Return the whole parser, and the parser of each command by its name."""
    parser = Parser(
        prog="fissile",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fissile {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    return parser, {name: add(subparsers) for name, add in COMMANDS.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: the words after `fissile`; by default those of the process.

    Returns:
        The exit code: 0 ok, 1 unexpected, 2 usage or recipe, 3 model not supported, 4 not enough
        memory or disk, 5 quality gate missed, 130 stopped (resumable).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return _dispatch(words)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except (Exception, KeyboardInterrupt) as err:
        code, line = explain(err, resumable=words[:1] in (["run"], ["quantize"]))
        if debug and code == 1:
            raise
        if debug:
            traceback.print_exc()
        if not _told(err):
            complain(line)
        return code
    finally:
        finish()


def explain(err: BaseException, resumable: bool) -> tuple[int, str]:
    """Return the exit code and the line for an exception.

    Args:
        err: what a command raised.
        resumable: the command has --resume.
    """
    message = f"fissile: error: {err}"
    if isinstance(err, Interrupted):
        return err.exit_code, f"fissile: {err}"
    if isinstance(err, FissileError):
        return err.exit_code, message
    if isinstance(err, KeyboardInterrupt):
        return 130, "fissile: stopped" + ("; continue with --resume" if resumable else "")
    if _out_of_memory(err):
        return 4, f"fissile: error: not enough memory: {str(err) or 'the system refused more'}"
    if isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT):
        return 4, f"fissile: error: no space left on the disk of {err.filename or 'the output'}"
    return 1, f"fissile: error: {type(err).__name__}: {err} (--debug shows the traceback)"


def _told(err: BaseException) -> bool:
    """Whether the line about an error comes from another process of the same launch."""
    if isinstance(err, Told):
        return True
    from fissile.run.together import follows

    dist = sys.modules.get("torch.distributed")
    alone = dist is None or not dist.is_initialized()
    # Before the processes have joined, all of them find the same mistake.
    return isinstance(err, FissileError) and alone and follows()


def _out_of_memory(err: BaseException) -> bool:
    if isinstance(err, MemoryError):
        return True
    if isinstance(err, OSError):
        return err.errno == errno.ENOMEM
    # torch has no common base for these: the GPU's is a RuntimeError, the CPU's only says so.
    return type(err).__name__ == "OutOfMemoryError" or (
        isinstance(err, RuntimeError) and "can't allocate memory" in str(err)
    )


def _dispatch(words: list[str]) -> int:
    parser, commands = build_parser()
    if not words:
        raise UsageError("no command given (fissile --help lists them)")
    if not words[0].startswith("-"):
        _check_words(COMMANDS, commands, words)
    args = parser.parse_args(words)
    limit_threads(args.threads)
    args.stdout = sys.stdout
    # What a library prints is not the result: only `emit` reaches the real standard output.
    with redirect_stdout(sys.stderr), _logging(args):
        return int(args.run(args))


def _check_words(known: Registry, commands: dict[str, Parser], words: list[str]) -> None:
    """Name a misspelt command or flag before argparse complains about what it then misses."""
    known[words[0]]
    flags = flags_of(commands[words[0]])
    for word in words[1:]:
        flag = word.partition("=")[0]
        if word == "--":
            return
        if flag.startswith("--") and flag not in flags:
            raise UsageError(
                f"{words[0]} has no flag {flag}{suggest(flag, flags)}"
                f" (see fissile {words[0]} --help)"
            )


class _StderrHandler(logging.Handler):
    """Writes to whatever sys.stderr is at the moment: the progress bar moves it while it is up."""

    def emit(self, record: logging.LogRecord) -> None:
        complain(self.format(record))


@contextmanager
def _logging(args: argparse.Namespace) -> Iterator[None]:
    logger = logging.getLogger("fissile")
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("fissile: %(levelname)s: %(message)s"))
    chosen = {0: logging.WARNING, 1: logging.INFO}.get(args.verbose, logging.DEBUG)
    handler.setLevel(logging.ERROR if args.quiet else chosen)
    before = logger.level
    # The handler filters, not the logger: a run writes its own log at its own level.
    logger.setLevel(min(chosen, logging.INFO))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
