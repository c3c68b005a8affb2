"""Words for what an artifact can be exported to, and what each engine can load, as data."""

from __future__ import annotations

STOCK = ("mixtral", "qwen2-moe", "qwen3-moe", "glm4-moe", "dense")
"""Exports to classes of transformers: see hosts.py and dense.py."""

SERVERS = ("compressed-tensors", "gptq")
"""Dense models as integers in the formats of servers."""

TARGETS = (*STOCK, "gguf", *SERVERS)

FLOATS = ("float32", "bfloat16")
"""Dtypes of exported floats."""
