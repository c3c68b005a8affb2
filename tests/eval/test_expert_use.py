"""Use of experts against counting by hand and the oracle's report; the task on a real artifact."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fissile.errors import UsageError
from fissile.eval.documents import Document
from fissile.eval.expert_use import expert_use, pack
from fissile.refactor.oracle import routing_report

EXPERTS, DOMAINS = 5, 3


def draw(seed: int, tokens: int = 200) -> tuple[Any, Any, Any]:
    """Choices of two experts, domains and windows of ten tokens."""
    rng = random.Random(seed)
    index = [rng.sample(range(EXPERTS - 1), 2) for _ in range(tokens)]
    domain = [t // 10 % DOMAINS for t in range(tokens)]
    return torch.tensor(index), torch.tensor(domain), torch.arange(tokens) // 10


@pytest.mark.parametrize("seed", [0, 1])
def test_against_the_oracles_report(seed: int) -> None:
    index, domain, sequence = draw(seed)
    found = expert_use(index, EXPERTS, domain, DOMAINS, sequence)
    norms = torch.rand(len(index), EXPERTS, generator=torch.Generator().manual_seed(seed))
    theirs = routing_report(index, norms, domain_T=domain, domains=DOMAINS, sequence_T=sequence)
    assert found.load == pytest.approx(theirs.load_E.tolist())
    assert found.load[EXPERTS - 1] == 0
    assert found.entropy == pytest.approx(theirs.entropy / math.log(EXPERTS))
    assert found.imbalance == pytest.approx(theirs.imbalance)
    assert found.switch_rate == pytest.approx(theirs.switch_rate)
    assert torch.tensor(found.domain_expert) == pytest.approx(theirs.domain_NE, abs=1e-6)
    assert found.chosen == 2


def test_fewer_choices_are_counted_by_hand() -> None:
    """-1 stands for an expert that was not chosen: it has no load, and a set may be smaller."""
    index = torch.tensor([[0, 1], [1, -1], [-1, 1], [2, -1], [2, 0]])
    domain, sequence = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 0, 1])
    found = expert_use(index, 3, domain, 2, sequence)
    assert found.load == pytest.approx([2 / 7, 3 / 7, 2 / 7])
    assert found.chosen == pytest.approx(7 / 5)
    # {0,1} {1} {1} {2} | {2,0}: two switches in three neighbouring pairs of a window.
    assert found.switch_rate == pytest.approx(2 / 3)
    assert torch.tensor(found.domain_expert) == pytest.approx(
        torch.tensor([[0.5, 1.0, 0.0], [1 / 3, 1 / 3, 2 / 3]])
    )
    of_0 = -(1 / 3 * math.log(1 / 3) + 2 / 3 * math.log(2 / 3)) / math.log(3)
    assert found.domain_entropy[0] == pytest.approx(of_0)


def test_windows_of_one_token_have_no_neighbours() -> None:
    found = expert_use(
        torch.tensor([[0], [1]]), 2, torch.zeros(2, dtype=torch.int64), 1, torch.arange(2)
    )
    assert found.switch_rate is None
    assert found.entropy == pytest.approx(1.0)


def test_packing_keeps_domains_apart(tokenizer: Any, llama: Any) -> None:
    documents = [Document(f"w{i} w{i} w{i}", "ab"[i % 2]) for i in range(8)]
    ids, domain, names = pack(documents, tokenizer, 5, llama.config)
    assert names == ["a", "b"]
    assert domain.tolist() == [0, 0, 0, 1, 1, 1]
    text = [0, 3, 3, 3, 0, 5, 5, 5, 0, 7, 7, 7, 0, 9, 9]
    assert ids[:3].flatten().tolist() == text
    with pytest.raises(UsageError, match="domain 'a' has 16 tokens, a window has 20"):
        pack(documents, tokenizer, 20, llama.config)


def test_the_task_on_an_artifact(
    finished_run: Path, text_file: Path, tiny_model: Path, run_cli: Callable[..., Any]
) -> None:
    words = ["--task", "routing", "--data", text_file, "--json"]
    code, out, _ = run_cli("eval", finished_run, *words, "--context", "64", "--bits", "3")
    assert code == 0
    found = json.loads(out)
    assert found["n_tokens"] % 64 == 0
    conditions = found["conditions"]
    assert (conditions["num_experts"], conditions["decides"]) == (4, "pregate")
    assert conditions["domains"] == ["english", "python"]
    [layer] = found["metrics"]["layers"]  # one decision for all layers
    assert sum(layer["load"]) == pytest.approx(1)
    for row in layer["domain_expert"]:
        assert sum(row) == pytest.approx(1)  # top_k is 1
    assert found["entropy"] == pytest.approx(layer["entropy"])
    assert 0 <= found["metrics"]["switch_rate"]["value"] <= 1
    code, _, err = run_cli("eval", tiny_model, *words)
    assert (code, err.count("\n")) == (3, 1)
    assert "no router" in err
    code, _, err = run_cli("eval", finished_run, *words, "--convention", "gptq")
    assert (code, "--convention is one of perplexity" in err) == (2, True)
