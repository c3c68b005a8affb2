"""Runtime torch modules: what an artifact is when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fissile.errors import CorruptCheckpoint, UsageError

if TYPE_CHECKING:
    from fissile.models.configuration_fissile import FissileConfig
    from fissile.models.modeling_fissile import FissileForCausalLM


def load_config(folder: Path | str) -> FissileConfig:
    """Configuration of an artifact, or of the one in a run folder."""
    from fissile.io.headers import checkpoint_folder
    from fissile.models.configuration_fissile import FissileConfig

    return FissileConfig.from_pretrained(checkpoint_folder(Path(folder)))


def load(folder: Path | str, bits: int | None = None, dtype: str = "float32") -> FissileForCausalLM:
    """Load an artifact with this package's own classes; no code from the folder is run.

    Args:
        folder: the artifact, or a run folder with one in `model/`.
        bits: width to serve; default the recipe's.
        dtype: of activations and of tensors that are not nested.

    Raises:
        UsageError: `bits` is not one of the stored widths.
        CorruptCheckpoint: the artifact cannot be read as one.
    """
    import torch

    from fissile.io.headers import checkpoint_folder
    from fissile.models.modeling_fissile import FissileForCausalLM

    path = checkpoint_folder(Path(folder))
    config = load_config(path)
    if bits is not None:
        config.bits = bits
    try:
        config.check_bits()
    except ValueError as err:
        raise UsageError(f"{path}: {err}") from None
    try:
        model = FissileForCausalLM.from_pretrained(path, config=config, dtype=getattr(torch, dtype))
    except (ValueError, OSError, RuntimeError) as err:
        raise CorruptCheckpoint(f"{path}: {' '.join(str(err).split())}") from err
    return model.eval()
