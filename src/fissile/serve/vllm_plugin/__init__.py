"""Plug-in for vLLM: routed models with bit-nested weights, at a width chosen at start.

vLLM finds `register` through the entry point group `vllm.general_plugins`. Importing this package
needs neither vLLM nor torch; `model` is imported by vLLM alone.
"""

from __future__ import annotations

import importlib

ARCHITECTURE = "FissileForCausalLM"


def register() -> None:
    """Tell transformers and vLLM about our model; called once in every process of vLLM.

    The classes of this package take precedence over the modeling files of an artifact, so that no
    remote code is run.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from fissile.models.configuration_fissile import FissileConfig
    from fissile.models.modeling_fissile import FissileForCausalLM, FissileModel

    AutoConfig.register(FissileConfig.model_type, FissileConfig, exist_ok=True)
    AutoModel.register(FissileConfig, FissileModel, exist_ok=True)
    AutoModelForCausalLM.register(FissileConfig, FissileForCausalLM, exist_ok=True)
    # Not an import statement: without vLLM this function is never called.
    registry = importlib.import_module("vllm.model_executor.models.registry").ModelRegistry
    registry.register_model(ARCHITECTURE, f"{__name__}.model:ServedForCausalLM")
