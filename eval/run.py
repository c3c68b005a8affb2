"""Evaluate a model folder on a task: what `fissile eval` calls."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, get_args

from fissile.errors import CorruptCheckpoint, UnsupportedModel, UsageError
from fissile.eval.choices import choices, read_items
from fissile.eval.documents import read_documents, sha256_files
from fissile.eval.perplexity import Progress, perplexity
from fissile.eval.result import Result, Task, machine, model_sha256, versions
from fissile.eval.tokens import load_tokenizer, tokenizer_sha256
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
    progress: Progress | None = None,
) -> Result:
    """Load a model and score it.

    Args:
        folder: an artifact, a run folder (its model/ is taken), or a dense Hugging Face folder.
        task: "perplexity" or "choices".
        data: JSONL of documents (perplexity) or items (choices).
        bits: width to serve, for artifacts with nested weights; None for the artifact's default.
        limit: use the first so many documents or items.
        context: tokens per window; None for the model's maximum, at most 2048.
        batch_tokens: padded tokens per forward pass; does not change the result.
        progress: called with ("eval", done, total, detail).

    Raises:
        UsageError: unknown task, unreadable data, a width the artifact does not hold.
        UnsupportedModel: no model class for the folder's configuration.
        CorruptCheckpoint: weights that are missing, damaged or give non-finite logits.
    """
    if task not in get_args(Task):
        known = list(get_args(Task))
        raise UsageError(f"unknown task {task!r}{suggest(task, known)} (known: {', '.join(known)})")
    if batch_tokens < 1:
        raise UsageError(f"batch_tokens {batch_tokens}: must be at least 1")
    folder = model_folder(folder)
    config = read_config(folder)
    check_bits(folder, config, bits)
    # Text first: a mistake in the data should not cost the time of loading a model.
    rows = read_documents(data) if task == "perplexity" else read_items(data)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, config, bits)
    common = {"context": context, "batch_tokens": batch_tokens, "limit": limit}
    began = time.perf_counter()
    score = _perplexity if task == "perplexity" else _choices
    count, value, stderr, groups, details = score(model, tokenizer, rows, common, progress)
    conditions = {
        **details,
        "batch_tokens": batch_tokens,
        "limit": limit,
        "dtype": _DTYPE,
        "data": {"file": data.name, "sha256": sha256_files([data])},
        "model": {"type": config.get("model_type"), "sha256": model_sha256(folder)},
        "tokenizer_sha256": tokenizer_sha256(folder),
        "seed": None,  # nothing is drawn at random
        "versions": versions(),
        **machine(),
    }
    served = bits if bits is not None else _default_bits(config)
    seconds = time.perf_counter() - began
    return Result(task, served, count, value, stderr, groups, seconds, conditions)


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


Outcome = tuple[int, float, float | None, dict[str, float], dict[str, Any]]


def _perplexity(
    model: Any, tokenizer: Any, rows: Any, common: dict[str, Any], progress: Progress | None
) -> Outcome:
    found = perplexity(model, tokenizer, rows, **common, progress=progress)
    details = {
        "context": found.context,
        "bos": found.start,
        "n_documents": found.n_documents,
        "stderr_method": "delta method over documents",
        "domains": {
            name: {
                "n_tokens": score.n_tokens,
                "n_documents": score.n_documents,
                "stderr": score.stderr,
            }
            for name, score in found.by_domain.items()
        },
    }
    groups = {name: score.ppl for name, score in found.by_domain.items()}
    return found.n_tokens, found.ppl, found.stderr, groups, details


def _choices(
    model: Any, tokenizer: Any, rows: Any, common: dict[str, Any], progress: Progress | None
) -> Outcome:
    found = choices(model, tokenizer, rows, **common, progress=progress)
    details = {
        "context": found.context,
        "bos": found.start,
        "normalisation": "mean log-likelihood per token",
        "n_ties": found.n_ties,
    }
    return found.n_items, found.accuracy, found.stderr, found.by_subject, details


def _default_bits(config: dict[str, Any]) -> int | None:
    widths = (config.get("nested") or {}).get("widths")
    return (config.get("bits") or widths[-1]) if widths else None


def _line(err: BaseException) -> str:
    return " ".join(str(err).split())[:200]
