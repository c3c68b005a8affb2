"""Real engines, started: they generate what transformers generates from the same folders.

`make serve-test` builds the engines' environments and runs these tests.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.serving.engines import Exports, free_port, gaps, post, server
from transformers import AutoModelForCausalLM, AutoTokenizer

from fissile.export.engine_run import Answer, available, greedy
from fissile.io.headers import open_checkpoint_headers
from fissile.kernels.layout import segment_names

pytestmark = pytest.mark.serving
NEW = 32
BAR = 1e-3
CHUNKED = {"max_num_seqs": 20, "enable_chunked_prefill": True, "max_num_batched_tokens": 64}
"""All prompts at once, most of them prefilled in several steps."""


def load(folder: Path, bits: int | None = None) -> Any:
    """The folder in transformers, by its own modeling files where it has some."""
    width = {"bits": bits} if bits else {}
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=True, **width
    ).eval()


def check(model: Any, prompts: list[list[int]], answer: Answer) -> None:
    """Twenty times thirty-two tokens, and no two engines apart by more than the bar."""
    assert [len(tokens) for tokens in answer.tokens] == [NEW] * 20
    assert len({tuple(tokens) for tokens in answer.tokens}) > 10
    lead, difference = gaps(model, prompts, answer)
    assert lead <= BAR
    assert difference <= BAR


def packed_bytes(folder: Path, bits: int) -> int:
    """Bytes of the stored parts that one width needs."""
    headers = open_checkpoint_headers(folder)
    nested = headers.config["nested"]
    served = segment_names(bits, nested["widths"])
    names = [f"{name}.{part}" for name in nested["modules"] for part in served]
    return sum(headers.tensors[name][1].nbytes for name in names)


@pytest.mark.parametrize("plugin", [False, True])
def test_vllm_serves_float_experts(
    plugin: bool,
    exports: Exports,
    prompts: list[list[int]],
    vllm_python: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the plug-in, and as remote code that knows nothing of fissile."""
    if not plugin:
        monkeypatch.setenv("VLLM_PLUGINS", "")
    folder = exports.routed()
    check(load(folder), prompts, greedy("vllm", folder, prompts, NEW, options=CHUNKED))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_vllm_serves_every_width(
    bits: int, exports: Exports, prompts: list[list[int]], vllm_python: str
) -> None:
    folder = exports.nested()
    answer = greedy("vllm", folder, prompts, NEW, bits=bits, options=CHUNKED)
    check(load(folder, bits), prompts, answer)
    packed = packed_bytes(folder, bits)
    assert answer.nested_bytes is not None
    assert answer.nested_bytes >= packed
    if bits == 2:
        assert answer.nested_bytes <= 1.15 * packed


@pytest.mark.parametrize("bits", [None, 2])
@pytest.mark.parametrize(
    "options", [{"enforce_eager": False}, {"tensor_parallel_size": 2}], ids=lambda o: next(iter(o))
)
def test_vllm_compiled_and_shared_out(
    options: dict[str, Any],
    bits: int | None,
    exports: Exports,
    prompts: list[list[int]],
    vllm_python: str,
) -> None:
    folder = exports.nested() if bits else exports.routed()
    answer = greedy("vllm", folder, prompts, NEW, bits=bits, options=CHUNKED | options)
    check(load(folder, bits), prompts, answer)


def test_the_openai_server_at_two_bits(
    exports: Exports, prompts: list[list[int]], vllm_python: str, tmp_path: Path
) -> None:
    folder, port = exports.nested(), free_port()
    command = [str(Path(vllm_python).with_name("vllm")), "serve", str(folder)]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--hf-overrides", '{"bits": 2}', "--max-model-len", "128", "--max-num-seqs", "20"]
    command += ["--max-num-batched-tokens", "64", "--enable-chunked-prefill"]
    quiet = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with server(command, port, tmp_path / "log", **quiet) as address:

        def ask(ids: list[int]) -> dict[str, Any]:
            body = {"model": str(folder), "prompt": ids, "max_tokens": NEW, "temperature": 0}
            more = {"logprobs": 1, "ignore_eos": True, "return_token_ids": True}
            found: dict[str, Any] = post(f"{address}/v1/completions", **body, **more)["choices"][0]
            return found

        with ThreadPoolExecutor(20) as pool:
            choices = list(pool.map(ask, prompts))
    answer = Answer(
        [choice["token_ids"] for choice in choices],
        [choice["logprobs"]["token_logprobs"] for choice in choices],
    )
    check(load(folder, 2), prompts, answer)


def test_lowered_mixtral_is_the_same_everywhere(
    exports: Exports,
    prompts: list[list[int]],
    vllm_python: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No remote code and no plug-in; the artifact it was lowered from is the reference."""
    artifact = exports.lowerable()
    folder, reference = exports.exported(artifact, "mixtral"), load(artifact)
    stock = load(folder)
    assert type(stock).__module__ == "transformers.models.mixtral.modeling_mixtral"
    check(reference, prompts, greedy("transformers", folder, prompts, NEW))
    monkeypatch.setenv("VLLM_PLUGINS", "")
    check(reference, prompts, greedy("vllm", folder, prompts, NEW, options=CHUNKED))


def test_lowered_mixtral_in_llama_cpp(exports: Exports, prompts: list[list[int]]) -> None:
    if (reason := available("llama.cpp")) is not None:
        pytest.skip(reason)
    artifact = exports.lowerable()
    file = exports.exported(artifact, "gguf") / "model.gguf"
    check(load(artifact), prompts, greedy("llama.cpp", file, prompts, NEW))


def test_lowered_mixtral_in_transformers_serve(
    exports: Exports, texts: list[str], vllm_python: str, tmp_path: Path
) -> None:
    folder, port = exports.exported(exports.lowerable(), "mixtral"), free_port()
    program = str(Path(vllm_python).with_name("transformers"))
    command = [program, "serve", str(folder), "--port", str(port), "--device", "cpu"]
    with server(command, port, tmp_path / "log", HF_HUB_OFFLINE="1") as address:
        body = {"model": str(folder), "max_tokens": NEW, "temperature": 0}
        url = f"{address}/v1/completions"
        found = [post(url, prompt=t[:120], **body)["choices"][0]["text"] for t in texts[:4]]
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    for text, answer in zip(texts, found, strict=False):
        ids = tokenizer(text[:120], return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == answer


@pytest.mark.parametrize("selector", ["mean_gate", "ridge"])
def test_layerwise_glm4_moe(
    selector: str,
    exports: Exports,
    texts: list[str],
    vllm_python: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Logits to a thousandth and perplexity to a tenth of a percent, in transformers and vLLM."""
    artifact = exports.layerwise(selector)
    folder = exports.exported(artifact, "glm4-moe")
    reference, stock = load(artifact), load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text).input_ids[:128] for text in texts]
    errors: list[float] = []
    norms: list[float] = []
    own: list[float] = []
    theirs: list[float] = []
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            x, y = (m(input_ids=ids).logits[0].double() for m in (reference, stock))
        errors += (x - y).square().sum(-1).tolist()
        norms += x.square().sum(-1).tolist()
        for kept, logits in ((own, x), (theirs, y)):
            kept += (-logits.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])).flatten().tolist()
    assert len(errors) > 1000
    by_token = torch.tensor(errors).sqrt() / torch.tensor(norms).sqrt()
    assert float(by_token.median()) < 5e-6
    if selector == "mean_gate":
        assert math.sqrt(sum(errors) / sum(norms)) <= BAR
    # Offsets beside a sigmoid leave near-ties that float32 cannot tell apart.
    assert float((by_token > BAR).float().mean()) < 0.01
    monkeypatch.setenv("VLLM_PLUGINS", "")
    answer = greedy("vllm", folder, rows, 1, options=CHUNKED)
    assert answer.prompt_logprobs is not None
    told = [-value for row in answer.prompt_logprobs for value in row]
    for found in (theirs, told):
        assert len(found) == len(own)
        assert abs(math.exp((sum(found) - sum(own)) / len(own)) - 1) <= BAR
