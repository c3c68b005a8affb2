"""`fissile bench decode`: batch-1 decoding on a CPU, dense floats against packed weights.

Compared in one process, in rotating order: the dense model; the artifact at each width as Fissile
serves it; and the artifact's 4-bit codes under torch's own int4 operator, with bfloat16 and with
float32 activations, experts one by one. That operator adds a float zero too, so the weights are the
same up to its rounding of scales and zeros; only companded weights are rounded anew for it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from fissile.config import Strict
from fissile.errors import UsageError
from fissile.eval.result import code, machine, model_sha256, versions
from fissile.eval.run import load_model
from fissile.eval.speed import Candidate, find_candidate, rotated, weights_bytes
from fissile.kernels.layout import decode_theta, unpack
from fissile.models.modules_fissile import NestedExperts, sum_experts
from fissile.models.nested_fissile import NestedLinear, NestedTensor, paths
from fissile.models.stacks_fissile import tensors_of
from fissile.refactor.training import Progress
from fissile.run.bench import Bench

_GROUPS = (32, 64, 128, 256)


class DecodeBench(Strict):
    """Two models and how long to decode; the defaults take half a minute for small models."""

    models: tuple[str, ...] = Field((), description="the dense model and an artifact made of it")
    widths: tuple[int, ...] = Field((4, 3, 2), description="bits to serve the artifact at")
    prompt: int = Field(32, gt=0, description="tokens in the cache before decoding")
    steps: int = Field(16, gt=0, description="decoded tokens a round")
    repeats: int = Field(30, gt=0, description="measured rounds")
    warmup: int = Field(2, ge=1, description="rounds before them; packing happens in the first")
    seed: int = Field(0, description="of the prompt")


class TorchInt4(nn.Module):
    """4-bit codes of one matrix under `aten::_weight_int4pack_mm_for_cpu`.

    Codes that are companded stand for no line of values, which is all that the operator has: such a
    weight is rounded anew, to the nearest of 16 values between the extremes of each group.

    Args:
        weight: a nested weight served at 4 bits.
        dtype: of activations, scales and zeros inside.
        expert: which matrix of a stack.
        bias: added to the product.
    """

    def __init__(
        self,
        weight: NestedTensor,
        dtype: torch.dtype,
        expert: int | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.dtype, self.group, self.bias = dtype, weight.group_size, bias
        if weight.companding == 1:
            parts = weight.parts()
            own = {name: part if expert is None else part[expert] for name, part in parts.items()}
            codes_NK, (scale_NG, zero_NG) = unpack(own, 4), decode_theta(own["theta_4"])
        else:
            grouped = weight.dense(torch.float32, expert).unflatten(-1, (-1, self.group))
            zero_NG = grouped.amin(-1)
            scale_NG = ((grouped.amax(-1) - zero_NG) / 15).clamp(min=1e-12)
            steps = (grouped - zero_NG[..., None]) / scale_NG[..., None]
            codes_NK = steps.round().clamp(0, 15).flatten(-2)
        # The operator computes scale * (code - 8) + zero.
        pair = torch.stack([scale_NG, zero_NG + 8 * scale_NG], dim=-1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK.int(), 1)
        self.register_buffer("codes", packed)
        self.register_buffer("floats", pair.transpose(0, 1).contiguous().to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(self.dtype)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, self.group, self.floats)
        y = y.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class TorchInt4Experts(nn.Module):
    """A stack of experts, each matrix of it under torch's operator.

    Args:
        experts: nested, served at 4 bits.
        dtype: inside the operator.
    """

    def __init__(self, experts: NestedExperts, dtype: torch.dtype) -> None:
        super().__init__()
        self.act_fn, count = experts.act_fn, experts.num_experts
        stacks = [*tensors_of(experts.gate_up_proj), *tensors_of(experts.down_proj)]
        self.gate_up, self.down = (
            nn.ModuleList(TorchInt4(stack, dtype, expert) for expert in range(count))
            for stack in stacks
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return sum_experts(self._one, hidden_states, top_k_index, top_k_weights)

    def _one(self, x: Tensor, expert: int) -> Tensor:
        gate, up = self.gate_up[expert](x).chunk(2, dim=-1)
        return self.down[expert](self.act_fn(gate) * up)


def run(settings: DecodeBench, progress: Progress) -> dict[str, Any]:
    """Milliseconds per token of batch-1 decoding on the CPU: dense, packed, torch's int4 operator.

    Args:
        settings: models and rounds.
        progress: called as ("bench", rounds done, rounds, "").

    Returns:
        "rows", one an implementation: milliseconds per token (least, median, all rounds), ratio to
        the dense model, bytes of weights, largest error of logits relative to the decoded weights'
        largest logit, and the code path; and "conditions".

    Raises:
        UsageError: not two models, or an artifact without the widths.
    """
    dense, candidates = _find(settings)
    ids = torch.randint(3, 256, (1, settings.prompt), generator=_rng(settings.seed))
    models = {"dense float32": load_model(dense.folder, dense.config)}
    errors: dict[str, float | None] = {"dense float32": None}
    with torch.inference_mode():
        for candidate in candidates:
            _add_width(candidate, models, errors, ids)
        times = _measure(settings, models, ids, progress)
    base = min(times["dense float32"])
    rows = [
        {
            "implementation": name,
            "ms_per_token": 1e3 * min(found),
            "median_ms": 1e3 * statistics.median(found),
            "dense_over_this": base / min(found),
            "weights_bytes": weights_bytes(models[name]),
            "nested_bytes": nested_bytes(models[name]),
            "logit_error": errors[name],
            "paths": paths(models[name]),
            "ms": [round(1e3 * value, 4) for value in found],
        }
        for name, found in times.items()
    ]
    conditions = {
        **settings.model_dump(exclude={"models"}),
        "model_sha256": [model_sha256(c.folder) for c in (dense, candidates[0])],
        "order": "rotating",
        "torch_threads": torch.get_num_threads(),
        "code": code(),
        "versions": versions(),
        **machine(),
    }
    return {"rows": rows, "conditions": conditions}


def nested_bytes(model: nn.Module) -> int:
    """Bytes that hold the packed weights of a model, floats included."""
    kinds = (NestedTensor, TorchInt4)
    found = [m for m in model.modules() if isinstance(m, kinds)]
    return sum(buffer.nbytes for m in found for buffer in m.buffers(recurse=False))


def int4_model(model: nn.Module, dtype: torch.dtype) -> bool:
    """Put torch's operator in place of nested linears and experts; False if it cannot take them.

    Args:
        model: served at 4 bits.
        dtype: inside the operator.
    """
    kinds = (NestedLinear, NestedExperts)
    found = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    weights = [m for m in model.modules() if isinstance(m, NestedTensor)]
    if not found or any(w.group_size not in _GROUPS or w.shape[-2] % 16 for w in weights):
        return False
    for name, module in found.items():
        parent, _, child = name.rpartition(".")
        other = (
            TorchInt4Experts(module, dtype)
            if isinstance(module, NestedExperts)
            else TorchInt4(module.weight, dtype, bias=module.bias)
        )
        setattr(model.get_submodule(parent), child, other)
    return True


def _find(settings: DecodeBench) -> tuple[Candidate, list[Candidate]]:
    if len(settings.models) != 2 or not settings.widths:
        raise UsageError("decode needs two models: fissile bench decode DENSE_DIR ARTIFACT_DIR")
    dense, artifact = settings.models
    found = [find_candidate(f"{artifact}@{bits}") for bits in settings.widths]
    return find_candidate(dense), found


def _add_width(
    candidate: Candidate, models: dict[str, Any], errors: dict[str, float | None], ids: Tensor
) -> None:
    """One width as Fissile serves it and, at four bits, under torch's operator."""
    model = load_model(candidate.folder, candidate.config, candidate.bits)
    names = {f"fissile {candidate.bits} bits": model}
    if candidate.bits == 4:
        for dtype in (torch.bfloat16, torch.float32):
            other = load_model(candidate.folder, candidate.config, 4)
            if int4_model(other, dtype):
                names[f"torch int4 {str(dtype).removeprefix('torch.')}"] = other
    truth = _decoded(load_model(candidate.folder, candidate.config, candidate.bits))
    want = truth(input_ids=ids).logits
    for name, found in names.items():
        # Token by token, as it decodes: many tokens at once take another way through the code.
        past: Any = None
        got: list[Tensor] = []
        for token in ids.split(1, dim=1):
            out = found(input_ids=token, past_key_values=past, use_cache=True)
            past, got = out.past_key_values, [*got, out.logits]
        error = (torch.cat(got, dim=1).double() - want).abs().max() / want.abs().max()
        models[name], errors[name] = found, float(error)


def _decoded(model: Any) -> Any:
    """The model with every weight decoded, in float64."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, NestedLinear):
            parent, _, child = name.rpartition(".")
            plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
            plain.weight = nn.Parameter(linear.weight.dense(torch.float32))
            if linear.bias is not None:
                plain.bias = linear.bias
            setattr(model.get_submodule(parent), child, plain)
    return model.double()


def _measure(
    settings: DecodeBench, models: dict[str, Any], ids: Tensor, progress: Progress
) -> dict[str, list[float]]:
    """Seconds per token of every round."""
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    rounds = settings.warmup + settings.repeats
    for turn in range(rounds):
        for i in rotated(len(names), turn):
            seconds = _round(models[names[i]], ids, settings.steps)
            if turn >= settings.warmup:
                times[names[i]].append(seconds)
        progress("bench", turn + 1, rounds, "")
    return times


def _round(model: Callable[..., Any], ids: Tensor, steps: int) -> float:
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    token, past = out.logits[:, -1:].argmax(-1), out.past_key_values
    began = time.perf_counter()
    for _ in range(steps):
        out = model(input_ids=token, past_key_values=past, use_cache=True)
        token, past = out.logits[:, -1:].argmax(-1), out.past_key_values
    return (time.perf_counter() - began) / steps


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


BENCH = Bench(DecodeBench, run)
