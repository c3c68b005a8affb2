"""Evaluate a model folder on a task: what `fissile eval` calls."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from fissile.errors import CorruptCheckpoint, UnsupportedModel, UsageError
from fissile.eval.conventions import check_convention
from fissile.eval.mmlu import MmluOptions, open_journal
from fissile.eval.perplexity import Progress
from fissile.eval.result import (
    TASK_VERSIONS,
    Result,
    Task,
    code,
    machine,
    model_sha256,
    versions,
)
from fissile.eval.routing import check_routers
from fissile.eval.tasks import TASKS, Settings
from fissile.eval.tokens import load_tokenizer, tokenizer_sha256
from fissile.families.artifact import plan_summary
from fissile.registry import suggest

_DTYPE = "float32"


def evaluate(
    folder: Path,
    task: Task,
    data: Path,
    *,
    bits: int | None = None,
    limit: int | None = None,
    context: int | None = None,
    batch_tokens: int = 8192,
    convention: str = "fissile",
    mmlu: MmluOptions | None = None,
    progress: Progress | None = None,
) -> Result:
    """Load a model and score it.

    Args:
        folder: an artifact, a run folder (its model/ is taken), or a dense Hugging Face folder.
        task: a name of `fissile.eval.tasks.TASKS`.
        data: JSONL of documents (perplexity, routing) or items (choices).
        bits: width to serve, for artifacts with nested weights; None for the artifact's default.
        limit: use the first so many documents or items.
        context: tokens per window; None for the model's maximum, at most 2048.
        batch_tokens: padded tokens per forward pass; does not change the result.
        convention: of a perplexity: "fissile", "gptq" or "lm-eval" (`fissile.eval.conventions`).
        mmlu: what only that task takes; None for its defaults.
        progress: called with ("eval", done, total, detail).

    Raises:
        UsageError: unknown task, unreadable data, a width the artifact does not hold.
        UnsupportedModel: no model class for the folder's configuration.
        CorruptCheckpoint: weights that are missing, damaged or give non-finite logits.
    """
    _check_words(task, convention, batch_tokens)
    folder = model_folder(folder)
    config = read_config(folder)
    check_bits(folder, config, bits)
    if task == "routing":
        check_routers(folder, config)
    # Text first: a mistake in the data should not cost the time of loading a model.
    spec = TASKS[task]
    settings = Settings(context, batch_tokens, limit, convention, progress, mmlu or MmluOptions())
    rows = spec.read(data, settings)
    conditions = {
        "batch_tokens": batch_tokens,
        "limit": limit,
        **_conditions(folder, config, data.name, spec.sha256(data, rows)),
    }
    if task == "mmlu":
        settings = replace(settings, journal=open_journal(settings.mmlu, bits, context, conditions))
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, config, bits)
    began = time.perf_counter()
    found = spec.score(model, tokenizer, rows, settings)
    seconds = time.perf_counter() - began
    conditions = {"task_version": TASK_VERSIONS[task], **found.details, **conditions, **machine()}
    served = bits if bits is not None else default_bits(config)
    if served is None and (plan := plan_summary(config)) is not None:
        conditions["plan"] = plan
    return Result(task, served, found, seconds, conditions)


def _check_words(task: str, convention: str, batch_tokens: int) -> None:
    if task not in (known := list(get_args(Task))):
        raise UsageError(f"unknown task {task!r}{suggest(task, known)} (known: {', '.join(known)})")
    check_convention(convention)
    if batch_tokens < 1:
        raise UsageError(f"batch_tokens {batch_tokens}: must be at least 1")


def _conditions(
    folder: Path, config: dict[str, Any], data: str, data_sha256: str
) -> dict[str, Any]:
    """What every score depends on, whatever the task and the machine."""
    return {
        "dtype": _DTYPE,
        "data": {"file": data, "sha256": data_sha256},
        "model": {"type": config.get("model_type"), "sha256": model_sha256(folder)},
        "tokenizer_sha256": tokenizer_sha256(folder),
        "seed": None,  # nothing is drawn at random
        "code": code(),
        "versions": versions(),
    }


def model_folder(folder: Path) -> Path:
    """The folder with the model: `folder` itself, or model/ inside a run folder.

    Raises:
        UsageError: neither holds a config.json.
    """
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    problem = "has no config.json" if folder.is_dir() else "is not a folder"
    raise UsageError(f"{folder}: {problem}; expected a model folder or a run folder with model/")


def read_config(folder: Path) -> dict[str, Any]:
    """Parse a model folder's config.json.

    Raises:
        CorruptCheckpoint: it is not a JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CorruptCheckpoint(f"{folder / 'config.json'}: not readable JSON ({err})") from None
    if not isinstance(config, dict):
        raise CorruptCheckpoint(f"{folder / 'config.json'}: expected an object")
    return config


def check_bits(folder: Path, config: dict[str, Any], bits: int | None) -> None:
    """Refuse a width that the folder does not hold.

    Raises:
        UsageError: names the widths that are accepted.
    """
    if bits is None:
        return
    widths = (config.get("nested") or {}).get("widths", [])
    if bits not in widths:
        held = f"holds {', '.join(map(str, widths))}" if widths else "has float weights only"
        raise UsageError(f"bits {bits}: {folder} {held}")


def load_model(folder: Path, config: dict[str, Any], bits: int | None = None) -> Any:
    """Load a local model in fp32 on the CPU; never downloads or runs the folder's code.

    Args:
        folder: an artifact or a dense Hugging Face folder with safetensors.
        config: its parsed config.json.
        bits: width to serve, for artifacts with nested weights.

    Returns:
        A Hugging Face style causal model in evaluation mode.

    Raises:
        UnsupportedModel: transformers has no class for the configuration.
        CorruptCheckpoint: weights that do not parse, or that are missing or misshapen.
    """
    if config.get("model_type") == "fissile":
        from fissile.models import load

        return load(folder, bits=bits, dtype=_DTYPE).eval()
    return _load_stock(folder)


def _load_stock(folder: Path) -> Any:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if not any(folder.glob("*.safetensors")):
        raise UsageError(
            f"{folder}: no *.safetensors; other formats can hold code and are not read"
            " (convert with transformers' save_pretrained)"
        )
    options: dict[str, Any] = {
        "dtype": getattr(torch, _DTYPE),
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    try:
        model, info = AutoModelForCausalLM.from_pretrained(str(folder), **options)
    except SafetensorError as err:
        raise CorruptCheckpoint(f"{folder}: a weight file does not parse ({err})") from None
    except (ImportError, ValueError, KeyError) as err:
        raise UnsupportedModel(f"{folder}: transformers cannot load it ({_line(err)})") from None
    except (OSError, RuntimeError) as err:
        raise CorruptCheckpoint(f"{folder}: weights cannot be loaded ({_line(err)})") from None
    # transformers fills absent tensors with random values and goes on; that would be scored too.
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in info[kind]):
            raise CorruptCheckpoint(f"{folder}: {kind.replace('_', ' ')}: {', '.join(names[:3])}")
    return model.eval()


def default_bits(config: dict[str, Any]) -> int | None:
    """The width an artifact is served at unless another is asked for.

    None with float weights, or where a plan gives weights and experts widths of their own.
    """
    nested = config.get("nested") or {}
    if not nested or (config.get("bits") is None and nested.get("mixed")):
        return None
    return int(config.get("bits") or nested["widths"][-1])


def _line(err: BaseException) -> str:
    return " ".join(str(err).split())[:200]
