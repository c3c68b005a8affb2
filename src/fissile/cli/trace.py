"""`fissile trace`: record which experts the tokens of requests choose, or draw such choices."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fissile.cli.common import Parser, Subparsers, add_command, one_of, positive
from fissile.cli.output import emit, tidy
from fissile.cli.progress import progress
from fissile.errors import UsageError

if TYPE_CHECKING:
    from fissile.serve.trace import Trace


def add_parser(subparsers: Subparsers) -> Parser:
    """Register the command."""
    parser = add_command(
        subparsers,
        "trace",
        run,
        summary="record the routing of requests, for simulate",
        description="Run requests through a mixture of experts, ours or any that transformers "
        "knows, and keep the experts that every token chooses; or draw a synthetic trace. Prompts "
        "are stretches of the documents; the output is the text that follows, or with --generate "
        "what the model writes.",
        example="fissile trace runs/demo --data valid.jsonl --requests 200 --out demo.safetensors",
    )
    parser.add_argument("source", metavar="SRC", nargs="?", help="a model, artifact or run folder")
    parser.add_argument("--data", metavar="FILE", help="JSONL of documents")
    parser.add_argument(
        "--synthetic",
        type=one_of(("uniform", "zipf", "local")),
        metavar="KIND",
        help="no model: uniform, zipf (popular experts) or local (requests keep their experts)",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the trace, *.safetensors")
    parser.add_argument(
        "--requests", type=positive, default=200, metavar="N", help="how many (200)"
    )
    parser.add_argument(
        "--prompt", type=_span, default=(16, 256), metavar="A,B", help="prompt tokens (16,256)"
    )
    parser.add_argument(
        "--output", type=_span, default=(16, 64), metavar="A,B", help="generated tokens (16,64)"
    )
    parser.add_argument("--generate", action="store_true", help="let the model write the output")
    parser.add_argument("--bits", type=positive, metavar="K", help="width to serve")
    parser.add_argument(
        "--rate", type=float, default=1.0, metavar="R", help="requests per second, Poisson (1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the requests (0)")
    shape = parser.add_argument_group("synthetic traces")
    shape.add_argument("--layers", type=positive, default=8, metavar="N", help="layers (8)")
    shape.add_argument("--experts", type=positive, default=8, metavar="N", help="experts (8)")
    shape.add_argument("--top-k", type=positive, default=2, metavar="N", help="per token (2)")
    shape.add_argument(
        "--expert-bytes", type=positive, default=10**7, metavar="N", help="of one expert (1e7)"
    )
    shape.add_argument(
        "--layerwise", action="store_true", help="a decision in every layer, not one for all"
    )
    return parser


def _span(text: str) -> tuple[int, int]:
    """Argument type: A,B, or one number for both."""
    parts = text.split(",")
    try:
        low, high = int(parts[0]), int(parts[-1])
    except ValueError:
        low = high = 0
    if len(parts) > 2 or not 1 <= low <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not A,B with 1 <= A <= B")
    return low, high


def run(args: argparse.Namespace) -> int:
    """Record or draw, write, and print what is in it."""
    from fissile.serve.trace import write_trace

    if (args.source is None) == (args.synthetic is None):
        raise UsageError("give a model, or --synthetic KIND, and not both")
    out = Path(args.out)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out}: there is no such folder")
    trace = _synthetic(args) if args.source is None else _recorded(args)
    write_trace(trace, out)
    found = _summary(trace, out)
    emit(args, found, tidy(found))
    return 0


def _recorded(args: argparse.Namespace) -> Trace:
    if args.data is None:
        raise UsageError("a trace of a model needs --data, JSONL of documents")
    from fissile.serve.record import record_trace

    with progress(args) as show:
        return record_trace(
            Path(args.source),
            Path(args.data),
            requests=args.requests,
            prompt=args.prompt,
            output=args.output,
            generate=args.generate,
            bits=args.bits,
            rate=args.rate,
            seed=args.seed,
            progress=show,
        )


def _synthetic(args: argparse.Namespace) -> Trace:
    from fissile.serve.synthetic import synthetic_trace
    from fissile.serve.trace import ModelShape

    if args.top_k > args.experts:
        raise UsageError(f"--top-k {args.top_k} of --experts {args.experts}")
    # 16-bit weights: two operations per token for each two bytes.
    size = args.expert_bytes
    model = ModelShape(
        args.synthetic, args.layers, args.experts, args.top_k, ((size,),), size, 2 * size, 2 * size
    )
    return synthetic_trace(
        args.synthetic,
        model,
        requests=args.requests,
        prompt=args.prompt,
        output=args.output,
        one_decision=not args.layerwise,
        rate=args.rate,
        seed=args.seed,
    )


def _summary(trace: Trace, out: Path) -> dict[str, Any]:
    model = trace.model
    return {
        "trace": str(out),
        "model": model.name,
        "layers": model.layers,
        "experts": model.experts,
        "top_k": model.top_k,
        "decisions": trace.decisions,
        "planes": len(model.planes[0]),
        "expert_total_bytes": model.total_bytes,
        "requests": trace.requests,
        "prompt_tokens": int(trace.prompt.sum()),
        "output_tokens": int(trace.output.sum()),
        "domains": list(trace.domains),
    }
