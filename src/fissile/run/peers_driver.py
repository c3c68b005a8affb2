"""Runs one quantizer from PyPI on a dense model, inside the environment that it is installed in.

That environment holds no Fissile, so this file imports nothing of it: its own Python starts it as a
script, `python -I peers_driver.py JOB.json`. What it leaves are integer codes, scales and zeros
as the quantizer stores them (codes uint8 (O, I), scales float16 (O, G), zeros uint8 or float16
(O, G), none for a symmetric grid); `fissile.run.peers` makes weights of them and counts their bits.

Shapes: O output rows, I inputs, G groups along the inputs, N windows, S tokens per window.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Weights = dict[str, tuple[Tensor, Tensor, Tensor]]
"""Linear to its weight as the quantizer decodes it (O, I), its scales and zeros (O, G)."""

_TOLERANCE = 1e-3
"""How far a decoded weight may be from its grid, in steps: what rounding of floats explains."""


def main(path: str) -> None:
    """Quantize as the job says; write `weights.safetensors` and `result.json` beside it.

    The job names "peer", "model" (folder), "tokens" (safetensors of int64 "ids" (N, S)), "bits",
    "group_size", "seed", "threads" and "options" (of the peer).
    """
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    folder = Path(path).parent
    torch.set_num_threads(job["threads"])
    torch.manual_seed(job["seed"])
    ids_NS = load_file(job["tokens"])["ids"]
    began = time.perf_counter()
    weights, settings = PEERS[job["peer"]](job, ids_NS, folder)
    seconds, processor = time.perf_counter() - began, time.process_time()
    stored: dict[str, Tensor] = {}
    furthest = 0.0
    for name, (weight, scale, zero) in weights.items():
        codes, off = codes_of(weight, scale, zero, job["bits"])
        furthest = max(furthest, off)
        stored |= {f"{name}.codes": codes, f"{name}.scale": scale.half()}
        if not settings.get("sym"):
            zero = zero.to(torch.float16 if zero.is_floating_point() else torch.uint8)
            stored[f"{name}.zero"] = zero
    save_file({k: v.contiguous() for k, v in stored.items()}, folder / "weights.safetensors")
    result = {
        "settings": settings,
        "seconds": seconds,
        "processor_seconds": processor,
        "off_grid": furthest,
        "versions": {k: version(k) for k in (PACKAGES[job["peer"]], "torch", "transformers")},
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


def codes_of(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, float]:
    """Integers of weights on a grid, W = scale * (code - zero).

    Args:
        weight: as decoded by the quantizer, (O, I).
        scale: (O, G).
        zero: (O, G), integers or floats.
        bits: width of a code.

    Returns:
        uint8 codes (O, I) and how far the worst weight is from its grid point, in steps.

    Raises:
        ValueError: the weights are not on this grid.
    """
    steps = weight.double().unflatten(1, (scale.shape[1], -1)) / scale.double()[..., None]
    steps = steps + zero.double()[..., None]
    codes = steps.round()
    off = float((steps - codes).abs().max())
    low, high = int(codes.min()), int(codes.max())
    if off > _TOLERANCE or low < 0 or high >= 1 << bits:
        raise ValueError(f"codes {low} to {high} of {bits} bits, {off:.3g} steps off the grid")
    return codes.flatten(1).to(torch.uint8), off


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Integers of a little-endian bit stream, the layout of GPTQ checkpoints.

    Args:
        words: int32 (R, C), streams along the rows.
        bits: width of a code; any.

    Returns:
        uint8 (R * 32 / bits, C).
    """
    shifts = torch.arange(32, dtype=torch.int64)[:, None]
    stream = (words.to(torch.int64)[:, None] >> shifts) & 1
    digits = stream.flatten(0, 1).unflatten(0, (-1, bits))
    return (digits << torch.arange(bits)[:, None]).sum(1).to(torch.uint8)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All linears of the decoder layers by name; embeddings and head are not among them."""
    found = {k: m for k, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {k: m for k, m in found.items() if ".layers." in k}


def _dense(job: Mapping[str, Any]) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    return model.eval()


def _hqq(job: Mapping[str, Any], _ids: Tensor, _folder: Path) -> tuple[Weights, dict[str, Any]]:
    """Half-quadratic quantization: no data, float zeros."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=job["bits"], group_size=job["group_size"], axis=1)
    weights: Weights = {}
    for name, linear in linears(_dense(job)).items():
        made = HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
        rows = linear.out_features
        floats = (made.meta[key].float().reshape(rows, -1) for key in ("scale", "zero"))
        scale, zero = floats
        weights[name] = (made.dequantize().detach(), scale, zero)
    return weights, dict(config["weight_quant_params"])


def _auto_round(
    job: Mapping[str, Any], ids_NS: Tensor, _folder: Path
) -> tuple[Weights, dict[str, Any]]:
    """SignRound: rounding and ranges tuned against each block's output."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    settings = {
        "scheme": "W4A16",
        "bits": job["bits"],
        "group_size": job["group_size"],
        "sym": False,
        "nsamples": len(ids_NS),
        "seqlen": ids_NS.shape[1],
        "batch_size": 8,
        "seed": job["seed"],
        "amp": False,
        "enable_torch_compile": False,
        "device_map": "cpu",
        **job["options"],
    }
    windows = [{"input_ids": w[None], "attention_mask": torch.ones_like(w[None])} for w in ids_NS]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    made, _ = AutoRound(_dense(job), tokenizer, dataset=windows, **settings).quantize()
    weights: Weights = {}
    for name, linear in linears(made).items():
        rows = linear.out_features
        scale = torch.as_tensor(linear.scale).detach().float().reshape(rows, -1)
        # One number where the grid is symmetric.
        zero = torch.as_tensor(linear.zp).detach().round().to(torch.int64)
        zero = zero.reshape(rows, -1) if zero.numel() > 1 else zero.expand_as(scale)
        weights[name] = (linear.weight.detach().float(), scale, zero)
    return weights, settings


def _gptqmodel(
    job: Mapping[str, Any], ids_NS: Tensor, folder: Path
) -> tuple[Weights, dict[str, Any]]:
    """GPTQ, or GPTAQ where the options ask for it."""
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import GPTAQConfig

    options = dict(job["options"])
    if "gptaq" in options:
        options["gptaq"] = GPTAQConfig(**options["gptaq"])
    settings = {
        "bits": job["bits"],
        "group_size": job["group_size"],
        "sym": False,
        "desc_act": False,
        "format": "gptq_v2",
    }
    config = QuantizeConfig(**settings, **options, device="cpu")
    model = GPTQModel.load(job["model"], config, dtype=torch.float32)
    windows = [{"input_ids": w[None], "attention_mask": torch.ones_like(w[None])} for w in ids_NS]
    model.quantize(windows, batch_size=8)
    model.save(str(folder / "packed"))
    state: dict[str, Tensor] = {}
    for part in sorted((folder / "packed").glob("*.safetensors")):
        state |= load_file(part)
    told = {k: v for k, v in config.to_dict().items() if isinstance(v, str | int | float | dict)}
    # A folder of this machine says nothing about the result.
    meta = told.get("meta")
    if isinstance(meta, dict):
        told["meta"] = {k: v for k, v in meta.items() if not k.endswith("_path")}
    return gptq_weights(state, job["bits"], job["group_size"]), told


def gptq_weights(state: Mapping[str, Tensor], bits: int, group_size: int) -> Weights:
    """Weights of a GPTQ checkpoint (format gptq_v2): scale * (code - zero), all unpacked here.

    Raises:
        ValueError: inputs are not in contiguous groups.
    """
    weights: Weights = {}
    for name in sorted(k.removesuffix(".qweight") for k in state if k.endswith(".qweight")):
        codes_IO = unpack_words(state[f"{name}.qweight"], bits)
        zero_OG = unpack_words(state[f"{name}.qzeros"].T.contiguous(), bits)
        scale_OG = state[f"{name}.scales"].float().T
        group_I = state[f"{name}.g_idx"].long()
        if not torch.equal(group_I, torch.arange(len(group_I)) // group_size):
            raise ValueError(f"{name}: its groups are not contiguous")
        zero_OG = zero_OG[: len(scale_OG)].to(torch.int64)
        weight = (codes_IO.T - zero_OG[:, group_I]) * scale_OG[:, group_I]
        weights[name] = (weight, scale_OG, zero_OG)
    return weights


PEERS: dict[str, Callable[..., tuple[Weights, dict[str, Any]]]] = {
    "hqq": _hqq,
    "auto-round": _auto_round,
    "gptqmodel": _gptqmodel,
}
PACKAGES = {"hqq": "hqq", "auto-round": "auto-round", "gptqmodel": "gptqmodel"}

if __name__ == "__main__":
    main(sys.argv[1])
