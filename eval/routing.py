"""Which experts a mixture of experts chooses: ours, or any that transformers knows.

Routers are found where the model's class says that router logits come from, and read by forward
hooks: the integers they return are the choices, biases and group limits included.
Shapes: N windows, S tokens per window, T = N*S tokens, K chosen per token, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fissile.errors import UnsupportedModel

Progress = Callable[[str, int, int, str], None]
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class Choices:
    """What the routers of a model chose.

    Args:
        index: int64 (T, K) per layer that decides, -1 where fewer than K were chosen.
        layers: numbers of those layers.
        num_experts: E.
        sequence_T: int64 (T,), the window that a token belongs to.
        decides: "layerwise", or "pregate" where a router before the first layer does.
    """

    index: list[Tensor]
    layers: list[int]
    num_experts: int
    sequence_T: Tensor
    decides: str


@dataclass(frozen=True)
class Router:
    """A module whose calls reveal choices.

    Args:
        name: in the model.
        module: the router, or the experts that are called with the choices.
        read: from the module's arguments and result to choices, int64 (T, K).
    """

    name: str
    module: nn.Module
    read: Callable[[tuple[Any, ...], Any], Tensor]

    @property
    def layer(self) -> int:
        """Number of the layer in the module's name; 0 without any."""
        found = re.search(r"\.(\d+)\.", f".{self.name}.")
        return int(found.group(1)) if found else 0


def find_routers(model: Any, where: str) -> list[Router]:
    """Every router of a model, in the order of the layers.

    Args:
        model: an artifact's model or one of transformers; weights are not read.
        where: what error messages call it.

    Raises:
        UnsupportedModel: a dense model, or routers that do not say what they choose.
    """
    config = model.config
    if getattr(config, "model_type", None) == "fissile":
        if config.routing is None or config.routing["kind"] == "static":
            raise UnsupportedModel(f"{where}: its neurons are the same for every token: no router")
        found = [
            Router(name, module, _given)
            for name, module in model.named_modules()
            if re.fullmatch(r"model\.layers\.\d+\.mlp\.(experts|pool)", name)
        ]
    else:
        found = list(_stock_routers(model, where))
    if not found:
        raise UnsupportedModel(
            f"{where}: model_type {config.model_type!r} has no routers; it is a dense model"
        )
    return found


def _given(args: tuple[Any, ...], _result: Any) -> Tensor:
    """Choices that our experts are called with; weight zero means not chosen."""
    _, index_TK, weights_TK = args
    return torch.where(weights_TK == 0, -1, index_TK)


def _stock_routers(model: Any, where: str) -> Iterator[Router]:
    recorders = [
        recorder
        for module in model.modules()
        for recorder in _as_list(getattr(module, "_can_record_outputs", None))
    ]
    text = model.config.get_text_config()
    top_k = next((v for n in _TOP_K if isinstance(v := getattr(text, n, None), int)), None)
    for name, module in model.named_modules():
        for recorder in recorders:
            inside = recorder.layer_name is None or recorder.layer_name in name
            # Some models route attention heads too; that is another question.
            if (
                inside
                and isinstance(module, recorder.target_class)
                and "Attention" not in type(module).__name__
            ):
                yield Router(name, module, _reader(f"{where}: {name}", recorder.index, top_k))
                break


def _as_list(table: Any) -> list[Any]:
    """The recorders of "router_logits" in a class's table of recordable outputs."""
    found = table.get("router_logits") if isinstance(table, dict) else None
    return [r for r in (found if isinstance(found, list) else [found]) if r is not None]


def _reader(where: str, place: int, top_k: int | None) -> Callable[[tuple[Any, ...], Any], Tensor]:
    """Choices from a router's result: its integers, else the largest of its logits."""

    def read(_args: tuple[Any, ...], result: Any) -> Tensor:
        parts = result if isinstance(result, tuple | list) else (result,)
        for part in parts:
            if isinstance(part, Tensor) and part.dtype in (torch.int32, torch.int64):
                return part.reshape(-1, part.shape[-1]).long()
        logits = parts[place] if place < len(parts) else None
        if top_k is None or not isinstance(logits, Tensor):
            raise UnsupportedModel(f"{where}: its result does not say which experts it chose")
        return logits.reshape(-1, logits.shape[-1]).topk(top_k, dim=-1).indices

    return read


@contextmanager
def _hooked(routers: list[Router], rows: list[list[Tensor]]) -> Iterator[None]:
    """Append every router's choices to its list while the block runs."""
    handles = []
    for router, found in zip(routers, rows, strict=True):

        def hook(
            _module: nn.Module,
            args: tuple[Any, ...],
            result: Any,
            router: Router = router,
            found: list[Tensor] = found,
        ) -> None:
            found.append(router.read(args, result).cpu())

        handles.append(router.module.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def collect_choices(
    model: Any,
    ids_NS: Tensor,
    *,
    where: str,
    batch_tokens: int = 8192,
    progress: Progress | None = None,
) -> Choices:
    """Run windows through a model and keep what its routers choose.

    Args:
        model: in evaluation mode.
        ids_NS: int64 token ids, no padding.
        where: what error messages call the model.
        batch_tokens: tokens per forward pass.
        progress: called as ("routing", done, total, "").

    Raises:
        UnsupportedModel: a dense model, or routers whose calls do not match the tokens.
    """
    routers = find_routers(model, where)
    rows: list[list[Tensor]] = [[] for _ in routers]
    step = max(1, batch_tokens // ids_NS.shape[1])
    with _hooked(routers, rows):
        for begin in range(0, len(ids_NS), step):
            model(input_ids=ids_NS[begin : begin + step], use_cache=False)
            if progress is not None:
                progress("routing", min(begin + step, len(ids_NS)), len(ids_NS), "")
    index = [torch.cat(found) for found in rows if found]
    for router, found in zip(routers, rows, strict=True):
        if (count := sum(map(len, found))) != ids_NS.numel():
            raise UnsupportedModel(
                f"{where}: {router.name} chose {count} times for {ids_NS.numel()} tokens"
            )
    layers = [router.layer for router in routers]
    experts = _num_experts(model, index)
    routing = getattr(model.config, "routing", None) or {}
    decides = "pregate" if routing.get("kind") == "pregate" else "layerwise"
    if decides == "pregate" and not routing.get("per_layer"):
        index, layers = index[:1], layers[:1]  # one decision for all layers
    sequence_T = torch.arange(len(ids_NS)).repeat_interleave(ids_NS.shape[1])
    return Choices(index, layers, experts, sequence_T, decides)


def _num_experts(model: Any, index: list[Tensor]) -> int:
    routing = getattr(model.config, "routing", None)
    if isinstance(routing, dict):
        return int(routing["num_experts"])
    text = model.config.get_text_config()
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    known = [v for n in names if isinstance(v := getattr(text, n, None), int)]
    return max([*known[:1], *(int(i.max()) + 1 for i in index)])


def check_routers(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a model without routers before its weights are read.

    Args:
        folder: a dense or routed Hugging Face folder; artifacts are looked at when loaded.
        config: its parsed config.json.

    Raises:
        UnsupportedModel: a dense model, or none that transformers knows.
    """
    if config.get("model_type") == "fissile":
        routing = config.get("routing")
        if routing is None or routing.get("kind") == "static":
            raise UnsupportedModel(f"{folder}: its neurons are the same for every token: no router")
        return
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        stock = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(stock, trust_remote_code=False)
    except (ImportError, ValueError, KeyError, OSError) as err:
        line = " ".join(str(err).split())[:200]
        raise UnsupportedModel(f"{folder}: transformers cannot build it ({line})") from None
    find_routers(model, str(folder))
