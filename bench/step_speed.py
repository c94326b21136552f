"""Row 2: how much of a training step is matrix products at the speed that this machine has for them?

    ratio = (FLOPs of the floor / FLOP rate of the base's own products alone) / seconds of the step

The products: every frozen layer's, forwards and to the input backwards, and the head's at the loss tokens, one after
another with the model's own weights. The step: a whole optimizer step of one run, nothing shared.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.bases import TINY, base_folder
from bench.floor import floor_of
from bench.harness import Measured, Ratio, Setting, at_least, interleaved, main, medians
from bench.steps import Workload, one_run
from graftwork.model.base import BaseModel


class Products:
    """All of a step's products with frozen weights."""

    def __init__(self, base: BaseModel, tokens: int, loss_tokens: int) -> None:
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []
        """(weight [out, in], input [rows, in], upstream gradient [rows, out])"""
        modules = [(base.trunk.get_submodule(_inside(path)).weight, tokens) for path in base.spec.shapes]
        for weight, rows in [*modules, (base.head, loss_tokens)]:
            out_features, in_features = weight.shape
            sides = (
                torch.randn(rows, width, device=base.device).to(weight.dtype) for width in (in_features, out_features)
            )
            self.pairs.append((weight, *sides))
        self.flops = sum(4.0 * weight.numel() * len(x) for weight, x, _ in self.pairs)

    def __call__(self) -> None:
        for weight, x, gradient in self.pairs:
            x @ weight.T
            gradient @ weight


def _inside(path: str) -> str:
    """A module's path in the trunk, whose decoder has a name of its own."""
    return "body." + path.partition(".")[2]


def measure(setting: Setting) -> Iterator[Measured]:
    work = Workload(16, 32, 32) if not setting.on_gpu else Workload(64, 256, 256)
    path = TINY if setting.quick else base_folder("smollm2-135m")
    variants = {"step_speed": {}}
    if setting.on_gpu:
        variants["step_speed_checkpointed"] = {"activation_checkpointing": True}
    for name, placement in variants.items():
        run = one_run(path, setting.device, work, share=False, **placement)
        floor = floor_of(run.base, run.examples)
        products = Products(run.base, floor.tokens, floor.loss_tokens)
        sides = {"products": products, "step": run.step}
        seconds = interleaved(sides, setting.device, rounds=2 if setting.quick else 9)
        ideal = [floor.total / products.flops * each for each in seconds["products"]]
        ratio = Ratio.of(ideal, seconds["step"])
        took = medians(seconds)
        figures = {
            "dtype": str(run.base.dtype), "tokens/s": round(floor.tokens / took["step"], 1), "seconds": took,
            "products, GFLOP/s": round(products.flops / took["products"] / 1e9, 1),
            "GFLOP of the floor": {part: round(flops / 1e9, 1) for part, flops in floor.parts.items()},
            **ratio.figures(),
        }  # fmt: skip
        bar = at_least(0.60 if not setting.on_gpu else 0.50 if placement else 0.55)
        yield Measured(2, name, ratio.median, bar, figures)


if __name__ == "__main__":
    main(2, "step_speed", __doc__, measure)
