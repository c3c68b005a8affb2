"""Tasks of lm-evaluation-harness on any model folder that this package loads.

The harness is an optional dependency and is imported inside the functions. Its model class for us,
registered as "fissile", is its own class for Hugging Face models around a model and a tokenizer
that this package loaded: artifacts at any width, dense folders, no code from the folder.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fissile.errors import UsageError
from fissile.eval.result import code, machine, model_sha256, versions
from fissile.eval.run import check_bits, default_bits, load_model, model_folder, read_config
from fissile.eval.tokens import load_tokenizer, tokenizer_sha256
from fissile.registry import suggest

_BATCH_CONTEXT = 2048
_SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}
"""The harness's own defaults."""


@dataclass(frozen=True)
class HarnessOptions:
    """How tasks are run.

    Args:
        shots: examples before a question; None for each task's own number.
        include: folder with further task definitions; these may hold code, which is run.
        limit: first so many items of every task.
        context: most tokens of an input; None for the model's maximum.
        batch_tokens: tokens per forward pass, from which the batch size follows.
        download: data sets and metrics may be fetched from the hub.
        samples: keep what was asked and answered, item by item.
        quiet: no progress.
    """

    shots: int | None = None
    include: Path | None = None
    limit: int | None = None
    context: int | None = None
    batch_tokens: int = 8192
    download: bool = False
    samples: bool = False
    quiet: bool = False


@cache
def harness_model() -> Any:
    """The harness's model class "fissile"; calling this registers it.

    As `lm_eval --model fissile --model_args pretrained=DIR,bits=3` after an import of this module
    and one call, or as an object for `lm_eval.simple_evaluate(model=…)`.

    Raises:
        UsageError: lm-eval is not installed.
    """
    _require()
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    @register_model("fissile")
    class FissileLM(HFLM):
        """A model folder at one width, float32.

        Args:
            pretrained: an artifact, a run folder or a dense Hugging Face folder.
            bits: width to serve; None for the artifact's default.
            quiet: no progress bars.
            options: of the harness's own class (batch_size, max_length, add_bos_token, …).
        """

        def __init__(
            self,
            pretrained: str,
            bits: int | None = None,
            quiet: bool = False,
            **options: Any,
        ) -> None:
            folder = model_folder(Path(pretrained))
            config = read_config(folder)
            bits = None if bits is None else int(bits)
            check_bits(folder, config, bits)
            tokenizer = load_tokenizer(folder)
            self.folder, self.quiet = folder, quiet
            model = load_model(folder, config, bits)
            super().__init__(model, backend="causal", tokenizer=tokenizer, **options)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm or self.quiet)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm or self.quiet)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm or self.quiet)

    return FissileLM


def run_harness(
    folder: Path, tasks: Sequence[str], bits: int | None, options: HarnessOptions
) -> dict[str, Any]:
    """Run tasks and return what the harness reports, with conditions.

    The tasks and their data are loaded before the model.

    Args:
        folder: an artifact, a run folder or a dense Hugging Face folder.
        tasks: names of tasks, groups or tags.
        bits: width to serve, for artifacts with nested weights.
        options: see there.

    Returns:
        `task` ("harness"), `bits`, the harness's `results`, `groups`, `versions`, `n-shot`,
        `n-samples` and `higher_is_better`, `seconds`, `conditions`; `samples` if asked for.

    Raises:
        UsageError: lm-eval is not installed, an unknown task, data that are not on this machine.
        UnsupportedModel, CorruptCheckpoint: as `fissile.eval.run.load_model`.
    """
    build = harness_model()
    folder = model_folder(folder)
    config = read_config(folder)
    check_bits(folder, config, bits)
    with _network(options.download):
        loaded = load_tasks(tasks, options.include, options.shots)
        lm = build(str(folder), bits, options.quiet, max_length=options.context)
        lm.batch_size_per_gpu = max(1, options.batch_tokens // min(lm.max_length, _BATCH_CONTEXT))
        began = time.perf_counter()
        found = evaluate_tasks(lm, loaded, options.limit, samples=options.samples)
    seconds = time.perf_counter() - began
    conditions = {
        "lm_eval": metadata.version("lm_eval"),
        "batch_size": lm.batch_size_per_gpu,
        "context": lm.max_length,
        "limit": options.limit,
        "bos": lm.tokenizer.bos_token_id,
        "dtype": "float32",
        "seeds": _SEEDS,
        "model": {"type": config.get("model_type"), "sha256": model_sha256(folder)},
        "tokenizer_sha256": tokenizer_sha256(folder),
        "code": code(),
        "versions": versions(),
        **machine(),
    }
    kept = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "samples")
    served = bits if bits is not None else default_bits(config)
    plain = {key: _plain(found[key]) for key in kept if key in found}
    head = {"task": "harness", "bits": served, "tasks": list(tasks)}
    return {**head, **plain, "seconds": round(seconds, 3), "conditions": conditions}


def load_tasks(
    names: Sequence[str], include: Path | None = None, shots: int | None = None
) -> dict[str, Any]:
    """Tasks with their data, as the harness's `evaluate` takes them.

    Args:
        names: of tasks, groups or tags.
        include: folder with further definitions.
        shots: examples for tasks that do not fix their number at 0.

    Raises:
        UsageError: lm-eval is not installed, no such folder, an unknown task, data not at hand.
    """
    _require()
    from datasets.exceptions import DatasetsError

    if include is not None and not include.is_dir():
        raise UsageError(f"{include}: is not a folder with task definitions")
    manager = _manager(include, names)
    known = list(manager.all_tasks)
    for name in names:
        if name not in known:
            raise UsageError(f"the harness has no task {name!r}{suggest(name, known)}")
    try:
        loaded = dict(manager.load(list(names)))
    except (OSError, ValueError, DatasetsError) as err:
        reason = " ".join(str(err).split())[:200]
        raise UsageError(
            f"{', '.join(names)}: the data cannot be loaded ({reason}); --download allows fetching"
        ) from None
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (shots is not None and own != 0):
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=_SEEDS["fewshot"])
    return loaded


def _manager(include: Path | None, names: Sequence[str]) -> Any:
    """An index of tasks; of the folder alone if that has them all, since the rest takes seconds."""
    from lm_eval.tasks import TaskManager

    if include is not None:
        own = TaskManager(include_path=str(include), include_defaults=False)
        if set(names) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=None if include is None else str(include))


def evaluate_tasks(
    lm: Any, loaded: dict[str, Any], limit: int | None = None, *, samples: bool = True
) -> dict[str, Any]:
    """Run loaded tasks on a model of the harness, with its default seeds.

    Args:
        lm: any model of the harness.
        loaded: what `load_tasks` returned.
        limit: first so many items of every task.
        samples: keep what was asked and answered.

    Raises:
        UsageError: an item that the harness refuses.
    """
    import numpy
    from lm_eval.evaluator import evaluate

    random.seed(_SEEDS["random"])
    numpy.random.seed(_SEEDS["numpy"])
    torch.manual_seed(_SEEDS["torch"])
    try:
        return dict(evaluate(lm, loaded, limit=limit, log_samples=samples))
    except AssertionError as err:
        # The harness states its limits by assertions (a continuation without a token, for one).
        reason = " ".join(str(err).split())
        raise UsageError(f"the harness refuses a request {reason}".rstrip()) from err


def _require() -> None:
    try:
        metadata.version("lm_eval")
    except metadata.PackageNotFoundError:
        raise UsageError("lm-evaluation-harness is missing: pip install 'fissile[eval]'") from None


@contextmanager
def _network(allowed: bool) -> Iterator[None]:
    """Refuse every request to the hub while it lasts, unless they are allowed."""
    import datasets
    from huggingface_hub import constants

    if allowed:
        yield
        return
    places = [(constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    places.append((datasets.config, "HF_DATASETS_OFFLINE"))
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def _plain(value: Any) -> Any:
    """JSON's own types; what is neither (functions in a task's configuration) becomes text."""
    return json.loads(json.dumps(value, default=str))
