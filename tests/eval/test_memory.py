"""Peak memory: an allocation is seen, an earlier and higher one is forgotten."""

from __future__ import annotations

import pytest
import torch

from fissile.eval import memory


def test_working_memory_sees_an_allocation() -> None:
    device = torch.device("cpu")
    before = memory.reset_peak(device)
    if before is None:
        pytest.skip("this system does not count")
    size, found = 400 * 64_000, []
    torch.ones(64_000_000).sum()  # an earlier and higher mark, to be forgotten
    for _ in range(2):
        # The second time the memory was freed: kept back, it would be used again unseen.
        before = memory.reset_peak(device)
        blocks = [torch.ones(16_000) for _ in range(400)]
        grown = memory.growth(before, device)
        assert before is not None
        assert grown is not None
        found.append(grown)
        guard = blocks[-1]
        del blocks
    assert 0.9 * size < found[1] < 2 * size
    assert 0.9 * size < found[0]
    assert guard.nbytes == 64_000
