"""Row 1: how many FLOPs does a training step do, over the least that it could?

Counted by operator, on the bases' real layers; deterministic. No prompt is shared, so that both sides have all rows.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.bases import TINY, base_folder
from bench.floor import counted, floor_of
from bench.harness import Measured, Setting, at_most, main
from bench.steps import Workload, one_run

BAR = at_most(1.03)


def measure(setting: Setting) -> Iterator[Measured]:
    path = TINY if setting.quick else base_folder("smollm2-135m")
    run = one_run(path, setting.device, Workload(sequences=8, prompt_tokens=32, answer_tokens=32), share=False)
    operators = counted(run.gradient)
    floor = floor_of(run.base, run.examples)
    done = sum(operators.values()) + floor.attention
    figures = {
        "tokens": floor.tokens, "loss tokens": floor.loss_tokens, "GFLOP by operator": _giga(operators),
        "GFLOP of the floor": _giga(floor.parts),
        "gradient norm": run.gradient_norm(),
    }  # fmt: skip
    yield Measured(1, "step_flops", done / floor.total, BAR, figures)


def _giga(flops: dict[str, float]) -> dict[str, float]:
    return {name: round(value / 1e9, 2) for name, value in flops.items()}


if __name__ == "__main__":
    main(1, "step_flops", __doc__, measure)
