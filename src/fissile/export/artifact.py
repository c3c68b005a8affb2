"""Write the native artifact: a self-describing Hugging Face folder with bit-nested weights.

The modeling files are this package's own, with imports made relative, so that the folder works
where fissile is not installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fissile.export.folder import add_config, seal
from fissile.families.artifact import artifact_tensors
from fissile.families.base import Family
from fissile.io.manifest import Origin
from fissile.io.publish import atomic_write_bytes, published
from fissile.io.writer import DTYPE_NAMES, PlannedTensor, ShardWriter
from fissile.models.configuration_fissile import FissileConfig

PACKAGE = Path(__file__).resolve().parent.parent
CODE_FILES = (
    PACKAGE / "models" / "configuration_fissile.py",
    PACKAGE / "models" / "modules_fissile.py",
    PACKAGE / "models" / "nested_fissile.py",
    PACKAGE / "models" / "routers_fissile.py",
    PACKAGE / "models" / "stacks_fissile.py",
    PACKAGE / "models" / "modeling_fissile.py",
    PACKAGE / "kernels" / "columns.py",
    PACKAGE / "kernels" / "layout.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_fissile.FissileConfig",
    "AutoModel": "modeling_fissile.FissileModel",
    "AutoModelForCausalLM": "modeling_fissile.FissileForCausalLM",
}


def write_artifact(
    out: Path,
    config: FissileConfig,
    family: Family,
    provide: Callable[[str], Tensor],
    *,
    source: Path,
    dtype: str,
    max_shard_bytes: int,
    origin: Origin,
    card: Callable[[Path], str],
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an artifact; it appears under its name when it is complete, or not at all.

    Args:
        out: folder of the artifact.
        config: of the model, with routing, nested and bits set.
        family: of the backbone.
        provide: name to tensor, asked for in file order; packed parts in their stored dtype.
        source: the dense checkpoint, for tokenizer files.
        dtype: of tensors that are not packed, "bfloat16" ...
        max_shard_bytes: most tensor bytes per file.
        origin: recorded in the manifest.
        card: text of the model card, given the unfinished folder.
        overwrite: replace an existing folder.

    Returns:
        The manifest.

    Raises:
        UsageError: the folder exists.
        ResourceError: the disk is full.
    """
    fields = config_dict(config, dtype)
    float_name = DTYPE_NAMES[getattr(torch, dtype)]
    plan = [
        PlannedTensor(name, stored or float_name, shape)
        for name, (stored, shape) in artifact_tensors(family, fields)
    ]
    with published(out, overwrite=overwrite) as folder:
        with ShardWriter(folder, plan, max_shard_bytes) as writer:
            for planned in plan:
                tensor = provide(planned.name)
                if tensor.is_floating_point():
                    tensor = tensor.to(getattr(torch, dtype))
                writer.write(planned.name, tensor)
        add_config(folder, fields, source)
        for path in CODE_FILES:
            code = portable(path.read_text(encoding="utf-8"))
            atomic_write_bytes(folder / path.name, code.encode())
        return seal(folder, card(folder), origin)


def config_dict(config: FissileConfig, dtype: str) -> dict[str, Any]:
    """Contents of config.json."""
    fields = config.to_dict()
    fields |= {"architectures": ["FissileForCausalLM"], "auto_map": AUTO_MAP, "dtype": dtype}
    return json.loads(json.dumps(fields))


def portable(code: str) -> str:
    """Make imports of this package relative: the files lie side by side in an artifact."""
    return re.sub(r"^from fissile(?:\.\w+)*\.(\w+) import", r"from .\1 import", code, flags=re.M)
