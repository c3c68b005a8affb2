"""Windows that the dense model writes itself, beside the calibration windows of real text.

Hessians of few windows are noisy, and the block stage and the tuning, which go over them many
times, learn what is peculiar to these windows. What the model writes at temperature 1 has the
model's own distribution, which is what shall be kept, and costs no text (LLM-QAT, arXiv 2305.17888,
section 3.1).

Shapes: N windows, S tokens per window, B windows written at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fissile.io.units import UnitStore
from fissile.models.configuration_fissile import FissileConfig
from fissile.models.source import load_source
from fissile.models.stream import StateSource
from fissile.refactor.training import Progress

_PROMPT = 32
"""Tokens of real text that a window starts with."""
CACHE_BYTES = 1 << 30
"""Keys and values of the windows that are written at once."""
MOST_WINDOWS = 64


def with_generated(
    source: StateSource,
    ids_NS: Tensor,
    times: int,
    seed: int,
    store: UnitStore,
    progress: Progress,
) -> Tensor:
    """Calibration windows, and after them `times` as many that the model writes.

    A written window has the first token of a given one, a run of its text from a random place, and
    what the model makes of that, without an end of text. The whole model is held in bfloat16 while
    it writes.

    Args:
        source: the dense model.
        ids_NS: int64 windows without padding.
        times: windows to write for each of them; 0 gives them back.
        seed: of places and tokens.
        store: written windows are kept here, and not written again.
        progress: called as (stage, done, total, detail), in windows.

    Returns:
        int64 (N * (1 + times), S).
    """
    if not times:
        return ids_NS
    prompts_NS = _prompts(ids_NS.repeat(times, 1), seed)
    parts = prompts_NS.split(_at_once(source.config, ids_NS.shape[1]))
    units = [f"written_{i:03d}" for i in range(len(parts))]
    kept = [store.load(unit)[0]["ids"] for unit in units if store.has(unit)]
    written = [ids_NS, *kept]
    if len(kept) < len(parts):
        progress("generate", sum(map(len, kept)), len(prompts_NS), "windows")
        model = load_source(source, torch.bfloat16)
        for i in range(len(kept), len(parts)):
            with torch.random.fork_rng():
                torch.manual_seed(seed + i)
                ids_BS = model.generate(
                    parts[i],
                    attention_mask=torch.ones_like(parts[i]),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    min_length=ids_NS.shape[1],
                    max_length=ids_NS.shape[1],
                    pad_token_id=0,
                )
            store.save(units[i], {"ids": ids_BS})
            written.append(ids_BS)
            progress("generate", sum(map(len, parts[: i + 1])), len(prompts_NS), "windows")
    return torch.cat(written)


def _prompts(ids_NS: Tensor, seed: int) -> Tensor:
    """First token of every window, and a run of it from a random place."""
    count, length = ids_NS.shape
    run = min(_PROMPT, length // 2)
    rng = torch.Generator().manual_seed(seed)
    start_N1 = torch.randint(0, length - run + 1, (count, 1), generator=rng)
    return torch.cat([ids_NS[:, :1], ids_NS.gather(1, start_N1 + torch.arange(run))], dim=1)


def _at_once(config: FissileConfig, length: int) -> int:
    """Windows whose keys and values fit in `CACHE_BYTES`."""
    heads = config.num_key_value_heads or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * 2 * config.num_base_layers * heads * size
    return max(1, min(MOST_WINDOWS, CACHE_BYTES // (token * length)))
