"""The training command of `audited_training`, and what every process had of the model: weights-RANK.json.

Written before the first step and again after the last one, as {"before": facts, "after": facts}; facts are by the name
of the parameter: [whole size, numbers that this process stores, whether it is a DTensor, dtype].
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from backend.training.loop import TrainingLoop
from tests.fakes.audited_training import main as train


def _facts(loop: TrainingLoop) -> dict[str, list[Any]]:
    found = {}
    for name, parameter in loop._parts.transformer.model.named_parameters():
        split = isinstance(parameter, DTensor)
        local = parameter.to_local() if split else parameter.detach()
        stored = local.untyped_storage().nbytes() // local.element_size()
        found[name] = [parameter.numel(), stored, split, str(parameter.dtype)]
    return found


def main() -> int:
    run = TrainingLoop.run

    def noting(loop: TrainingLoop) -> None:
        before = _facts(loop)
        run(loop)
        path = Path(os.environ["K5_AUDIT"]) / f"weights-{os.environ['RANK']}.json"
        path.write_text(json.dumps({"before": before, "after": _facts(loop)}), "utf-8")

    TrainingLoop.run = noting  # type: ignore[method-assign]
    return train()


if __name__ == "__main__":
    raise SystemExit(main())
