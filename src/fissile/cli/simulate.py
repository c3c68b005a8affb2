"""`fissile simulate`: serving systems side by side on a recorded trace."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fissile.cli.common import Parser, Subparsers, add_command, positive
from fissile.cli.output import emit
from fissile.cli.progress import progress

if TYPE_CHECKING:
    from fissile.serve.systems import Comparison


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "simulate",
        run,
        summary="compare schedulers, predictors, caches and executors on a trace",
        description="Simulate serving the requests of a trace on a machine whose fast memory holds "
        "a part of the experts, once for each system and capacity. A system is a scheduler, a "
        "predictor, a cache and an executor; without --system the published ones and ours are "
        "compared.",
        example="fissile simulate demo.safetensors --capacity 0.25,0.5 --out runs/demo/serving",
    )
    parser.add_argument("trace", metavar="TRACE", help="written by fissile trace")
    parser.add_argument(
        "--system",
        action="append",
        metavar="S",
        help="a named system, or NAME=scheduler,predictor,cache,executor[,layer] (repeatable)",
    )
    parser.add_argument(
        "--hardware",
        default="a100-pcie4",
        metavar="H",
        help="YAML file, or a100-pcie4, h100-pcie5, rtx4090-pcie4, laptop-nvme",
    )
    parser.add_argument(
        "--capacity",
        type=_shares,
        default=(0.25, 0.5, 0.75),
        metavar="A,B",
        help="shares of the experts that fit (0.25,0.5,0.75)",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="use the first N requests")
    parser.add_argument(
        "--rate", type=float, metavar="R", help="requests per second, inf: all at once (recorded)"
    )
    parser.add_argument("--planes", type=positive, metavar="N", help="planes to serve (all)")
    parser.add_argument(
        "--pass-tokens", type=positive, default=64, metavar="N", help="tokens of a pass (64)"
    )
    parser.add_argument(
        "--pass-requests", type=positive, default=64, metavar="N", help="requests of a pass (64)"
    )
    parser.add_argument(
        "--pool", type=positive, default=256, metavar="N", help="requests under way (256)"
    )
    parser.add_argument(
        "--max-wait",
        type=positive,
        default=32,
        metavar="N",
        help="passes after which expert-aware takes a request first (32)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of wrong predictions (0)")
    parser.add_argument("--out", metavar="DIR", help="folder for serving.json and serving.html")
    return parser


def _shares(text: str) -> tuple[float, ...]:
    """Argument type: comma-separated shares."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of shares, e.g. 0.25,0.5"
        ) from None


def run(args: argparse.Namespace) -> int:
    """Simulate, print the table, and write both files where asked."""
    from fissile.run.report_serving import write_comparison
    from fissile.serve.batching import Limits
    from fissile.serve.hardware import read_hardware
    from fissile.serve.systems import SYSTEMS, compare_systems, find_system, prepared
    from fissile.serve.trace import read_trace

    hardware = read_hardware(args.hardware)
    systems = [find_system(spec) for spec in args.system or SYSTEMS]
    trace = prepared(
        read_trace(Path(args.trace)), requests=args.limit, rate=args.rate, planes=args.planes
    )
    with progress(args) as show:
        found = compare_systems(
            trace,
            systems,
            hardware,
            shares=args.capacity,
            limits=Limits(args.pass_tokens, args.pass_requests, args.max_wait),
            pool=args.pool,
            seed=args.seed,
            progress=show,
        )
    lines = list(_lines(found))
    payload = found.to_dict()
    if args.out:
        lines += [str(path) for path in write_comparison(payload, Path(args.out))]
    emit(args, payload, lines)
    return 0


def _lines(found: Comparison) -> Iterator[str]:
    width = max(len(row.system.name) for row in found.rows)
    yield (
        f"{'system':<{width}}  fits  tokens/s  hits %  experts  kB/token  TTFT p50     TBT p50"
        "       p95       p99  longest wait"
    )
    for row in sorted(found.rows, key=lambda row: row.share):
        out = row.outcome
        times = "  ".join(
            f"{1000 * t:>8.3g}" for t in (out.ttft.p50, out.tbt.p50, out.tbt.p95, out.tbt.p99)
        )
        yield (
            f"{row.system.name:<{width}}  {100 * row.share:>3.0f}%  {out.tokens_per_second:>8.1f}"
            f"  {100 * out.hit_rate:>6.1f}  {out.unique_experts:>7.2f}"
            f"  {out.bytes_per_token / 1e3:>8.4g}  {times}  {1000 * out.wait.max:>12.3g}"
        )
    yield f"simulated on {found.hardware.name}; times in ms"
