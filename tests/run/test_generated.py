"""Text that the dense model writes to be quantized on: its own distribution, seeded, kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.run.test_plan import LLAMA_7B, sparse
from torch import Tensor

from fissile.config import Quantize
from fissile.io.units import UnitStore
from fissile.models.source import CheckpointSource, load_source
from fissile.run import generated as generated_module
from fissile.run.costs import COSTS, StageCost
from fissile.run.generated import with_generated
from fissile.run.pipeline import quantize_checkpoint, quantize_recipe
from fissile.run.plan import make_plan
from fissile.run.solving import Job

WINDOWS, LENGTH, PROMPT = 6, 160, 32


@pytest.fixture(scope="module")
def source(demo_model: Path) -> CheckpointSource:
    return CheckpointSource(demo_model)


@pytest.fixture(scope="module")
def text_NS() -> Tensor:
    rng = torch.Generator().manual_seed(4)
    return torch.randint(100, 8000, (WINDOWS, LENGTH), generator=rng)


def written(source: CheckpointSource, text_NS: Tensor, store: UnitStore, seed: int = 0) -> Tensor:
    return with_generated(source, text_NS, 2, seed, store, lambda *_: None)


@pytest.fixture(scope="module")
def whole_NS(source: CheckpointSource, text_NS: Tensor) -> Tensor:
    return written(source, text_NS, UnitStore())


def test_windows_begin_with_given_text(whole_NS: Tensor, text_NS: Tensor) -> None:
    assert whole_NS.dtype == torch.int64
    assert whole_NS.shape == (3 * WINDOWS, LENGTH)
    assert torch.equal(whole_NS[:WINDOWS], text_NS)
    for i, window_S in enumerate(whole_NS[WINDOWS:]):
        given_S = text_NS[i % WINDOWS]
        assert window_S[0] == given_S[0]
        runs = given_S.unfold(0, PROMPT, 1)
        assert (runs == window_S[1 : 1 + PROMPT]).all(1).sum() == 1
        assert not torch.equal(window_S, given_S)


@torch.no_grad()
def test_tokens_are_drawn_from_the_model_itself(source: CheckpointSource, whole_NS: Tensor) -> None:
    """Surprise at what is drawn from p is p's entropy in the mean; any other choice misses it."""
    window_NS = whole_NS[WINDOWS:]
    assert not (window_NS[:, 1 + PROMPT :] == source.config.eos_token_id).any()
    log_p = load_source(source)(input_ids=window_NS).logits.double().log_softmax(-1)[:, PROMPT:-1]
    entropy = -(log_p.exp() * log_p).sum(-1)
    surprise = -log_p.gather(-1, window_NS[:, 1 + PROMPT :, None])[..., 0]
    excess = (surprise - entropy).flatten()
    error = float(excess.std()) / excess.numel() ** 0.5
    assert error < 0.1
    assert abs(float(excess.mean())) < 4 * error, (float(excess.mean()), error)
    assert float(entropy.mean()) > 1


def test_a_seed_gives_the_same_text_and_what_is_kept_is_not_written_again(
    source: CheckpointSource,
    text_NS: Tensor,
    whole_NS: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(generated_module, "MOST_WINDOWS", 4)
    store, state = UnitStore(tmp_path), torch.get_rng_state()
    first_NS = written(source, text_NS, store)
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(p.stem for p in tmp_path.iterdir()) == [
        "written_000",
        "written_001",
        "written_002",
    ]
    store.discard("written_001")
    store.discard("written_002")
    assert torch.equal(written(source, text_NS, store), first_NS)
    monkeypatch.setattr(generated_module, "load_source", pytest.fail)
    assert torch.equal(written(source, text_NS, store), first_NS)
    monkeypatch.undo()
    other_NS = written(source, text_NS, UnitStore(), seed=1)
    assert not torch.equal(other_NS[WINDOWS:], whole_NS[WINDOWS:])
    assert with_generated(source, text_NS, 0, 0, store, lambda *_: None) is text_NS


def test_the_plan_knows_what_writing_holds(source: CheckpointSource) -> None:
    def cost(generated: int) -> StageCost:
        given = {"effort": "best", "generated": generated}
        recipe = quantize_recipe(Quantize.model_validate(given), None, 0)
        return make_plan(recipe, source.folder).stage("quantize")

    none, some, more = (cost(count) for count in (0, 1, 3))
    # Streams of three widths, the float model and its outputs hold the written windows too.
    assert more.disk - some.disk == 2 * 5 * 4 * 65536 * source.config.hidden_size
    assert none.seconds[1] < some.seconds[1] < more.seconds[1]
    assert COSTS.written_cache == generated_module.CACHE_BYTES
    assert COSTS.written_windows == generated_module.MOST_WINDOWS
    # Keys and values of all layers in bfloat16.
    width, length = source.config.num_key_value_heads * source.config.head_dim, 1 << 15
    window = length * source.config.num_base_layers * 2 * width * 2
    assert generated_module._at_once(source.config, length) == 2**30 // window < 64


def test_seven_billion_weights_are_held_in_bfloat16(tmp_path: Path) -> None:
    recipe = quantize_recipe(Quantize(effort="best"), None, 0)
    stage = make_plan(recipe, sparse(tmp_path / "llama-7b", LLAMA_7B)).stage("quantize")
    # Without norms; embeddings and head, which are read first, in float32 too.
    layers, outer = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096
    assert stage.memory["dense model"] == 2 * (layers + outer) + 4 * outer


def test_only_our_best_effort_writes_text() -> None:
    assert Quantize(effort="best").generated > 0
    for plain in ({"effort": "balanced"}, {"effort": "best", "widths": [2], "method": "decoupleq"}):
        assert Quantize.model_validate(plain).generated == 0
    settings = Quantize(effort="best", generated=3)
    assert Job("quantize").generated(settings) == 3
    assert Job("x", baseline="dedicated", bits=2).generated(settings) == 3
    assert Job("x", baseline="gptq", bits=2).generated(settings) == 0


def test_a_run_writes_trains_and_tunes_on_it(
    tiny_model: Path, text_file: Path, tmp_path: Path
) -> None:
    settings = Quantize.model_validate(
        {
            "effort": "best",
            "tokens": 512,
            "generated": 1,
            "block": {"steps": 1},
            "tune": {"steps": 1},
        }
    )
    seen: list[str] = []
    quantize_checkpoint(
        str(tiny_model),
        tmp_path / "out",
        quantize=settings,
        data=text_file,
        progress=lambda stage, done, total, _: seen.append(f"{stage} {done}/{total}"),
    )
    assert "generate 4/4" in seen
    assert seen.index("generate 4/4") < seen.index("quantize 1/2") < seen.index("tune 1/1")
