"""Windows in a file are the windows that were written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fissile.quant.spill import Windows


@pytest.mark.parametrize("seed", range(4))
def test_a_file_holds_what_memory_holds(tmp_path: Path, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x_NSD = torch.randn(11, 3, 5, generator=rng)
    held, filed = Windows.of(x_NSD), Windows.of(x_NSD, tmp_path)
    assert len(filed) == 11
    for _ in range(5):
        begin, end = sorted(torch.randint(0, 12, (2,), generator=rng).tolist())
        part = slice(begin, min(end + 1, 11))
        new = torch.randn(part.stop - part.start, 3, 5, generator=rng)
        held[part] = filed[part] = new
        chosen = torch.randint(0, 11, (6,), generator=rng)
        assert torch.equal(filed[chosen], held[chosen])
        assert torch.equal(filed[part], new)
    assert torch.equal(filed[slice(0, 11)], held[slice(0, 11)])
    assert not torch.equal(held[slice(0, 11)], x_NSD)


def test_the_file_has_no_name(tmp_path: Path) -> None:
    windows = Windows((4, 2, 3), tmp_path)
    windows[slice(0, 4)] = torch.ones(4, 2, 3)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="4 windows ends early"):
        Windows((4, 2, 3), tmp_path)[slice(0, 4)]
