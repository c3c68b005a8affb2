"""`fissile generate`: text as it comes, what it took, and one line for what cannot be done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from fissile.eval.tokens import encode, load_tokenizer
from fissile.models import load
from fissile.serve.options import Budget, Prompt, Sampling, ServeOptions, read_prompts

PROMPT = "def area(width, height):\n    return"
Cli = Callable[..., tuple[int, str, str]]


def resident(folder: Path, text: str, count: int) -> list[int]:
    import torch

    ids = torch.tensor([[0, *encode(load_tokenizer(folder), [text])[0]]])
    out = load(folder).generate(ids, max_new_tokens=count, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


def test_text_and_numbers(served: Path, run_cli: Cli) -> None:
    words = ["generate", served, "--prompt", PROMPT, "--tokens", "10", "--memory", "1MB"]
    code, out, _ = run_cli(*words)
    assert code == 0
    code, told, _ = run_cli(*words, "--json")
    found = json.loads(told)
    assert code == 0
    [answer] = found["answers"]
    assert answer["tokens"] == resident(served, PROMPT, 10)
    assert out.startswith(answer["text"] + "\n\n")
    assert "hit_rate" in out
    assert found["generated_tokens"] == len(answer["tokens"]) == 10
    assert found["passes"] == 10
    assert found["computed_tokens"] == found["prompt_tokens"] + 9
    assert 0 < found["peak_bytes"] <= found["memory_bytes"] == 10**6
    assert found["peak_bytes"] <= found["bytes_read"]
    assert 0 < found["hit_rate"] < 1
    assert found["stall_seconds"] < found["seconds"]
    assert found["tokens_per_second"] == pytest.approx(10 / found["seconds"])
    assert found["mean_bits"] == 4


def test_several_prompts_are_each_answered_as_alone(
    served: Path, tmp_path: Path, run_cli: Cli
) -> None:
    texts = [PROMPT, "The river ran high", "#include <stdio.h>\n"]
    rows = [{"prompt": text, "tokens": 4 + i} for i, text in enumerate(texts)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = run_cli("generate", served, "--prompts", path, "--memory", "1MiB", "--bits", "3")
    assert code == 0
    for number in range(3):
        assert f"[{number}] " in out
    code, told, _ = run_cli("generate", served, "--prompts", path, "--bits", "3", "--json")
    found = json.loads(told)
    assert [len(answer["tokens"]) for answer in found["answers"]] == [4, 5, 6]
    assert found["mean_bits"] == 3
    assert found["passes"] < 15
    assert found["peak_bytes"] <= found["memory_bytes"] == found["expert_bytes"]


def test_a_budget_is_kept_and_used(served: Path, run_cli: Cli) -> None:
    code, told, _ = run_cli(
        "generate", served, "--prompt", PROMPT * 3, "--tokens", "8", "--budget", "3.5bpw", "--json"
    )
    found = json.loads(told)
    assert code == 0
    assert 2 < found["mean_bits"] < 4
    assert found["expert_bytes"] <= found["memory_bytes"]
    assert found["peak_bytes"] <= found["memory_bytes"]
    assert found["expert_bytes"] > 0.9 * found["memory_bytes"]


def test_sampling_depends_on_the_seed_and_the_prompt_alone(served: Path) -> None:
    from fissile.serve.generate import generate

    prompts = [Prompt(PROMPT, 8), Prompt("The river ran high", 8)]
    options = ServeOptions()
    both = generate(served, prompts, options, Sampling(0.9, seed=3))
    alone = generate(served, prompts[:1], options, Sampling(0.9, seed=3))
    other = generate(served, prompts[:1], options, Sampling(0.9, seed=4))
    assert both.answers[0] == alone.answers[0]
    assert other.answers[0] != alone.answers[0]


def test_text_arrives_in_pieces_that_make_up_the_answer(served: Path) -> None:
    from fissile.serve.generate import generate

    pieces: list[tuple[int, str, bool]] = []
    found = generate(
        served,
        [Prompt(PROMPT, 6)],
        ServeOptions(),
        Sampling(),
        stream=lambda *piece: pieces.append(piece),
    )
    assert "".join(text for _, text, _ in pieces) == found.answers[0].text
    assert len(pieces) > 2
    assert [last for _, _, last in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--memory", "10kB"], 4, "10000 bytes of memory for experts, one expert takes"),
        (["--memory", "ten"], 2, "'ten' is no size, e.g. 64MiB or 1.5GB"),
        (["--budget", "2bp"], 2, "'2bp' is no budget, e.g. 4GiB or 2.6bpw"),
        (["--budget", "1bpw"], 2, "the base planes of all experts (2 bits) take"),
        (["--bits", "5"], 2, "bits 5: it holds 2, 3, 4"),
        (["--bits", "3", "--budget", "3bpw"], 2, "not allowed with argument"),
        (["--policy", "lur"], 2, "'lur' is not one of belady, lru"),
        (["--device", "cuda:7"], 4, "torch finds"),
        (["--device", "tape"], 2, "is none that torch knows"),
        (["--temperature", "-1"], 2, "--temperature -1.0: must not be negative"),
        (["--tokens", "5000"], 2, "the model's context is 512"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    served: Path, words: list[str], code: int, message: str, run_cli: Cli
) -> None:
    found, out, err = run_cli("generate", served, "--prompt", "a", *words)
    assert (found, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_model_without_experts_is_refused(demo_model: Path, run_cli: Cli) -> None:
    code, _, err = run_cli("generate", demo_model, "--prompt", "a")
    assert code == 3
    assert "holds no experts that can be read apart" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a"}\n', "line 1: no prompt"),
        ('{"prompt": "a"}\n{"prompt": "b", "tokens": 0}\n', "line 2: tokens 0"),
        ("\n", "holds no prompts"),
    ],
)
def test_prompts_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    from fissile.errors import UsageError

    path = tmp_path / "p.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_prompts(path, 4)


def test_the_words_of_the_command_line_are_the_library_s() -> None:
    from fissile.cli import generate
    from fissile.serve.batching import SCHEDULERS
    from fissile.serve.order import Order
    from fissile.serve.policies import make_policy

    assert set(generate.SCHEDULERS) == set(SCHEDULERS)
    assert set(generate.ORDERS) == set(get_args(Order))
    assert [make_policy(name).name for name in generate.POLICIES] == list(generate.POLICIES)


def test_sizes_are_decimal_or_binary() -> None:
    from fissile.cli.generate import budget, size

    assert [size(t) for t in ("64MiB", "1.5GB", "12", "2 kB")] == [2**26, 1500000000, 12, 2000]
    assert Budget(*budget("2.6bpw")) == Budget(2.6, "bpw")
    assert Budget(*budget("4KiB")) == Budget(4096, "bytes")
