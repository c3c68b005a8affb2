"""`fissile bench`: measure the speed and memory of parts on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fissile.cli.common import Parser, Subparsers, add_command, add_overrides, integers
from fissile.cli.output import emit, jsonable, tidy
from fissile.cli.progress import progress
from fissile.errors import UsageError


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "bench",
        run,
        summary="speed and memory of parts on this machine",
        description="Measure a part with the functions that a run calls and print the numbers with "
        "their conditions. Without NAME: the benchmarks and their settings. layer: the conversion "
        "of one layer, by default of the shape of a 7B model.",
        example="fissile bench layer --set tokens=16384 --threads 2",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="what is measured (default: list)")
    parser.add_argument(
        "models",
        nargs="*",
        metavar="DIR",
        help="models: of speed several, each with @BITS for a width; of experts and peers one",
    )
    parser.add_argument(
        "--batches", type=integers, metavar="N,N", help="of speed: batch sizes (default: 1,8,64)"
    )
    add_overrides(parser, "a setting of the benchmark", "tokens=16384")
    parser.add_argument("--out", metavar="FILE", help="write the row as JSON too")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run one benchmark, or list them."""
    if args.name is None:
        return _list(args)
    if args.out and not Path(args.out).absolute().parent.is_dir():
        raise UsageError(f"--out {args.out}: its folder does not exist")
    from fissile.io.publish import atomic_write_json
    from fissile.run.bench import run_bench

    with progress(args) as show:
        row = run_bench(args.name, [*args.set, *_settings(args)], show)
    if args.out:
        atomic_write_json(Path(args.out), jsonable(row))
    emit(args, row, tidy(row))
    return 0


def _settings(args: argparse.Namespace) -> list[str]:
    """Settings that have arguments of their own, where the benchmark knows them."""
    from fissile.run.bench import BENCHES

    given = {"models": ("DIR", args.models), "batches": ("--batches", args.batches)}
    for key, (word, value) in given.items():
        if value and key not in BENCHES[args.name].settings.model_fields:
            raise UsageError(f"bench {args.name} takes no {word}")
    return [f"{key}={json.dumps(value)}" for key, (_, value) in given.items() if value]


def _list(args: argparse.Namespace) -> int:
    if args.set or args.out:
        raise UsageError("--set and --out need the NAME of a benchmark (see fissile bench --help)")
    from fissile.run.bench import list_benches

    rows = list_benches()
    lines = []
    for row in rows:
        lines += [f"{row['name']:<8} {row['measures']}", *tidy(row["settings"], "         ")]
    emit(args, {"benches": rows}, lines)
    return 0
