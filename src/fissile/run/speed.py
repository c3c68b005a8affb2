"""What a routed, a pruned or a quantized model can gain in speed, by formula. Loads no torch.

Arithmetic and bytes outside the FFN stay; phi is the share of the FFN in them, a the active share
of the FFN, s its always computed part, k of n experts are chosen, B tokens share a batch:

    limited by arithmetic   S = 1 / (1 - phi (1 - a))
    limited by memory       S = 1 / (1 - phi (1 - s - (1 - s) (1 - (1 - k/n)^B)))

The second takes the choices of the batch's tokens as independent and even: skewed or repeated
choices touch fewer experts. Upper bounds both: the router, kernels and caches cost something too.
"""

from __future__ import annotations

from fissile.run.metrics_routing import Division, Weights

BATCHES = (1, 4, 8, 64)
"""Batch sizes of the report's calculator."""
CONTEXT = 2048
"""Tokens of context at which the arithmetic of attention scores is counted."""
FORMULAE = (
    "limited by arithmetic S = 1/(1 - φ(1 - a)), by memory"
    " S = 1/(1 - φ[1 - s - (1 - s)(1 - (1 - k/n)^B)])"
)


def ffn_share_of_bytes(weights: Weights) -> float:
    """phi of a decoding step limited by memory: every weight is read once, embeddings by the row.

    Args:
        weights: of the dense model.
    """
    return weights.ffn / (weights.ffn + weights.attention + weights.head)


def ffn_share_of_arithmetic(weights: Weights, context: int = CONTEXT) -> float:
    """phi of the multiplications per token: scores of a causal context of this length included.

    A token multiplies each weight once; queries and values meet half the context in the mean.

    Args:
        weights: of the dense model.
        context: tokens per sequence.
    """
    scores = weights.query * context
    return weights.ffn / (weights.ffn + weights.attention + weights.head + scores)


def touched_share(shared: float, chosen: float, batch: int) -> float:
    """Expected share of the FFN that a batch reads: s + (1 - s)(1 - (1 - k/n)^B).

    Args:
        shared: s, share of neurons always computed.
        chosen: k/n, share of the routed experts that a token chooses.
        batch: B, tokens whose choices are independent.

    Raises:
        ValueError: a share outside 0..1, or no token.
    """
    if not (0 <= shared <= 1 and 0 <= chosen <= 1 and batch >= 1):
        raise ValueError(f"shared {shared}, chosen {chosen}, batch {batch}")
    return shared + (1 - shared) * (1 - (1 - chosen) ** batch)


def speedup(phi: float, remaining: float) -> float:
    """1 / (1 - phi (1 - remaining)).

    Args:
        phi: share of the FFN in the arithmetic or in the bytes, 0..1.
        remaining: share of the FFN that is still computed or read, 0..1.

    Raises:
        ValueError: a share outside 0..1, or nothing remains at all.
    """
    cost = 1 - phi * (1 - remaining)
    if not (0 <= phi <= 1 and 0 <= remaining <= 1) or cost <= 0:
        raise ValueError(f"phi {phi}, remaining {remaining}")
    return 1 / cost


def routed_speedup(weights: Weights, division: Division, batch: int | None) -> float:
    """Bound on the speed-up of a routed model over the dense one, both in 16-bit weights.

    Args:
        weights: of the dense model.
        division: of its FFN.
        batch: tokens per step, limited by memory; None: limited by arithmetic.
    """
    if batch is None:
        return speedup(ffn_share_of_arithmetic(weights), division.share)
    chosen = division.top_k / division.num_experts
    touched = touched_share(division.shared, chosen, batch)
    return speedup(ffn_share_of_bytes(weights), touched)


def static_speedup(weights: Weights, share: float, batch: int | None) -> float:
    """The same for a pruned model, which reads as much at any batch size."""
    phi = ffn_share_of_arithmetic(weights) if batch is None else ffn_share_of_bytes(weights)
    return speedup(phi, share)


def quantized_speedup(
    weights: Weights,
    loaded_bytes: int,
    bits_per_weight: float,
    division: Division | None,
    batch: int | None,
) -> float:
    """The same for weights that are stored in fewer bits and computed in floats.

    Args:
        weights: of the dense model; it is read in 16 bits.
        loaded_bytes: what a load of the quantized model holds.
        bits_per_weight: of its quantized weights, floats included.
        division: of the FFN, if it is routed.
        batch: tokens per step, limited by memory; None: limited by arithmetic.
    """
    if batch is None:
        share = 1.0 if division is None else division.share
        return speedup(ffn_share_of_arithmetic(weights), share)
    touched = 1.0
    if division is not None:
        touched = touched_share(division.shared, division.top_k / division.num_experts, batch)
    idle = weights.ffn * bits_per_weight / 8 * (1 - touched)
    read = loaded_bytes - 2 * weights.embedding - idle
    return 2 * (weights.ffn + weights.attention + weights.head) / read
