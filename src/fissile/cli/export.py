"""`fissile export`: a model in the formats of stock classes and other engines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fissile.cli.common import Parser, Subparsers, add_command, one_of, positive
from fissile.cli.output import emit, tidy
from fissile.cli.progress import progress
from fissile.export.targets import FLOATS, SERVERS, STOCK, TARGETS


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "export",
        run,
        summary="write a model for stock classes, servers or llama.cpp",
        description="Express an artifact as a class that engines have already, without remote code "
        "or plug-in. What cannot be expressed exactly is refused before anything is written, with "
        "the reason and the alternative.",
        example="fissile export nested --to dense --bits 4 --out nested-dense",
    )
    parser.add_argument("folder", metavar="DIR", help="an artifact, run folder or dense checkpoint")
    parser.add_argument(
        "--to",
        type=one_of(TARGETS),
        required=True,
        metavar="TARGET",
        help=f"one of {', '.join(TARGETS)}",
    )
    parser.add_argument("--out", metavar="DIR", help="folder to write; without it only the check")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    parser.add_argument("--bits", type=positive, metavar="K", help="width of the weights")
    parser.add_argument(
        "--dtype", type=one_of(FLOATS), default=FLOATS[0], metavar="NAME", help="of float tensors"
    )
    parser.add_argument(
        "--via", type=one_of(STOCK), metavar="NAME", help="stock class behind a GGUF file"
    )
    parser.add_argument(
        "--codes", action="store_true", help="gguf: keep codes as Q4_1 where they fit bit for bit"
    )
    servers = parser.add_argument_group(f"only {' and '.join(SERVERS)}")
    servers.add_argument(
        "--group-size", type=positive, default=128, metavar="N", help="inputs per scale"
    )
    servers.add_argument("--data", metavar="FILE", help="calibration text, JSONL (text, domain)")
    servers.add_argument(
        "--tokens", type=positive, default=131072, metavar="N", help="calibration tokens"
    )
    servers.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling")
    return parser


def run(args: argparse.Namespace) -> int:
    """Check, write and print what the export costs."""
    result = _server(args) if args.to in SERVERS else _stock(args)
    emit(args, result, tidy(result))
    return 0


def _stock(args: argparse.Namespace) -> dict[str, Any]:
    from fissile.export.api import export, prepare

    prepared = prepare(Path(args.folder), args.to, bits=args.bits, via=args.via)
    if args.out is None:
        return prepared.to_dict()
    return export(
        prepared, Path(args.out), dtype=args.dtype, codes=args.codes, overwrite=args.overwrite
    )


def _server(args: argparse.Namespace) -> dict[str, Any]:
    from fissile.export.server_folder import prepare_server, write_server

    planned = prepare_server(Path(args.folder), args.to, bits=args.bits, group_size=args.group_size)
    if args.out is None:
        return planned.to_dict()
    with progress(args) as show:
        return write_server(
            planned,
            Path(args.out),
            data=Path(args.data) if args.data else None,
            tokens=args.tokens,
            seed=args.seed,
            overwrite=args.overwrite,
            progress=show,
        )
