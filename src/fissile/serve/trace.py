"""Recorded routing: which experts every token of every request chose, and when requests came.

A trace is one safetensors file of integers; its metadata says what the model costs. Rows are the
tokens that ran through the model: request r owns `prompt[r] + output[r] - 1` consecutive rows, for
its last generated token is never run.

Shapes: R requests, T rows, D decisions (1 where one decision serves every layer, else the layers
with experts), K chosen per decision, P candidates whose scores are kept.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fissile.errors import CorruptCheckpoint, UsageError
from fissile.io.headers import read_header
from fissile.io.publish import atomic_write_bytes

FORMAT = 1
_KEY = "fissile_trace"
_DTYPES = {
    "routes": "int16",
    "prompt": "int32",
    "output": "int32",
    "arrival": "float64",
    "domain": "int16",
    "weights": "float16",
    "candidates": "int16",
    "scores": "float16",
}
_OPTIONAL = ("weights", "candidates", "scores")
Ints: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class ModelShape:
    """What a simulation has to know of a model.

    Args:
        name: for people.
        layers: layers that have experts.
        experts: routed experts of a layer.
        top_k: experts of a token, at most.
        planes: bytes of one expert by plane, in load order, one row per layer or one for all; a row
            of one entry where an expert is loaded whole.
        expert_flops: operations of one expert for one token.
        layer_bytes: bytes of what every token needs in a layer: attention, shared neurons.
        layer_flops: operations of that for one token.
        kv_bytes: bytes of keys and values that one token adds in a layer.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    planes: tuple[tuple[int, ...], ...]
    expert_flops: float
    layer_bytes: float = 0.0
    layer_flops: float = 0.0
    kv_bytes: float = 0.0

    def __post_init__(self) -> None:
        sizes = [self.layers, self.experts, self.top_k, *(s for row in self.planes for s in row)]
        even = len({len(row) for row in self.planes}) == 1 and len(self.planes[0]) > 0
        if min(sizes) < 1 or self.top_k > self.experts or not even:
            raise ValueError(f"{self.name}: sizes that are not those of a mixture of experts")
        if len(self.planes) not in (1, self.layers):
            raise ValueError(f"{self.name}: planes of {len(self.planes)} of {self.layers} layers")
        costs = (self.expert_flops, self.layer_bytes, self.layer_flops, self.kv_bytes)
        if min(costs) < 0:
            raise ValueError(f"{self.name}: a cost is negative")

    def plane_bytes(self, layer: int) -> tuple[int, ...]:
        """Bytes of one expert of a layer by plane."""
        return self.planes[layer if len(self.planes) > 1 else 0]

    @property
    def total_bytes(self) -> int:
        """Bytes of all experts of all layers."""
        return self.experts * sum(sum(self.plane_bytes(i)) for i in range(self.layers))

    def served_with(self, planes: int) -> ModelShape:
        """The same with the first so many planes only.

        Raises:
            ValueError: there are not so many.
        """
        if not 1 <= planes <= len(self.planes[0]):
            raise ValueError(f"{planes} planes: {self.name} has {len(self.planes[0])}")
        return replace(self, planes=tuple(row[:planes] for row in self.planes))


@dataclass(frozen=True)
class Trace:
    """Requests and their routes.

    Args:
        model: its sizes.
        routes: int16 (T, D, K), -1 where fewer than K were chosen.
        prompt: int32 (R,), tokens of each prompt, at least 1.
        output: int32 (R,), tokens generated, at least 1.
        arrival: float64 (R,), seconds, ascending.
        domain: int16 (R,), index into `domains`.
        domains: their names.
        weights: float16 (T, D, K), how much each chosen expert counts by the router's scores; None
            if unknown.
        candidates: int16 (T, D, P), experts of highest score; None if not recorded.
        scores: float16 (T, D, P), their softmax scores.
        source: where the routes come from: data, seed, how the output was made.

    Raises:
        ValueError: shapes or values that contradict each other.
    """

    model: ModelShape
    routes: Ints
    prompt: Ints
    output: Ints
    arrival: NDArray[np.float64]
    domain: Ints
    domains: tuple[str, ...]
    weights: NDArray[Any] | None = None
    candidates: Ints | None = None
    scores: NDArray[Any] | None = None
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise ValueError(problem)

    @property
    def requests(self) -> int:
        """R."""
        return len(self.prompt)

    @property
    def decisions(self) -> int:
        """D."""
        return int(self.routes.shape[1])

    @cached_property
    def first_row(self) -> Ints:
        """int64 (R,), the row of each request's first token."""
        rows = self.prompt.astype(np.int64) + self.output - 1
        return np.concatenate([[0], np.cumsum(rows)[:-1]])

    def head(self, requests: int) -> Trace:
        """The first so many requests."""
        count = min(requests, self.requests)
        rows = int((self.prompt[:count].astype(np.int64) + self.output[:count] - 1).sum())
        extra: dict[str, Any] = {
            name: None if (array := getattr(self, name)) is None else array[:rows]
            for name in _OPTIONAL
        }
        return replace(
            self,
            **extra,
            routes=self.routes[:rows],
            prompt=self.prompt[:count],
            output=self.output[:count],
            arrival=self.arrival[:count],
            domain=self.domain[:count],
        )

    def at_rate(self, rate: float) -> Trace:
        """The same requests, arriving at `rate` per second in the mean; infinite: all at once."""
        span = float(self.arrival[-1] - self.arrival[0])
        scale = 0.0 if span == 0 or np.isinf(rate) else (self.requests - 1) / rate / span
        return replace(self, arrival=(self.arrival - self.arrival[0]) * scale)


def _problems(trace: Trace) -> list[str]:
    """What contradicts itself in a trace, most basic first."""
    model, routes, count = trace.model, trace.routes, len(trace.prompt)
    if routes.ndim != 3 or routes.shape[1] not in (1, model.layers):
        return [f"routes {routes.shape}: expected (rows, 1 or {model.layers}, chosen)"]
    if not count or {len(trace.output), len(trace.arrival), len(trace.domain)} != {count}:
        return [f"{count} prompts, {len(trace.output)} outputs, {len(trace.arrival)} arrivals"]
    found = []
    if trace.prompt.min() < 1 or trace.output.min() < 1:
        found.append("a request has no prompt or no output")
    if (rows := int((trace.prompt.astype(np.int64) + trace.output - 1).sum())) != len(routes):
        found.append(f"{len(routes)} rows of routes, the requests need {rows}")
    if len(routes) and (routes.max() >= model.experts or routes.min() < -1):
        found.append(f"routes name expert {routes.max()}, the model has {model.experts}")
    if not np.isfinite(trace.arrival).all() or (np.diff(trace.arrival) < 0).any():
        found.append("arrivals are not ascending")
    if trace.domain.min() < 0 or trace.domain.max() >= len(trace.domains):
        found.append(f"a request is of domain {trace.domain.max()}, {len(trace.domains)} are named")
    if trace.weights is not None and trace.weights.shape != routes.shape:
        found.append(f"weights {trace.weights.shape} of routes {routes.shape}")
    if (trace.candidates is None) != (trace.scores is None):
        found.append("candidates need scores")
    elif trace.candidates is not None and trace.scores is not None:
        shape = trace.candidates.shape
        if shape != trace.scores.shape or shape[:2] != routes.shape[:2]:
            found.append(f"candidates {shape}, scores {trace.scores.shape}")
        elif trace.candidates.size and not 0 <= trace.candidates.min() <= trace.candidates.max() < (
            model.experts
        ):
            found.append("candidates name an expert that the model does not have")
    return found


def write_trace(trace: Trace, path: Path) -> None:
    """Write one file, whole or not at all.

    Args:
        trace: what was recorded.
        path: of the file, by convention *.safetensors; replaced if it exists.

    Raises:
        UsageError: the folder does not exist.
        ResourceError: the disk is full.
    """
    if not path.absolute().parent.is_dir():
        raise UsageError(f"{path}: there is no such folder")
    arrays = {name: getattr(trace, name) for name in _DTYPES}
    tensors = {
        name: np.ascontiguousarray(array, dtype=_DTYPES[name])
        for name, array in arrays.items()
        if array is not None
    }
    described = {
        "format": FORMAT,
        "model": asdict(trace.model),
        "domains": list(trace.domains),
        "source": trace.source,
    }
    atomic_write_bytes(path, save(tensors, {_KEY: json.dumps(described)}))


def read_trace(path: Path) -> Trace:
    """Read a trace file.

    Raises:
        UsageError: no such file, or not a trace.
        CorruptCheckpoint: truncated, or contents that contradict each other.
    """
    header = read_header(path)
    if _KEY not in header.metadata:
        raise UsageError(f"{path}: not a trace (fissile trace writes them)")
    names = set(header.tensors)
    if not set(_DTYPES) - set(_OPTIONAL) <= names <= set(_DTYPES):
        raise CorruptCheckpoint(f"{path}: tensors {', '.join(sorted(names))} are not a trace's")
    arrays = load(path.read_bytes())
    try:
        described = json.loads(header.metadata[_KEY])
        if described["format"] != FORMAT:
            raise UsageError(f"{path}: trace format {described['format']}, known is {FORMAT}")
        model = described["model"] | {
            "planes": tuple(tuple(row) for row in described["model"]["planes"])
        }
        for name, array in arrays.items():
            if str(array.dtype) != _DTYPES[name]:
                raise ValueError(f"{name} is {array.dtype}, expected {_DTYPES[name]}")
        return Trace(
            model=ModelShape(**model),
            domains=tuple(described["domains"]),
            source=described["source"],
            **arrays,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise CorruptCheckpoint(f"{path}: {' '.join(str(err).split())}") from None
