"""`fissile bench mixed`: one nested code at mixed widths under a budget, beside one width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fissile.config import Effort, Quantize
from fissile.errors import UsageError
from fissile.io.units import UnitStore
from fissile.refactor.training import Progress
from fissile.run.bench import Bench
from fissile.run.peers_data import Material, TextSettings, conditions_of, hold_to, read_material
from fissile.run.peers_own import quantized

if TYPE_CHECKING:
    from fissile.quant.layers import QuantizedLayer

_WIDTHS = (2, 3, 4)


class MixedBench(TextSettings):
    """Model, text and budgets."""

    budgets: tuple[float, ...] = Field(
        (2.6, 2.75, 3.0, 3.25, 3.5, 4.0), description="bits per weight, scales and zeros included"
    )
    effort: Effort = Field("fast", description="of the quantization")
    seed: int = Field(0, description="of calibration text and all else")
    folder: str = Field("runs/mixed", description="results, kept and resumed")


def run(settings: MixedBench, progress: Progress) -> dict[str, Any]:
    """Mixed widths under budgets beside one width for all: ln ppl over the dense model's.

    The model is quantized once; every row is a load of the same integers.

    Args:
        settings: see there.
        progress: called as (stage, done, total, detail).

    Returns:
        "rows": budget (None for one width), bits per weight that a load holds, gap in nats per
        token, and "line": the gap that one would read off a straight line between the two nearest
        widths; "conditions".

    Raises:
        UsageError: no model, a budget that no mix of widths meets, or a folder with results of
            another model or text.
    """
    from fissile.eval.result import machine, versions
    from fissile.quant.layers import final_layer
    from fissile.run.nesting import nested_solver

    if not settings.budgets:
        raise UsageError("budgets: name at least one, in bits per weight")
    material = read_material(settings)
    conditions = conditions_of(material)
    hold_to(material.root, conditions)
    wanted = Quantize.model_validate(
        {"widths": _WIDTHS, "effort": settings.effort, "tokens": settings.tokens, "budget": "4bpw"}
    )
    store = UnitStore(material.root / f"{settings.effort}_{settings.seed}")
    solver = nested_solver(wanted, settings.seed)
    _, count = quantized(material, wanted, solver, settings.seed, store, progress)
    layers = [final_layer(store, i) for i in range(count)]
    rows = _Rows(material, layers, settings.seed, progress, 3 + len(settings.budgets))
    for bits in _WIDTHS:
        rows.add(None, bits)
    for budget in settings.budgets:
        rows.add(budget, _widths(material, store, wanted, budget))
    told = {"effort": settings.effort, "seed": settings.seed, "group_size": wanted.group_size}
    return {
        "rows": rows.found,
        "conditions": {**conditions, **told, "versions": versions(), **machine()},
    }


def _widths(
    material: Material, store: UnitStore, wanted: Quantize, budget: float
) -> Mapping[str, int | list[int]]:
    from fissile.run.nesting import mixed_widths

    own = wanted.model_copy(update={"budget": f"{budget}bpw"})
    found = mixed_widths(material.source.config, store, own)
    assert found is not None
    return found


class _Rows:
    """Scores of one code at several widths."""

    def __init__(
        self,
        material: Material,
        layers: list[QuantizedLayer],
        seed: int,
        progress: Progress,
        total: int,
    ) -> None:
        self._material, self._layers, self._seed = material, layers, seed
        self._progress, self._total = progress, total
        self.found: list[dict[str, Any]] = []

    def add(self, budget: float | None, bits: int | Mapping[str, int | list[int]]) -> None:
        """Score a load at these widths; single widths come first."""
        from fissile.run.nesting import decoded, loaded_bits

        model = decoded(self._material.source, iter(self._layers), bits)
        score = self._material.score(model, self._seed)
        size = loaded_bits(self._layers, bits)
        row = {"budget": budget, "bits_per_weight": size, "gap": score["gap"]}
        row["line"] = None if budget is None else self._line(size)
        self.found.append(row | {"by_domain": score["by_domain"]})
        what = f"{budget:g} bits per weight" if budget else f"{bits} bits"
        self._progress("mixed", len(self.found), self._total, f"{what}: gap {row['gap']:.4f}")

    def _line(self, size: float) -> float:
        """Gap on the straight line between the single widths next to this size."""
        import numpy as np

        single = [row for row in self.found if row["budget"] is None]
        sizes, gaps = ([row[key] for row in single] for key in ("bits_per_weight", "gap"))
        return float(np.interp(size, sizes, gaps))


BENCH = Bench(MixedBench, run)
