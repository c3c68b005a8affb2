"""The command line in a launch whose second process fails in the middle of the quantization."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from fissile.cli.main import main
from fissile.errors import QualityGate
from fissile.quant.worker import LayerWorker


def fail(*_: object) -> NoReturn:
    raise QualityGate("made to fail")


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        LayerWorker.quantize = fail  # type: ignore[assignment]
    sys.exit(main(sys.argv[1:]))
