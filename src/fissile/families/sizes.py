"""Sizes of shared and routed experts, and of quantization groups; the only place for both rules."""

from __future__ import annotations

from dataclasses import dataclass

from fissile.errors import RecipeError

SMALLEST_GROUP = 32
"""Smaller groups would cost more bits in floats than they save in error."""


@dataclass(frozen=True)
class ExpertSizes:
    """How the neurons of a layer are divided.

    Args:
        shared: neurons that are always computed, S.
        expert: neurons of a routed expert, M.
        num_experts: routed experts, E; S + E*M is the FFN width.
        active_share: (S + K*M) / F with whole experts, which is what a token costs.
    """

    shared: int
    expert: int
    num_experts: int
    active_share: float


def expert_sizes(
    ffn: int, num_experts: int, top_k: int, active_share: float, multiple: int
) -> ExpertSizes:
    """Divide F neurons into S shared ones and E experts of M, so that a token computes about a*F.

    S + E*M = F and S + K*M = a*F give M = F*(1 - a)/(E - K), rounded to a multiple (at least one)
    and cut so that S stays non-negative; S takes what is left.

    Args:
        ffn: FFN width F in neurons.
        num_experts: routed experts E.
        top_k: experts chosen per token, K.
        active_share: wanted share a of the neurons computed for a token, in (0, 1].
        multiple: M is a multiple of this many neurons.

    Raises:
        RecipeError: no such division; the message holds the arithmetic and a way out.
    """
    wanted = f"active_share {active_share:g} with top_k {top_k} of num_experts {num_experts}"
    if not 1 <= top_k <= num_experts:
        raise RecipeError(f"extract: top_k {top_k} must be between 1 and num_experts {num_experts}")
    largest = ffn // num_experts // multiple * multiple
    if largest < multiple:
        raise RecipeError(
            f"extract: {num_experts} experts of at least {multiple} neurons need "
            f"{num_experts * multiple}, the FFN has {ffn}; lower num_experts or multiple"
        )
    if (top_k == num_experts) != (active_share == 1):
        raise RecipeError(
            f"extract: {wanted} contradict each other: all neurons are computed exactly when all "
            "experts are chosen; lower both active_share and top_k, or neither"
        )
    if top_k == num_experts:
        expert = largest
    else:
        exact = ffn * (1 - active_share) / (num_experts - top_k)
        # Half a unit of slack: with whole multiples the wanted share can be missed by that much.
        if exact > largest + multiple / 2:
            lowest = 1 - largest * (num_experts - top_k) / ffn
            raise RecipeError(
                f"extract: {wanted} needs experts of {ffn} * {1 - active_share:g} / "
                f"{num_experts - top_k} = {exact:.0f} neurons, but {num_experts} of them fit into "
                f"{ffn} only up to {largest}; raise active_share to {lowest:.3f} or lower top_k"
            )
        expert = min(max(multiple, round(exact / multiple) * multiple), largest)
    shared = ffn - num_experts * expert
    return ExpertSizes(shared, expert, num_experts, (shared + top_k * expert) / ffn)


def fitting_group(inputs: int, preferred: int) -> int | None:
    """Largest group size that divides a weight's input width: `preferred`, or it halved repeatedly.

    Returns:
        None when not even groups of 32 fit.
    """
    group = preferred
    while group >= SMALLEST_GROUP:
        if inputs % group == 0:
            return group
        group //= 2
    return None
