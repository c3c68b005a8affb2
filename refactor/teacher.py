"""What the dense model predicts, kept as its top-k logits, and the loss towards it.

The k largest log-probabilities are stored with the log of the mass of all other tokens, which the
loss treats as one more class. Lumping classes can only lower a KL divergence (log-sum inequality),
so the loss never exceeds the KL over the whole vocabulary, and with k = V it equals it.

Shapes: N windows, S tokens per window, T tokens, K stored classes, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fissile.io.units import UnitStore
from fissile.workers import Workers

_UNIT_TOKENS = 1 << 15
"""Tokens of one stored unit."""

_CHUNK = 1 << 19
"""Logits whose loss is computed at once: few enough to stay in the processor's cache."""


@dataclass(frozen=True, eq=False)
class Targets:
    """The teacher's distribution over K tokens and the rest, per predicted position.

    Attributes:
        log_p_TK: log-probabilities, float16 or wider.
        index_TK: their tokens, any integer type.
        rest_T: log of the remaining mass, float32; -inf where K is the vocabulary.
    """

    log_p_TK: Tensor
    index_TK: Tensor
    rest_T: Tensor

    def rows(self, rows: slice) -> Targets:
        """Some of the positions."""
        return Targets(self.log_p_TK[rows], self.index_TK[rows], self.rest_T[rows])


def top_targets(logits_TV: Tensor, top_k: int, temperature: float = 1.0) -> Targets:
    """The largest `top_k` probabilities of softmax(logits / temperature), and the rest exactly.

    Args:
        logits_TV: of the teacher, any float type.
        top_k: classes kept; 0 or at least V keeps all.
        temperature: of the softmax.
    """
    wide = torch.promote_types(logits_TV.dtype, torch.float32)
    log_p_TV = torch.log_softmax(logits_TV.to(wide) / temperature, dim=-1)
    tokens, vocab = log_p_TV.shape
    if top_k == 0 or top_k >= vocab:
        index = torch.arange(vocab, device=logits_TV.device).expand(tokens, -1)
        return Targets(log_p_TV, index, log_p_TV.new_full((tokens,), -torch.inf))
    log_p_TK, index_TK = log_p_TV.topk(top_k, dim=-1)
    rest_T = log_p_TV.scatter_(1, index_TK, -torch.inf).logsumexp(-1)
    return Targets(log_p_TK, index_TK, rest_T)


class _Distill(torch.autograd.Function):
    """Mean of weight * t^2 KL + (1 - weight) * CE; the gradient is made along with the value."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        targets: Targets | None,
        labels_T: Tensor,
        weight: float,
        t: float,
    ) -> Tensor:
        grad = torch.empty_like(logits_TV)
        wide = torch.promote_types(logits_TV.dtype, torch.float32)
        total = torch.zeros((), dtype=torch.float64, device=logits_TV.device)
        labelled = max(1, int(labels_T.ge(0).sum()))
        size = max(1, _CHUNK // logits_TV.shape[1])
        for begin in range(0, len(logits_TV), size):
            rows = slice(begin, begin + size)
            x, label = logits_TV[rows].to(wide), labels_T[rows]
            slopes = []
            if targets is not None:
                kl, slope = _divergence(x / t, targets.rows(rows))
                total += kl.sum(dtype=torch.float64) * (weight * t * t / len(logits_TV))
                slopes.append(slope.mul_(weight * t / len(logits_TV)))
            if weight < 1:
                ce, slope = _cross_entropy(x, label)
                total += ce.sum(dtype=torch.float64) * ((1 - weight) / labelled)
                slopes.append(slope.mul_((1 - weight) / labelled))
            grad[rows] = sum(slopes[1:], slopes[0])
        ctx.save_for_backward(grad)
        return total.to(wide)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * outer[0].to(grad.dtype), None, None, None, None


def _divergence(x_TV: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """KL(teacher || softmax x) over the stored classes and the rest, and its slope in x."""
    index_TK, log_p_TK = targets.index_TK.to(torch.int64), targets.log_p_TK.to(x_TV.dtype)
    rest_T = targets.rest_T.to(x_TV.dtype)
    # Rounding of the stored values must not leave more or less than one in all.
    norm_T = torch.logaddexp(log_p_TK.logsumexp(-1), rest_T)
    log_p_TK, rest_T = log_p_TK - norm_T[:, None], rest_T - norm_T
    p_TK, p_rest_T = log_p_TK.exp(), rest_T.exp()
    top_TK = x_TV.gather(1, index_TK)
    high_T = x_TV.amax(-1, keepdim=True)
    e_TV = (x_TV - high_T).exp_().scatter_(1, index_TK, 0.0)
    e_TK = (top_TK - high_T).exp_()
    # Where the student's tail underflows, its logarithm is bounded instead of infinite.
    tail_T = e_TV.sum(-1).clamp_min(torch.finfo(x_TV.dtype).tiny)
    sum_T = tail_T + e_TK.sum(-1)
    log_q_TK = top_TK - high_T - sum_T.log()[:, None]
    kl_T = (p_TK * (log_p_TK - log_q_TK)).sum(-1)
    lumped_T = p_rest_T * (rest_T - tail_T.log() + sum_T.log())
    kl_T = kl_T + torch.where(p_rest_T > 0, lumped_T, 0.0)
    slope_TV = e_TV.mul_((1 / sum_T - p_rest_T / tail_T)[:, None])
    return kl_T, slope_TV.scatter_(1, index_TK, e_TK / sum_T[:, None] - p_TK)


def _cross_entropy(x_TV: Tensor, label_T: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the labels, zero where they are negative, and its slope in x."""
    known_T = label_T.ge(0)
    label_T1 = label_T.clamp_min(0)[:, None]
    log_q_TV = torch.log_softmax(x_TV, dim=-1)
    ce_T = -log_q_TV.gather(1, label_T1)[:, 0] * known_T
    slope_TV = log_q_TV.exp_()
    slope_TV.scatter_add_(1, label_T1, slope_TV.new_full(label_T1.shape, -1.0))
    return ce_T, slope_TV.mul_(known_T[:, None])


def distill_loss(
    logits_BSV: Tensor,
    targets: Targets | None,
    ids_BS: Tensor,
    *,
    kd_weight: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """kd_weight * T^2 KL(teacher || student) + (1 - kd_weight) * next-token cross-entropy, in nats.

    The KL is forward, over the targets' classes and the rest, mean over all positions; the
    cross-entropy is the mean over all positions that have a next token.

    Args:
        logits_BSV: of the student.
        targets: of the teacher at the same positions and temperature, T = B*S; None where the
            weight is 0.
        ids_BS: the tokens that were read, int64.
        kd_weight: 0..1.
        temperature: of both softmaxes in the KL.

    Raises:
        ValueError: a weight out of range, or one that needs targets without them.
    """
    if not 0 <= kd_weight <= 1 or (kd_weight > 0 and targets is None):
        raise ValueError(f"kd_weight {kd_weight} must be in 0..1, and 0 without targets")
    labels_BS = torch.cat([ids_BS[:, 1:], torch.full_like(ids_BS[:, :1], -1)], dim=1)
    loss: Tensor = _Distill.apply(
        logits_BSV.flatten(0, 1), targets, labels_BS.flatten(), kd_weight, temperature
    )
    return loss


class Teacher:
    """The dense model's targets over fixed windows; each is computed once, when first asked for.

    Units of windows are written as they are computed, in the order of the windows, and read back
    through memory maps, so an interrupted run and other runs on the same windows find them.

    Args:
        model: the dense model, called as model(input_ids=...).logits.
        ids_NS: int64 windows, best in the order in which they will be asked for.
        top_k: classes kept; 0 keeps nothing and asks the model every time.
        temperature: of the softmax.
        store: where units live; None keeps them in memory.
        batch_tokens: tokens of one forward pass.
        workers: processes that ask for the same windows together; only the main one computes.
        context: makes a context for the model's forward pass, e.g. autocast.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        ids_NS: Tensor,
        *,
        top_k: int,
        temperature: float = 1.0,
        store: UnitStore | None = None,
        batch_tokens: int = 4096,
        workers: Workers | None = None,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.model, self.ids_NS, self.top_k, self.temperature = model, ids_NS, top_k, temperature
        self.store, self.workers = store or UnitStore(), workers or Workers()
        self.size = max(1, _UNIT_TOKENS // ids_NS.shape[1])
        self.batch = max(1, batch_tokens // ids_NS.shape[1])
        self._context = context or nullcontext
        self._read: dict[int, Callable[[str, int], Tensor]] = {}

    def __call__(self, windows: Tensor, own: Tensor | None = None) -> Targets:
        """Targets of windows, T = their tokens, in the order asked for.

        Args:
            windows: int64 indices that all processes ask for at this moment.
            own: those of them that this process wants; all without it.
        """
        own = windows if own is None else own
        device = self.workers.device
        if not self.top_k:
            logits = self._logits(self.ids_NS[own])
            return top_targets(logits.flatten(0, 1), 0, self.temperature)
        for unit in (windows // self.size).unique().tolist():
            if unit not in self._read:
                self._prepare(unit)
        parts = []
        for name in ("log_p", "index", "rest"):
            rows = [self._read[w // self.size](name, w % self.size) for w in own.tolist()]
            parts.append(torch.cat(rows).to(device))
        return Targets(*parts)

    @torch.no_grad()
    def _logits(self, ids_NS: Tensor) -> Tensor:
        device = self.workers.device
        with self._context():
            logits: Tensor = self.model(input_ids=ids_NS.to(device), use_cache=False).logits
        return logits

    def _prepare(self, unit: int) -> None:
        """Have a unit at hand, computed by the main process unless it is stored."""
        ids_NS = self.ids_NS[unit * self.size : (unit + 1) * self.size]
        asked = f"{self.top_k} {self.temperature}".encode()
        name = hashlib.sha256(ids_NS.contiguous().numpy().tobytes() + asked).hexdigest()[:24]
        path = self.store.path(name)
        if path is None:
            tensors = self._compute(ids_NS)
            self._read[unit] = lambda key, row: tensors[key][row]
            return
        with self.workers.main_first():
            if not self.store.has(name):
                self.store.save(name, self._compute(ids_NS))
        file = safe_open(path, framework="pt")
        self._read[unit] = lambda key, row: file.get_slice(key)[row]

    def _compute(self, ids_NS: Tensor) -> dict[str, Tensor]:
        rows: dict[str, list[Tensor]] = {"log_p": [], "index": [], "rest": []}
        for begin in range(0, len(ids_NS), self.batch):
            logits_BSV = self._logits(ids_NS[begin : begin + self.batch])
            integer = torch.uint16 if logits_BSV.shape[-1] <= 1 << 16 else torch.int32
            for logits_SV in logits_BSV:
                found = top_targets(logits_SV, self.top_k, self.temperature)
                rows["log_p"].append(found.log_p_TK.half().cpu())
                rows["index"].append(found.index_TK.to(integer).cpu())
                rows["rest"].append(found.rest_T.float().cpu())
        return {name: torch.stack(parts) for name, parts in rows.items()}
