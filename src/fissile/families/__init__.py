"""Model families as data, and what follows from them: names, shapes, checks, expert sizes.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

from fissile.families.base import Dims, Family
from fissile.families.checks import (
    Check,
    check_checkpoint,
    explain,
    explain_source,
    find,
    promised_headers,
)
from fissile.families.experts import routed_fields
from fissile.families.names import Source, dense_names, layer_names, outer_names
from fissile.families.sizes import ExpertSizes, expert_sizes, fitting_group
from fissile.families.table import FAMILIES, dims_of

__all__ = [
    "FAMILIES",
    "Check",
    "Dims",
    "ExpertSizes",
    "Family",
    "Source",
    "check_checkpoint",
    "dense_names",
    "dims_of",
    "expert_sizes",
    "explain",
    "explain_source",
    "find",
    "fitting_group",
    "layer_names",
    "outer_names",
    "promised_headers",
    "routed_fields",
]
