"""Errors a person can act on, and the exit code each becomes.

Every message is one line that names the file, tensor or field at fault, the value found and what
is accepted.
"""

from __future__ import annotations


class FissileError(Exception):
    """Base of all expected failures: shown as one line, without a traceback."""

    exit_code = 1


class UsageError(FissileError):
    """A wrong flag, path or argument."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe that does not parse or contradicts itself."""


class UnsupportedModel(FissileError):
    """A model outside the known families, or a feature of it that is not handled."""

    exit_code = 3


class CorruptCheckpoint(UnsupportedModel):
    """A checkpoint whose bytes, shapes or values are not what its headers and config promise."""


class ResourceError(FissileError):
    """Not enough memory or disk, found before the work or while it ran."""

    exit_code = 4


class QualityGate(FissileError):
    """The work finished, but a limit of the recipe was missed."""

    exit_code = 5


class Interrupted(FissileError):
    """Stopped by a signal at a unit boundary; the run can be resumed."""

    exit_code = 130


class LostProcess(FissileError):
    """Another process of the same run is gone."""


class Told(FissileError):
    """A failure that another process of the same run has put into words already."""
