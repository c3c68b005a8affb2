"""The teacher's top logits and the loss towards them, against float64 formulas and autograd."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fissile.io.units import UnitStore
from fissile.refactor.teacher import Targets, Teacher, distill_loss, top_targets

VOCAB, BATCH, TOKENS = 60, 3, 5


def logits(seed: int, scale: float = 1.5) -> tuple[Tensor, Tensor, Tensor]:
    """Teacher and student logits (T, V) in float64, and the tokens they follow."""
    rng = torch.Generator().manual_seed(seed)
    shape = (BATCH * TOKENS, VOCAB)
    teacher, student = (
        scale * torch.randn(shape, generator=rng, dtype=torch.float64) for _ in range(2)
    )
    return teacher, student, torch.randint(0, VOCAB, (BATCH, TOKENS), generator=rng)


def full_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    log_p = torch.log_softmax(teacher / temperature, -1)
    log_q = torch.log_softmax(student / temperature, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2


def loss_of(student: Tensor, targets: Targets | None, ids: Tensor, **kind: float) -> Tensor:
    return distill_loss(student.view(BATCH, TOKENS, VOCAB), targets, ids, **kind)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_classes_give_the_full_divergence_and_fewer_never_more(temperature: float) -> None:
    for seed in range(5):
        teacher, student, ids = logits(seed)
        expected = full_kl(teacher, student, temperature)
        below = torch.tensor(0.0, dtype=torch.float64)
        for k in (1, 4, 16, 40):
            targets = top_targets(teacher, k, temperature)
            got = loss_of(student, targets, ids, temperature=temperature)
            assert below - 1e-12 <= got <= expected + 1e-12
            below = got
        assert below < expected
        for k in (VOCAB, 0):
            targets = top_targets(teacher, k, temperature)
            got = loss_of(student, targets, ids, temperature=temperature)
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [1, 7, 0])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("kd_weight", [1.0, 0.4])
def test_value_and_gradient_equal_a_plain_reference(
    k: int, temperature: float, kd_weight: float
) -> None:
    teacher, student, ids = logits(11)
    student.requires_grad_(True)
    targets = top_targets(teacher, k, temperature)
    got = loss_of(student, targets, ids, kd_weight=kd_weight, temperature=temperature)
    (slope,) = torch.autograd.grad(3 * got, student)
    # Explicit classes: the stored ones, and one bucket for the others.
    p, q = (torch.softmax(x / temperature, -1) for x in (teacher, student))
    kl = torch.zeros((), dtype=torch.float64)
    for row in range(len(p)):
        kept = targets.index_TK[row].tolist()
        others = [v for v in range(VOCAB) if v not in kept]
        groups = [[v] for v in kept] + ([others] if others else [])
        for group in groups:
            a, b = p[row, group].sum(), q[row, group].sum()
            kl = kl + a * (a.log() - b.log()) / len(p)
    guess = student.view(BATCH, TOKENS, VOCAB)[:, :-1].flatten(0, 1)
    ce = nn.functional.cross_entropy(guess, ids[:, 1:].flatten())
    expected = kd_weight * temperature**2 * kl + (1 - kd_weight) * ce
    (wanted,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(slope, wanted, rtol=1e-9, atol=1e-12)
    assert float(wanted.abs().max()) > 1e-3


def test_text_loss_alone_needs_no_teacher() -> None:
    _, student, ids = logits(2)
    guess = student.view(BATCH, TOKENS, VOCAB)[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(guess, ids[:, 1:].flatten())
    got = loss_of(student, None, ids, kd_weight=0.0)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"kd_weight 0\.5"):
        loss_of(student, None, ids, kd_weight=0.5)


def test_peaked_distributions_leave_finite_losses() -> None:
    """A tail of 1e-20 or one that underflows, on either side."""
    teacher, student, ids = logits(3, scale=60.0)
    low = student.float().requires_grad_(True)
    got = loss_of(low, top_targets(teacher.float(), 2), ids)
    (slope,) = torch.autograd.grad(got, low)
    exact = loss_of(student, top_targets(teacher, 2), ids)
    assert torch.isfinite(slope).all()
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-4)


class Model(nn.Module):
    """Logits that depend on the tokens; counts the windows it has read."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(7)
        self.table = 2 * torch.randn(VOCAB, VOCAB, generator=rng)
        self.read = 0

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        self.read += len(input_ids)
        return SimpleNamespace(logits=self.table[input_ids])


def test_targets_are_computed_once_and_found_again_on_disk(tmp_path: Path) -> None:
    ids = torch.randint(0, VOCAB, (9, TOKENS), generator=torch.Generator().manual_seed(1))
    model = Model()

    def made(store: UnitStore | None, **how: Any) -> Teacher:
        teacher = Teacher(model, ids, top_k=8, store=store, batch_tokens=2 * TOKENS, **how)
        teacher.size = 4  # three units
        return teacher

    first = made(UnitStore(tmp_path))
    windows = torch.tensor([6, 1])
    got = first(windows)
    # Only the units that were touched: windows 0..3 and 4..7.
    assert model.read == 8
    plain = top_targets(model.table[ids[windows]].flatten(0, 1), 8)
    assert torch.equal(got.index_TK.long(), plain.index_TK)
    torch.testing.assert_close(got.log_p_TK.float(), plain.log_p_TK, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.rest_T, plain.rest_T, rtol=1e-6, atol=1e-6)
    again = made(UnitStore(tmp_path))
    found = again(torch.arange(9))
    assert model.read == 9
    kept = made(None)(torch.arange(9))
    assert model.read == 18
    for name in ("log_p_TK", "index_TK", "rest_T"):
        assert torch.equal(getattr(found, name), getattr(kept, name))
    # Another temperature is another unit; without storing, every question is a forward pass.
    made(UnitStore(tmp_path), temperature=2.0)(windows)
    assert model.read == 26
    live = Teacher(model, ids, top_k=0)
    live(windows)
    assert live(windows).log_p_TK.shape == (2 * TOKENS, VOCAB)
    assert model.read == 30


def test_stored_targets_cost_next_to_nothing_in_the_loss() -> None:
    ids = torch.randint(0, VOCAB, (BATCH, TOKENS), generator=torch.Generator().manual_seed(4))
    model = Model()
    _, student, _ = logits(8)
    stored = Teacher(model, ids, top_k=8)(torch.arange(BATCH))
    exact = top_targets(model.table[ids].flatten(0, 1), 8)
    got, expected = (loss_of(student.float(), t, ids) for t in (stored, exact))
    assert expected > 0.5
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=0)
