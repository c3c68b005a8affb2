"""`fissile generate`: continue prompts with experts that stay on disk."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from fissile.cli.common import Parser, Subparsers, add_command, one_of, positive
from fissile.cli.output import emit, stream, tidy
from fissile.errors import UsageError

POLICIES = ("belady", "lru", "lfu", "mrs")
SCHEDULERS = ("expert-aware", "fcfs", "decode-first")
ORDERS = ("hottest", "johnson", "index")
UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "generate",
        run,
        summary="generate text on a machine smaller than the model",
        description="Continue prompts while the routed experts stay on disk and at most --memory "
        "of them are in memory: a pre-gated model knows which ones come next, so they are read "
        "before they are needed. Reports hit rate, bytes read, stall time and tokens per second.",
        example='fissile generate runs/demo --memory 1MiB --prompt "def area(width" --tokens 32',
    )
    parser.add_argument("folder", metavar="DIR", help="an artifact or a run folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="one text to continue")
    what.add_argument(
        "--prompts", metavar="FILE", help='JSONL of {"prompt": TEXT, "tokens"?: N}; run together'
    )
    parser.add_argument(
        "--tokens", type=positive, default=64, metavar="N", help="most tokens a prompt (default 64)"
    )
    parser.add_argument(
        "--memory",
        type=size,
        metavar="SIZE",
        help="experts in memory, e.g. 64MiB (default: all of them)",
    )
    width = parser.add_mutually_exclusive_group()
    width.add_argument(
        "--bits", type=int, metavar="K", help="width of all experts (default: the artifact's)"
    )
    width.add_argument(
        "--budget",
        type=budget,
        metavar="SIZE|Nbpw",
        help="widths by use under a budget, e.g. 2.6bpw or 4GiB",
    )
    _add_serving(parser)
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of --temperature")
    return parser


def _add_serving(parser: Parser) -> None:
    parser.add_argument(
        "--policy",
        type=one_of(POLICIES),
        default=POLICIES[0],
        metavar="NAME",
        help=f"what leaves memory: {', '.join(POLICIES)}",
    )
    parser.add_argument(
        "--scheduler",
        type=one_of(SCHEDULERS),
        default=SCHEDULERS[0],
        metavar="NAME",
        help=f"what shares a pass: {', '.join(SCHEDULERS)}",
    )
    parser.add_argument(
        "--order",
        type=one_of(ORDERS),
        default=ORDERS[0],
        metavar="NAME",
        help=f"in which a layer is read: {', '.join(ORDERS)}",
    )
    parser.add_argument(
        "--batch-tokens", type=positive, metavar="N", help="most tokens of a pass (default 512)"
    )
    parser.add_argument(
        "--batch-requests", type=positive, metavar="N", help="most prompts of a pass (default 16)"
    )
    parser.add_argument(
        "--on-demand", action="store_true", help="read what is needed when it is needed"
    )
    parser.add_argument(
        "--keep-pages", action="store_true", help="leave what was read in the page cache"
    )
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="of torch: cpu (default), cuda, cuda:1"
    )


def size(text: str) -> int:
    """Argument type: a number of bytes, e.g. 64MiB.

    Raises:
        argparse.ArgumentTypeError: no number, or an unknown unit.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if found is None or found[2] not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, e.g. 64MiB or 1.5GB")
    return int(float(found[1]) * UNITS[found[2]])


def budget(text: str) -> tuple[float, Literal["bytes", "bpw"]]:
    """Argument type: a size, or bits per weight, e.g. 2.6bpw.

    Raises:
        argparse.ArgumentTypeError: neither.
    """
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)bpw", text):
        return float(found[1]), "bpw"
    try:
        return size(text), "bytes"
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no budget, e.g. 4GiB or 2.6bpw") from None


def run(args: argparse.Namespace) -> int:
    """Generate, show text as it comes, then what it took."""
    if args.temperature < 0:
        raise UsageError(f"--temperature {args.temperature}: must not be negative")
    from fissile.serve import options as serve
    from fissile.serve.generate import generate

    given = {"batch_tokens": args.batch_tokens, "batch_requests": args.batch_requests}
    options = serve.ServeOptions(
        memory=args.memory,
        bits=args.bits,
        budget=None if args.budget is None else serve.Budget(*args.budget),
        policy=args.policy,
        prefetch=not args.on_demand,
        order=args.order,
        keep_pages=args.keep_pages,
        scheduler=args.scheduler,
        device=args.device,
        # Left out, the library's own default holds: it is stated once, there.
        **{name: value for name, value in given.items() if value is not None},
    )
    if args.prompt is not None:
        prompts = [serve.Prompt(args.prompt, args.tokens)]
    else:
        prompts = serve.read_prompts(Path(args.prompts), args.tokens)
    found = generate(
        Path(args.folder),
        prompts,
        options,
        serve.Sampling(args.temperature, args.seed),
        stream=None if args.json else _shown(args, len(prompts)),
    )
    emit(args, found.to_dict(), tidy(found.report))
    return 0


def _shown(args: argparse.Namespace, prompts: int) -> Callable[[int, str, bool], None]:
    """One prompt's text as it comes; of several, each when it is whole."""
    held = [f"[{number}] " if prompts > 1 else "" for number in range(prompts)]

    def show(number: int, text: str, last: bool) -> None:
        held[number] += text
        if last or prompts == 1:
            stream(args, held[number] + ("\n\n" if last else ""))
            held[number] = ""

    return show
