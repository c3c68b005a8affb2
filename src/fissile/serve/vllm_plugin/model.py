"""The model class that vLLM starts: its Transformers backend around our layers.

Imported by vLLM alone.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.models.transformers import TransformersMoEForCausalLM
from vllm.model_executor.models.transformers.base import Base
from vllm.sequence import IntermediateTensors

from fissile.export.hosts import SILU
from fissile.io.headers import checkpoint_folder
from fissile.io.reader import TensorReader
from fissile.models.modules_fissile import FissileExperts
from fissile.models.nested_fissile import one_step
from fissile.serve.vllm_plugin.layers import LayerGroup, serve_layers
from fissile.serve.vllm_plugin.shards import Ranks, Shard

BITS = "FISSILE_BITS"
"""Environment variable: width of nested weights; `--hf-overrides '{"bits": 2}'` says the same."""
_LOG = logging.getLogger(__name__)


class ServedForCausalLM(TransformersMoEForCausalLM):
    """A Fissile model in vLLM: routed or dense, with float or nested weights.

    Raises:
        ValueError: a width that is not stored, a setting that this model cannot be served with.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        if bits := os.environ.get(BITS):
            config.bits = int(bits)
        config.check_bits()
        self._check(vllm_config)
        self._shards: list[Shard] = []
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    @staticmethod
    def _check(vllm_config: Any) -> None:
        config, processes = (
            vllm_config.model_config.hf_config,
            vllm_config.parallel_config.tensor_parallel_size,
        )
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("pipeline_parallel_size: the router decides for all layers; use 1")
        if processes > 1 and config.num_key_value_heads % processes:
            raise ValueError(
                f"tensor_parallel_size {processes} does not divide the"
                f" {config.num_key_value_heads} key and value heads"
            )
        if processes > 1 and config.backbone["norm_layout"] == "post":
            raise ValueError(
                "tensor_parallel_size: norms over all heads of q and k cannot be shared; use 1"
            )

    def recursive_replace(self) -> None:
        """Serve nested weights ourselves, and leave the rest to vLLM."""
        ranks = Ranks(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())
        layers = self.compilation_config.static_forward_context
        group = LayerGroup(ranks, tensor_model_parallel_all_reduce, layers)
        self._shards = list(serve_layers(self.model, "model.", group))
        if not any(isinstance(module, FissileExperts) for module in self.model.modules()):
            Base.recursive_replace(self)
            return
        activation = self.config.backbone["activation"]
        if activation not in SILU:
            raise ValueError(
                f"float experts with {activation} would run with silu in vLLM; quantize them"
            )
        super().recursive_replace()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Read the checkpoint ourselves: of nested weights the served width alone."""
        nested = {f"{shard.name}.": shard for shard in self._shards}
        device = self.device_config.device
        with TensorReader(checkpoint_folder(self._folder(weights))) as reader:
            loaded = super().load_weights(self._floats(reader, set(nested)))
            for shard in self._shards:
                shard.read(reader, device)
            read = reader.bytes_read
        self._refuse_slow_capture(device)
        _LOG.info("%d nested weights, %d bytes read", len(self._shards), read)
        return loaded

    def _folder(self, weights: Iterable[tuple[str, Tensor]]) -> Path:
        """Local folder of the checkpoint; a hub id is downloaded by vLLM first."""
        from huggingface_hub import snapshot_download

        model = self.model_config
        if Path(model.model).is_dir():
            return Path(model.model)
        next(iter(weights))  # vLLM downloads before it yields the first tensor
        cache = self.vllm_config.load_config.download_dir
        return Path(
            snapshot_download(
                model.model, revision=model.revision, cache_dir=cache, local_files_only=True
            )
        )

    def _floats(self, reader: TensorReader, nested: set[str]) -> Iterator[tuple[str, Tensor]]:
        present = {name for name, _ in self.named_parameters()}
        for name in reader.names():
            stem = name.rpartition(".")[0] + "."
            # A bias that is added once belongs to the first process.
            added_elsewhere = name.endswith("_proj.bias") and name not in present
            if stem not in nested and not (added_elsewhere and f"{stem}weight." in nested):
                yield name, reader.load(name)

    def _refuse_slow_capture(self, device: torch.device) -> None:
        if torch.device(device).type != "cuda" or self.model_config.enforce_eager:
            return
        x = torch.empty(1, dtype=self.model_config.dtype, device=device)
        for shard in self._shards:
            path, why = shard.path(x)
            if path == "decoded":
                raise ValueError(f"{shard.name}: no compiled kernels ({why}); use --enforce-eager")

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | IntermediateTensors:
        """As in vLLM; layers that follow one route share its plan."""
        with one_step(positions):
            return super().forward(
                input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs
            )
