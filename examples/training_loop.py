"""Fissile inside your own training loop: route one FFN, train its router, store it in nested bits.

Runs on a CPU in a few seconds:  python examples/training_loop.py
T tokens, D model width, F FFN width, E routed experts, K chosen per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fissile import quant, refactor

D, F, E, K = 64, 256, 4, 2


def neurons(gate_FD: Tensor, up_FD: Tensor, x_TD: Tensor) -> Tensor:
    """Activations of a gated FFN."""
    return nn.functional.silu(x_TD @ gate_FD.T) * (x_TD @ up_FD.T)


def main() -> None:
    """Convert a random FFN whose inputs come in four kinds, and print what each step achieves."""
    rng = torch.Generator().manual_seed(0)
    kinds = torch.randn(4, D, generator=rng) * 2
    label_T = torch.randint(0, 4, (4096,), generator=rng)
    x_TD = kinds[label_T] + torch.randn(4096, D, generator=rng) * 0.7
    gate_FD, up_FD, down_DF = (
        torch.randn(*shape, generator=rng) / shape[1] ** 0.5 for shape in ((F, D), (F, D), (D, F))
    )
    h_TF = neurons(gate_FD, up_FD, x_TD)
    y_TD = h_TF @ down_DF.T

    # 1. Statistics, then 64 shared neurons and four experts of 48.
    stats = refactor.NeuronStatistics(down_DF.norm(dim=0), domains=4, sketch_dim=32, seed=0)
    stats.add(h_TF, label_T, torch.arange(len(x_TD)))
    features_FQ = stats.features(of="signed", centred=False)
    partition = refactor.partition_neurons(
        stats.score("energy"), features_FQ, shared_size=64, num_experts=E, seed=0
    )

    # 2. A linear router, trained in an ordinary loop towards the oracle's choice.
    norms_TE = refactor.expert_norms(h_TF, down_DF, partition)
    router = nn.Linear(D, E)
    optimiser = torch.optim.AdamW(router.parameters(), lr=1e-2)
    for step in range(200):
        pick = torch.randint(0, len(x_TD), (512,), generator=rng)
        target_TE = torch.softmax(norms_TE[pick] / norms_TE.std(), dim=-1)
        loss = nn.functional.cross_entropy(router(x_TD[pick]), target_TE)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 100 == 0:
            print(f"step {step:3d}  router loss {loss.item():.3f}")

    # 3. What the choice costs: the routed FFN against the dense one.
    def error(scores_TE: Tensor) -> float:
        chosen = scores_TE.topk(K, dim=-1).indices
        keep_TF = torch.zeros_like(h_TF)
        keep_TF[:, partition.shared] = 1
        for e, index in enumerate(partition.experts_EM):
            keep_TF[:, index] = (chosen == e).any(-1, keepdim=True).float()
        return float(((h_TF * keep_TF) @ down_DF.T - y_TD).norm() / y_TD.norm())

    blind = torch.rand(norms_TE.shape, generator=rng)
    with torch.no_grad():
        rows = {"random": blind, "router": router(x_TD), "oracle": norms_TE}
    for name, scores in rows.items():
        print(f"{name:7s} relative error {error(scores):.3f}")

    # 4. One integer code, three widths.
    nested = quant.solve(down_DF, h_TF.T @ h_TF / len(h_TF), widths=(2, 3, 4), group_size=64)
    for bits in nested.widths:
        got_TD = h_TF @ nested.dequantize(bits).T
        print(f"{bits} bits   relative error {float((got_TD - y_TD).norm() / y_TD.norm()):.3f}")


if __name__ == "__main__":
    main()
