"""Every token's experts at a width of its own: the sum, plans, rules, routers, capacities."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.quant.layers import weight
from torch import Tensor

from fissile.quant.baselines import rtn
from fissile.quant.token_widths import (
    BitRouter,
    Capacity,
    Decision,
    ErrorBound,
    FixedWidths,
    Pairs,
    WidthExperts,
    joined,
    set_bound,
    set_price,
    static_plan,
)

E, M, D, K, T = 4, 32, 64, 2, 48
WIDTHS = (2, 3, 4)


@pytest.fixture
def experts() -> WidthExperts:
    rows, down = weight(E, 2 * M, D, seed=1) * 10, weight(E, D, M, seed=2) * 10
    stacks = {k: (rtn(rows, k, 32).dequantize(k), rtn(down, k, 32).dequantize(k)) for k in WIDTHS}
    return WidthExperts(stacks, torch.nn.functional.silu)


def tokens(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of sizes that vary, two experts each, weights; some slots are empty."""
    rng = torch.Generator().manual_seed(seed)
    size = torch.rand(T, 1, generator=rng) * 3 + 0.2
    x_TD = torch.randn(T, D, generator=rng) * size
    index_TK = torch.rand(T, E, generator=rng).argsort(-1)[:, :K]
    weights_TK = torch.rand(T, K, generator=rng) + 0.1
    weights_TK[::7, 1] = 0
    return x_TD, index_TK, weights_TK


def output(experts: WidthExperts, x: Tensor, expert: int, place: int) -> Tensor:
    """One expert for one token, in float64."""
    gate_up, down = (stack[expert].double() for stack in experts._stacks[place])
    gate, up = (gate_up @ x.double()).chunk(2)
    return down @ (torch.nn.functional.silu(gate) * up)


def seen(experts: WidthExperts, seed: int = 0) -> Pairs:
    experts.seen = []
    experts.follow(None)
    experts(*tokens(seed))
    pairs, experts.seen = joined(experts.seen), None
    return pairs


class Given:
    """Choices from a list."""

    def __init__(self, choice_R: Tensor) -> None:
        self.choice_R = choice_R

    def __call__(self, x_RD: Tensor, expert_R: Tensor, weight_R: Tensor) -> Decision:
        return Decision(self.choice_R)


def test_every_pair_is_computed_at_its_own_width(experts: WidthExperts) -> None:
    x_TD, index_TK, weights_TK = tokens()
    pairs = [(t, s) for t in range(T) for s in range(K) if weights_TK[t, s]]
    choice_R = torch.randint(-1, 3, (len(pairs),), generator=torch.Generator().manual_seed(3))
    experts.follow(Given(choice_R))
    expected = torch.zeros(T, D, dtype=torch.float64)
    for (t, s), place in zip(pairs, choice_R.tolist(), strict=True):
        if place >= 0:
            y = output(experts, x_TD[t], int(index_TK[t, s]), place)
            expected[t] += weights_TK[t, s].double() * y
    found = experts(x_TD, index_TK, weights_TK)
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert expected.norm() > 1
    assert experts.used_W.tolist() == [int((choice_R == k).sum()) for k in range(3)]


def test_what_is_seen_is_how_far_each_width_is_off(experts: WidthExperts) -> None:
    pairs = seen(experts)
    for r in (0, 17, len(pairs.expert_R) - 1):
        expert = int(pairs.expert_R[r])
        widest = output(experts, pairs.x_RD[r], expert, 2)
        for place in range(3):
            off = (output(experts, pairs.x_RD[r], expert, place) - widest).norm()
            assert float(pairs.off_RW[r, place]) == pytest.approx(float(off), rel=1e-3, abs=1e-5)


def test_the_static_plan_is_the_best_of_all_plans(experts: WidthExperts) -> None:
    """Against every plan of four experts: none with as few bits loses less, up to a last step."""
    pairs = seen(experts)
    count_E = torch.bincount(pairs.expert_R, minlength=E)
    square_RW = (pairs.weight_R[:, None] * pairs.off_RW).double().square()
    loss_EW = torch.zeros(E, 3, dtype=torch.float64).index_add(0, pairs.expert_R, square_RW)
    bits = torch.tensor(WIDTHS)
    experts_E = torch.arange(E)

    def cost(choice_E: Tensor) -> tuple[float, float]:
        return float(bits[choice_E] @ count_E) / len(pairs.expert_R), float(
            loss_EW[experts_E, choice_E].sum()
        )

    for wanted in (2.3, 2.5, 3.0, 3.4):
        (plan,) = static_plan([pairs], WIDTHS, E, wanted)
        used, loss = cost(plan.choice_E)
        assert used <= wanted
        assert wanted - used < 0.6
        plans = [torch.tensor(p) for p in itertools.product(range(3), repeat=E)]
        best = min(b for a, b in map(cost, plans) if a <= used)
        assert loss == pytest.approx(best)
    assert loss < 0.5 * float(loss_EW[:, 0].sum())


def test_a_line_is_taken_where_it_explains_the_error(experts: WidthExperts) -> None:
    pairs = seen(experts)
    straight = Pairs(
        pairs.x_RD,
        pairs.expert_R,
        pairs.weight_R,
        pairs.x_RD.norm(dim=-1, keepdim=True) * torch.tensor([0.5, 0.25, 0.0]),
    )
    rule = ErrorBound(experts, straight, 0)
    assert rule.lines == E * 2
    found = rule.estimate(pairs.x_RD, pairs.expert_R, pairs.weight_R)
    assert torch.allclose(found, straight.off_RW * pairs.weight_R[:, None], rtol=1e-4)
    # An error that ignores the size of the input is no line through the origin.
    rng = torch.Generator().manual_seed(1)
    rough = torch.rand(len(pairs.x_RD), 3, generator=rng)
    other = Pairs(pairs.x_RD, pairs.expert_R, pairs.weight_R, rough)
    assert ErrorBound(experts, other, 0).lines == 0
    # A narrow width that seems nearer than a wider one counts as far off as that.
    turned = Pairs(pairs.x_RD, pairs.expert_R, pairs.weight_R, straight.off_RW[:, [1, 0, 2]])
    found = ErrorBound(experts, turned, 0).estimate(pairs.x_RD, pairs.expert_R, pairs.weight_R)
    assert torch.allclose(found[:, 0], found[:, 1])
    assert torch.allclose(found[:, 1], straight.off_RW[:, 0] * pairs.weight_R, rtol=1e-4)


def test_the_estimate_follows_the_true_error(experts: WidthExperts) -> None:
    pairs, fresh = seen(experts), seen(experts, seed=5)
    rule = ErrorBound(experts, pairs, 0)
    found = rule.estimate(fresh.x_RD, fresh.expert_R, fresh.weight_R)
    true = fresh.off_RW * fresh.weight_R[:, None]
    for place in range(2):
        both = torch.stack([found[:, place], true[:, place]])
        assert float(torch.corrcoef(both)[0, 1]) > 0.8
    assert (found.diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("wanted", [2.0, 2.4, 3.0, 4.0])
def test_a_mean_is_met_by_all_rules(experts: WidthExperts, wanted: float) -> None:
    pairs = seen(experts)
    bits = torch.tensor(WIDTHS).double()
    router = BitRouter(E, D, WIDTHS).eval()
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(4))
    step = 2 / len(pairs.expert_R)
    for rule in (
        *set_bound([ErrorBound(experts, pairs, 0)], [pairs], wanted),
        *set_price([router], [pairs], wanted),
    ):
        choice_R, _ = rule(pairs.x_RD, pairs.expert_R, pairs.weight_R)
        mean = float(bits[choice_R].mean())
        assert mean <= wanted
        assert wanted - mean <= step
    # Errors above the bound are not accepted, and no width is wider than it has to be.
    bound = ErrorBound(experts, pairs, 0)
    set_bound([bound], [pairs], 3.0)
    off = bound.estimate(pairs.x_RD, pairs.expert_R, pairs.weight_R)
    choice_R, _ = bound(pairs.x_RD, pairs.expert_R, pairs.weight_R)
    rows = torch.arange(len(choice_R))
    assert (off[rows, choice_R] <= bound.tau).all()
    wider = choice_R > 0
    assert (off[rows, choice_R - 1] > bound.tau)[wider].all()


def test_the_routers_gradient_is_that_of_a_mixture(experts: WidthExperts) -> None:
    x_TD, index_TK, weights_TK = tokens()
    target = torch.randn(T, D, generator=torch.Generator().manual_seed(9))
    router = BitRouter(E, D, WIDTHS)
    with torch.no_grad():
        router.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(4))
    experts.follow(router)
    found = experts(x_TD, index_TK, weights_TK)
    (found * target).sum().backward()
    experts.follow(router.eval())
    assert torch.allclose(found, experts(x_TD, index_TK, weights_TK), atol=1e-5)
    token_R, slot_R = torch.where(weights_TK != 0)
    expert_R = index_TK[token_R, slot_R]
    wanted = torch.zeros_like(router.bias, dtype=torch.float64)
    share_RW = router.log_share(x_TD[token_R], expert_R).exp().double().detach()
    for r, (t, e) in enumerate(zip(token_R.tolist(), expert_R.tolist(), strict=True)):
        gain = weights_TK[t, slot_R[r]].double() * target[t].double()
        value_W = torch.stack([gain @ output(experts, x_TD[t], e, k) for k in range(3)])
        # d softmax: p (v - p.v), by the logits.
        wanted[e] += share_RW[r] * (value_W - share_RW[r] @ value_W)
    assert router.bias.grad is not None
    assert torch.allclose(router.bias.grad.double(), wanted, rtol=1e-3, atol=1e-3)
    assert wanted.norm() > 1
    assert router.weight.grad is not None
    assert math.isfinite(float(router.weight.grad.norm()))


def test_a_capacity_leaves_out_what_is_too_much() -> None:
    choice_R = torch.tensor([0] * 70 + [1] * 20 + [2] * 10)
    generator = torch.Generator().manual_seed(0)
    limited = Capacity((0.3, 0.4, 0.05), generator).limit(choice_R)
    assert [int((limited == k).sum()) for k in range(-1, 3)] == [45, 30, 20, 5]
    assert (limited[limited >= 0] == choice_R[limited >= 0]).all()
    kept = torch.where(limited[:70] == 0)[0]
    # Chance decides, not the place.
    assert kept.max() > 40
    assert not torch.equal(kept, torch.arange(30))


def test_a_router_in_training_minds_its_capacity(experts: WidthExperts) -> None:
    router = BitRouter(E, D, WIDTHS)
    router.capacity = Capacity((0.25, 1.0, 1.0), torch.Generator().manual_seed(0))
    x_TD, index_TK, weights_TK = tokens()
    expert_R, weight_R = index_TK[:, 0], weights_TK[:, 0]
    choice_R, share_RW = router(x_TD, expert_R, weight_R)
    # Untrained, all ties go to the narrowest.
    assert int((choice_R == 0).sum()) == T // 4
    assert int((choice_R == -1).sum()) == T - T // 4
    assert torch.allclose(share_RW, torch.full_like(share_RW, 1 / 3))
    router.eval()
    assert (router(x_TD, expert_R, weight_R).choice_R == 0).all()


def test_fixed_widths_look_up_the_expert() -> None:
    rule = FixedWidths(torch.tensor([2, 0, 1, 2]))
    expert_R = torch.tensor([3, 1, 1, 0, 2])
    assert rule(torch.zeros(5, 1), expert_R, torch.ones(5)).choice_R.tolist() == [2, 0, 0, 2, 1]
