"""Quantizers of others: how each is called, the weights that come of it, and what they cost.

Shapes: O output rows, I inputs, G groups along the inputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fissile.errors import CorruptCheckpoint
from fissile.io.publish import atomic_write_json
from fissile.run.peers_env import start

if TYPE_CHECKING:
    from torch import Tensor

    from fissile.models.source import CheckpointSource, MemorySource

Peer = Literal[
    "hqq",
    "auto-round",
    "auto-round-best",
    "auto-round-neuqi",
    "auto-round-ext",
    "gptqmodel-gptq",
    "gptqmodel-gptaq",
]
_FLOAT_BITS = 16


@dataclass(frozen=True)
class Recipe:
    """How a peer is called.

    Args:
        package: on PyPI.
        what: in words.
        options: of its public interface, beside width, group size, data and seed.
    """

    package: str
    what: str
    options: Mapping[str, Any] = field(default_factory=dict)


RECIPES: dict[Peer, Recipe] = {
    "hqq": Recipe("hqq", "no data, float zeros"),
    "auto-round": Recipe("auto-round", "asymmetric, 200 steps a block", {"iters": 200}),
    "auto-round-best": Recipe(
        "auto-round", "asymmetric, the steps of its best recipe", {"iters": 1000}
    ),
    "auto-round-neuqi": Recipe(
        "auto-round", "asymmetric, grids searched first", {"iters": 200, "enable_neuqi": True}
    ),
    # The extension acts on symmetric grids alone.
    "auto-round-ext": Recipe(
        "auto-round",
        "symmetric, with its extension of the algorithm",
        {"iters": 200, "enable_alg_ext": True, "sym": True},
    ),
    "gptqmodel-gptq": Recipe("gptqmodel", "GPTQ, asymmetric, group-aware order"),
    "gptqmodel-gptaq": Recipe("gptqmodel", "GPTAQ, asymmetric", {"gptaq": {}}),
}


@dataclass(frozen=True)
class Job:
    """One quantization by a peer.

    Args:
        peer: a name of `RECIPES`.
        bits: 2, 3 or 4.
        group_size: inputs that share a scale and a zero.
        seed: of the calibration windows and of the peer.
    """

    peer: Peer
    bits: int
    group_size: int
    seed: int

    def folder(self, root: Path) -> Path:
        """Where its result is kept."""
        return root / f"{self.peer}.g{self.group_size}" / f"{self.bits}_bits" / f"seed_{self.seed}"


def quantize(
    job: Job, root: Path, model: Path, tokens: Path, environment: Path, threads: int
) -> str | None:
    """Run a peer unless its result is kept already.

    Args:
        job: what to run.
        root: folder of all results.
        model: the dense checkpoint, in the stock format.
        tokens: safetensors of the calibration windows, "ids" (N, S).
        environment: that the peer is installed in.
        threads: of the computation.

    Returns:
        None, or the reason why there is no result.
    """
    folder, recipe = job.folder(root), RECIPES[job.peer]
    if (folder / "result.json").exists():
        return None
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        "peer": recipe.package,
        "model": str(model.absolute()),
        "tokens": str(tokens.absolute()),
        "bits": job.bits,
        "group_size": job.group_size,
        "seed": job.seed,
        "threads": threads,
        "options": dict(recipe.options),
    }
    atomic_write_json(folder / "job.json", told)
    path = (folder / "job.json").absolute()
    return start(environment.absolute(), Path(__file__).with_name("peers_driver.py"), path, threads)


def read_result(job: Job, root: Path) -> dict[str, Any] | None:
    """Settings, seconds and versions of a finished job; None if there is none."""
    path = job.folder(root) / "result.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def read_weights(job: Job, root: Path) -> tuple[dict[str, Tensor], float]:
    """Decoded weights of a finished job and the bits that each of them costs.

    Returns:
        Name in the stock checkpoint to float32 (O, I); bits per weight, floats included.

    Raises:
        CorruptCheckpoint: tensors that do not fit each other.
    """
    from safetensors.torch import load_file

    path = job.folder(root) / "weights.safetensors"
    state = load_file(path)
    weights, cost, count = {}, 0.0, 0
    for name in (key.removesuffix(".codes") for key in state if key.endswith(".codes")):
        codes_OI, scale_OG = state[f"{name}.codes"], state[f"{name}.scale"]
        zero_OG = state.get(f"{name}.zero")
        if scale_OG.shape != (len(codes_OI), codes_OI.shape[1] // job.group_size):
            raise CorruptCheckpoint(f"{path}: {name}: scales {tuple(scale_OG.shape)} do not fit")
        weights[f"{name}.weight"] = decode(codes_OI, scale_OG, zero_OG, job.bits)
        cost += stored_bits(codes_OI, scale_OG, zero_OG, job.bits)
        count += codes_OI.numel()
    if not count:
        raise CorruptCheckpoint(f"{path}: holds no weights")
    return weights, cost / count


def decode(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int) -> Tensor:
    """W = scale * (code - zero), float32 (O, I).

    Args:
        codes_OI: uint8.
        scale_OG: float16.
        zero_OG: float16 or uint8; None for the middle of the codes, 2^(bits - 1).
        bits: width of a code.
    """
    codes = codes_OI.float().unflatten(1, (scale_OG.shape[1], -1))
    zero = 2.0 ** (bits - 1) if zero_OG is None else zero_OG.float()[..., None]
    return ((codes - zero) * scale_OG.float()[..., None]).flatten(1)


def stored_bits(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | None, bits: int) -> int:
    """Bits of one weight in memory: codes, float16 scales, zeros as float16 or as wide as a code.

    A zero that is an integer is packed like the codes; a symmetric grid needs none.
    """
    total = bits * codes_OI.numel() + _FLOAT_BITS * scale_OG.numel()
    if zero_OG is not None:
        total += (_FLOAT_BITS if zero_OG.is_floating_point() else bits) * zero_OG.numel()
    return total


def replaced(source: CheckpointSource, weights: Mapping[str, Tensor]) -> MemorySource:
    """A dense model with a peer's decoded weights in the place of its linears.

    Args:
        source: the dense checkpoint.
        weights: name in the checkpoint to float32 (O, I).

    Raises:
        CorruptCheckpoint: a linear of a layer was left out, or a weight is none of them.
    """
    from fissile.families.names import dense_names
    from fissile.models.source import MemorySource

    state = dict(source.outer_state())
    for i in range(source.config.num_base_layers):
        layer = source.layer_state(i)
        state |= {f"model.layers.{i}.{name}": tensor for name, tensor in layer.items()}
    used = set()
    for name, origin in dense_names(source.family, source.headers.config):
        if not name.startswith("model.layers.") or state[name].dim() != 2:
            continue
        if origin.name not in weights:
            raise CorruptCheckpoint(f"{origin.name}: the peer left it in floating point")
        weight = weights[origin.name]
        state[name] = weight if origin.rows is None else weight[slice(*origin.rows)]
        used.add(origin.name)
    if unknown := weights.keys() - used:
        raise CorruptCheckpoint(f"{min(unknown)}: the peer quantized what is no decoder linear")
    return MemorySource(source.config, state)


def gap_of(by_domain: Mapping[str, float | None], dense: Mapping[str, float | None]) -> float:
    """Mean over domains of ln ppl - ln ppl(dense), nats per token; infinite for a broken model."""
    gaps = [
        math.log(ppl / base) if (ppl := by_domain.get(name)) else math.inf
        for name, base in dense.items()
        if base
    ]
    return math.fsum(gaps) / len(gaps)
