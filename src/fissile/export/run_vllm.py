"""Run by an interpreter that has vLLM: continue token ids, and say what was computed.

Called as `python run_vllm.py FOLDER REQUEST.json ANSWER.json`; it imports nothing of this package.
All prompts are submitted at once, so that requests share batches.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""What a short run on a shared machine needs."""


def main(folder: str, request: str, answer: str) -> None:
    """Start vLLM on `folder`, answer the request, write tokens, log-probabilities and memory."""
    with open(request, encoding="utf-8") as file:
        asked = json.load(file)
    options: dict[str, Any] = {"dtype": "float32", "enforce_eager": True} | asked["options"]
    alone = options.get("tensor_parallel_size", 1) == 1
    os.environ.update(QUIET)
    if alone:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        options.setdefault("distributed_executor_backend", "uni")

    import torch
    from vllm import LLM, SamplingParams

    most = max(map(len, asked["prompts"])) + asked["count"]
    options.setdefault("max_model_len", most + 8)
    torch.set_num_threads(1)
    llm = LLM(folder, trust_remote_code=asked["remote"], skip_tokenizer_init=True, **options)
    params = SamplingParams(
        temperature=0,
        max_tokens=asked["count"],
        ignore_eos=True,
        logprobs=1,
        prompt_logprobs=0,
        detokenize=False,
    )
    found = llm.generate(
        [{"prompt_token_ids": ids} for ids in asked["prompts"]], params, use_tqdm=False
    )
    outputs = [one.outputs[0] for one in found]
    result = {
        "tokens": [list(one.token_ids) for one in outputs],
        "logprobs": [
            [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)]
            for one in outputs
        ],
        "prompt_logprobs": [
            [step[token].logprob for step, token in pairs]
            for one in found
            for pairs in [list(zip(one.prompt_logprobs, one.prompt_token_ids, strict=True))[1:]]
        ],
        "nested_bytes": nested_bytes(llm) if alone else None,
    }
    with open(answer, "w", encoding="utf-8") as file:
        json.dump(result, file)


def nested_bytes(llm: Any) -> int:
    """Bytes of all tensors that hold nested weights, in whatever form."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    sizes: dict[int, int] = {}
    for module in model.modules():
        if hasattr(module, "segments"):
            for tensor in tensors_in(vars(module), 5):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def tensors_in(value: Any, depth: int) -> Iterator[Any]:
    """Tensors in containers and dataclasses, modules left out: they have their turn."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif depth and not isinstance(value, torch.nn.Module):
        if isinstance(value, dict):
            members = list(value.values())
        elif isinstance(value, list | tuple | set):
            members = list(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            members = [getattr(value, field.name) for field in dataclasses.fields(value)]
        else:
            members = []
        for member in members:
            yield from tensors_in(member, depth - 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
