"""Widths that depend on the token: every chosen expert of a token is computed at its own width.

Three ways to choose, all for the same mean number of bits: a width per expert (the static plan), a
training-free rule, and a bit router per expert (the second router of D2MoE, arXiv 2504.15299,
section 4.2). They act on the routed experts alone; everything else keeps its width.

Shapes: T tokens, D model width, K slots per token, R pairs of a token and an expert it chose, E
experts, M neurons per expert, W widths in ascending order, P rows of a random projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fissile.quant.allocate import Choice, allocate

_PROJECTION = 64
_LINE_FITS = 0.9
_HALVINGS = 60


class Decision(NamedTuple):
    """Width of every pair.

    Attributes:
        choice_R: int64, place of the width; negative where the pair is left out.
        share_RW: probabilities whose gradient is that of a mixture of the widths; None where
            nothing is trained.
    """

    choice_R: Tensor
    share_RW: Tensor | None = None


class Rule(Protocol):
    """How a layer chooses: inputs (R, D), experts (R,) and their weights (R,) to a decision."""

    def __call__(self, x_RD: Tensor, expert_R: Tensor, weight_R: Tensor) -> Decision:
        """Choose."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """What a layer's experts saw at the widest width.

    Attributes:
        x_RD: inputs.
        expert_R: int64.
        weight_R: of the expert's output.
        off_RW: norm of what each width's output is off the widest's, not weighted.
    """

    x_RD: Tensor
    expert_R: Tensor
    weight_R: Tensor
    off_RW: Tensor


class WidthExperts(nn.Module):
    """The routed experts of a layer at several widths; takes the place of its `experts`.

    Attributes:
        seen: when it is a list, pairs are kept there.
        used_W: int64, pairs computed at each width so far.
        share_W: mean probability of each width in the last pass; None where nothing is trained.

    Args:
        stacks: width to float gate and up rows (E, 2M, D) and down projections (E, D, M).
        act_fn: activation of the gate.
    """

    def __init__(
        self, stacks: Mapping[int, tuple[Tensor, Tensor]], act_fn: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.widths = tuple(sorted(stacks))
        self._stacks = [stacks[bits] for bits in self.widths]
        self._act_fn = act_fn
        self._rules: tuple[Rule | None] = (None,)
        self.seen: list[Pairs] | None = None
        self.used_W = torch.zeros(len(self.widths), dtype=torch.int64)
        self.share_W: Tensor | None = None

    def follow(self, rule: Rule | None) -> None:
        """Choose by this rule from now on; None computes the widest."""
        # In a tuple: a rule that is a module is not a part of this one.
        self._rules = (rule,)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self._stacks[0][0])

    def first(self, place: int) -> Tensor:
        """Gate and up rows at a width, (E, 2M, D)."""
        return self._stacks[place][0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, (T, D)."""
        token_R, slot_R = torch.where(top_k_weights != 0)
        expert_R, weight_R = top_k_index[token_R, slot_R], top_k_weights[token_R, slot_R]
        x_RD = hidden_states[token_R]
        if self.seen is not None:
            self._observe(self.seen, x_RD, expert_R, weight_R)
        (rule,) = self._rules
        if rule is None:
            rule = FixedWidths(expert_R.new_full((self.num_experts,), len(self.widths) - 1))
        choice_R, share_RW = rule(x_RD, expert_R, weight_R)
        self.used_W += torch.bincount(choice_R[choice_R >= 0], minlength=len(self.widths))
        self.share_W = None if share_RW is None else share_RW.mean(0)
        y_RD = torch.zeros_like(x_RD)
        for expert in torch.unique(expert_R).tolist():
            for place in range(len(self.widths)):
                # A mixture's gradient needs what every width would have given.
                mine_R = expert_R == expert
                if share_RW is None:
                    mine_R = mine_R & (choice_R == place)
                rows = torch.where(mine_R & (choice_R >= 0))[0]
                if not len(rows):
                    continue
                y = self._one(x_RD[rows], expert, place)
                gain = (choice_R[rows] == place).to(y.dtype)
                if share_RW is not None:
                    share = share_RW[rows, place].to(y.dtype)
                    gain = gain + share - share.detach()
                y_RD = y_RD.index_add(0, rows, y * gain[:, None])
        y_RD = y_RD * weight_R[:, None].to(y_RD.dtype)
        return torch.zeros_like(hidden_states).index_add(0, token_R, y_RD)

    def _one(self, x: Tensor, expert: int, place: int) -> Tensor:
        gate_up, down = self._stacks[place]
        gate, up = nn.functional.linear(x, gate_up[expert]).chunk(2, dim=-1)
        return nn.functional.linear(self._act_fn(gate) * up, down[expert])

    @torch.no_grad()
    def _observe(self, seen: list[Pairs], x_RD: Tensor, expert_R: Tensor, weight_R: Tensor) -> None:
        off_RW = x_RD.new_zeros(len(x_RD), len(self.widths))
        for expert in torch.unique(expert_R).tolist():
            rows = torch.where(expert_R == expert)[0]
            y_WD = [self._one(x_RD[rows], expert, k) for k in range(len(self.widths))]
            for place, y in enumerate(y_WD):
                off_RW[rows, place] = (y - y_WD[-1]).norm(dim=-1)
        seen.append(Pairs(x_RD.detach(), expert_R, weight_R.detach(), off_RW))


def joined(parts: Sequence[Pairs]) -> Pairs:
    """Pairs of several passes as one."""
    return Pairs(*(torch.cat([getattr(p, name.name) for p in parts]) for name in fields(Pairs)))


@dataclass(frozen=True, eq=False)
class FixedWidths:
    """A width per expert, whatever the token: `choice_E` int64 (E,)."""

    choice_E: Tensor

    def __call__(self, x_RD: Tensor, expert_R: Tensor, weight_R: Tensor) -> Decision:
        """Choose."""
        return Decision(self.choice_E[expert_R])


def static_plan(
    layers: Sequence[Pairs], widths: Sequence[int], num_experts: int, mean_bits: float
) -> list[FixedWidths]:
    """A width for every expert of every layer, the least squared error for a mean over pairs.

    An expert costs its bits as often as it is chosen, and loses the weighted squared error of its
    output; the allocation is `allocate`'s.

    Args:
        layers: pairs of each layer.
        widths: ascending.
        num_experts: E.
        mean_bits: over all pairs of all layers.
    """
    table: dict[str, list[Choice]] = {}
    for i, pairs in enumerate(layers):
        for expert in range(num_experts):
            mine = pairs.expert_R == expert
            if not (count := int(mine.sum())):
                continue
            off = (pairs.weight_R[mine, None] * pairs.off_RW[mine]).double().square().sum(0)
            costs = zip(widths, off.tolist(), strict=True)
            table[f"{i}.{expert}"] = [Choice(k, k * count, loss) for k, loss in costs]
    total = sum(len(pairs.expert_R) for pairs in layers)
    found = allocate(table, int(mean_bits * total)).bits
    place = {bits: index for index, bits in enumerate(widths)}
    return [
        FixedWidths(
            torch.tensor([place[found.get(f"{i}.{e}", widths[0])] for e in range(num_experts)])
        )
        for i in range(len(layers))
    ]


class ErrorBound:
    """The narrowest width whose error stays below a bound: min {k : g |off_k(x)| <= tau}.

    How far a width is off is not computed but estimated, as DP-LLM does (arXiv 2508.06041): by a
    multiple of |x| where that line explains nine tenths of the variance of what was seen, else by
    a multiple of |G x|, G = A (W_widest - W_k) of the gate and up rows with a Gaussian A.

    Attributes:
        tau: the bound.
        bits: the widths, ascending.
        lines: how many of the E * (W - 1) estimates need no projection.
    """

    def __init__(self, experts: WidthExperts, pairs: Pairs, seed: int) -> None:
        self.tau = 0.0
        self.bits, self.lines = experts.widths, 0
        self._widths = len(experts.widths)
        generator = torch.Generator().manual_seed(seed)
        rows = experts.first(0).shape[1]
        a_PM = torch.randn(_PROJECTION, rows, generator=generator) / _PROJECTION**0.5
        self._estimates: dict[tuple[int, int], tuple[float, Tensor | None]] = {}
        for expert in range(experts.num_experts):
            mine = pairs.expert_R == expert
            x_RD, off_RW = pairs.x_RD[mine], pairs.off_RW[mine]
            for place in range(self._widths - 1):
                change = experts.first(self._widths - 1)[expert] - experts.first(place)[expert]
                slope, explained = _line(x_RD.norm(dim=-1), off_RW[:, place])
                projection = None
                if explained < _LINE_FITS:
                    projection = a_PM @ change.float()
                    slope, _ = _line((x_RD @ projection.T).norm(dim=-1), off_RW[:, place])
                self.lines += projection is None
                self._estimates[expert, place] = slope, projection

    def __call__(self, x_RD: Tensor, expert_R: Tensor, weight_R: Tensor) -> Decision:
        """Choose."""
        return Decision(self.place(self.estimate(x_RD, expert_R, weight_R), self.tau))

    @staticmethod
    def place(off_RW: Tensor, tau: float) -> Tensor:
        """The narrowest width within a bound, int64 (R,)."""
        return (off_RW > tau).int().argmin(-1)

    @torch.no_grad()
    def estimate(self, x_RD: Tensor, expert_R: Tensor, weight_R: Tensor) -> Tensor:
        """Weighted errors (R, W), made to fall with the width; the widest has none."""
        off_RW = x_RD.new_zeros(len(x_RD), self._widths)
        for expert in torch.unique(expert_R).tolist():
            rows = torch.where(expert_R == expert)[0]
            for place in range(self._widths - 1):
                slope, projection = self._estimates[expert, place]
                x = x_RD[rows] if projection is None else x_RD[rows] @ projection.T
                off_RW[rows, place] = slope * x.norm(dim=-1)
        off_RW = off_RW * weight_R[:, None].abs().to(off_RW.dtype)
        return off_RW.flip(-1).cummax(-1).values.flip(-1)


def _line(x_R: Tensor, y_R: Tensor) -> tuple[float, float]:
    """Slope of y = slope * x by least squares, and the share of y's variance it explains."""
    square = float(x_R.double().square().sum())
    if not square:
        return 0.0, 1.0
    slope = float((x_R.double() * y_R.double()).sum()) / square
    spread = float((y_R.double() - y_R.double().mean()).square().sum())
    left = float((y_R.double() - slope * x_R.double()).square().sum())
    return slope, 1.0 - left / spread if spread else float(left == 0)


# -- a bit router per expert ---------------------------------------------------------------------


@dataclass
class Capacity:
    """At most so many pairs at each width, in training; the rest of them is left out at random.

    Args:
        share: of all pairs, by place of the width.
        generator: of the choice.
    """

    share: tuple[float, ...]
    generator: torch.Generator = field(default_factory=torch.Generator)

    def limit(self, choice_R: Tensor) -> Tensor:
        """The choices with -1 where there is no room."""
        limited = choice_R.clone()
        for place, share in enumerate(self.share):
            rows = torch.where(choice_R == place)[0]
            room = int(share * len(choice_R))
            if len(rows) > room:
                order = torch.randperm(len(rows), generator=self.generator)
                limited[rows[order[room:]]] = -1
        return limited


class BitRouter(nn.Module):
    """p = softmax(V_e x + v_e) over the widths, for every expert e; the likeliest is taken.

    Attributes:
        price: log-probability that a bit costs when choosing; moves the mean number of bits.
        capacity: in training; None for no limit.

    Args:
        num_experts: E.
        width: D.
        bits: the widths, ascending.
    """

    def __init__(self, num_experts: int, width: int, bits: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, len(bits), width))
        self.bias = nn.Parameter(torch.zeros(num_experts, len(bits)))
        self.register_buffer("bits", torch.tensor(bits, dtype=torch.float32))
        self.bits: Tensor
        self.price = 0.0
        self.capacity: Capacity | None = None

    def log_share(self, x_RD: Tensor, expert_R: Tensor) -> Tensor:
        """Log-probabilities (R, W); inputs count in units of their own size."""
        x_RD = x_RD / x_RD.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        logits_RW = torch.einsum("rd,rwd->rw", x_RD, self.weight[expert_R]) / x_RD.shape[-1] ** 0.5
        return torch.log_softmax(logits_RW + self.bias[expert_R], dim=-1)

    def place(self, log_RW: Tensor, price: float) -> Tensor:
        """The likeliest width at a price of a bit, int64 (R,)."""
        return (log_RW - price * self.bits).argmax(-1)

    def forward(self, x_RD: Tensor, expert_R: Tensor, weight_R: Tensor) -> Decision:
        """Choose."""
        log_RW = self.log_share(x_RD, expert_R)
        choice_R = self.place(log_RW.detach(), self.price)
        if not (self.training and torch.is_grad_enabled()):
            return Decision(choice_R)
        if self.capacity is not None:
            choice_R = self.capacity.limit(choice_R)
        return Decision(choice_R, log_RW.exp())


# -- the same mean for all -----------------------------------------------------------------------


def set_bound(
    rules: Sequence[ErrorBound], layers: Sequence[Pairs], mean_bits: float
) -> Sequence[Rule]:
    """Give all layers the smallest bound at which the pairs that were seen keep to a mean.

    Args:
        rules: of the layers.
        layers: what they saw.
        mean_bits: over all pairs.
    """
    off_RW = torch.cat(
        [r.estimate(p.x_RD, p.expert_R, p.weight_R) for r, p in zip(rules, layers, strict=True)]
    )
    bits, place = torch.tensor(rules[0].bits), partial(rules[0].place, off_RW)
    tau = _smallest(place, bits, mean_bits, float(off_RW.max()))
    for rule in rules:
        rule.tau = tau
    return rules


@torch.no_grad()
def set_price(
    rules: Sequence[BitRouter], layers: Sequence[Pairs], mean_bits: float
) -> Sequence[Rule]:
    """Give all bit routers the smallest price at which the pairs that were seen keep to a mean.

    Args:
        rules: of the layers.
        layers: what they saw.
        mean_bits: over all pairs.
    """
    seen = zip(rules, layers, strict=True)
    log_RW = torch.cat([rule.log_share(pairs.x_RD, pairs.expert_R) for rule, pairs in seen])
    most, place = float(log_RW.abs().max()) + 1.0, partial(rules[0].place, log_RW)
    price = _smallest(place, rules[0].bits, mean_bits, most, -most)
    for rule in rules:
        rule.price = price
    return rules


def _smallest(
    place: Callable[[float], Tensor],
    bits_W: Tensor,
    wanted: float,
    high: float,
    low: float = 0.0,
) -> float:
    """Where the mean width, which falls, comes down to what is wanted, by halving."""

    def mean(knob: float) -> float:
        return float(bits_W[place(knob)].double().mean())

    if mean(low) <= wanted:
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if mean(middle) <= wanted else (middle, high)
    return high
