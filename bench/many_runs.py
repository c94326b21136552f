"""What does it cost that tokens belong to 8 runs in 8 slots, and not to one?

One run learns a batch of 8 N sequences in a step; eight runs learn N each. The sequences are the same, and so are the
micro-batches: N of them. That is the harder of two ways to spend the same tokens (the other is one run with 8 steps
of N): the eight runs take eight optimizer steps and publish eight versions where the one takes one.

In the time: the real trainer's passes over run folders on disk; reading and checking batches, micro-batches, clipping,
AdamW, publishing each version with its digest, chain, metrics, status, retention. Not in it: probes, which other
engines than the embedded one need (a forward pass of 160 tokens a version), admission (row 10), checkpoints (row 12),
and whoever makes the batches, which lie there before the clock starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.bases import TINY, answers, base_folder, load
from bench.harness import Measured, Ratio, Setting, at_least, interleaved, main, medians
from bench.made_runs import MadeRuns, model_of, rows_of, scratch
from graftwork.store.layout import RunTree

ROW, NAME = 4, "many_runs"
RUNS = 8
LOSSES_AGREE = {torch.float32: (1e-3, 1e-5), torch.bfloat16: (2e-2, 5e-3)}
"""By the base's dtype: relative, and absolute, as mean losses are near 0 whose tokens' are near 1 and -1."""


@dataclass(frozen=True)
class Size:
    """sequences: of one of the eight runs, and of a micro-batch."""

    sequences: int
    prompt_tokens: int
    answer_tokens: int
    rounds: int

    @property
    def micro_batch_tokens(self) -> int:
        return self.sequences * (self.prompt_tokens + self.answer_tokens)


def size_of(setting: Setting, *, tiny: bool) -> Size:
    if setting.quick:
        return Size(2, 8, 8, 1)
    if tiny:
        return Size(512, 12, 16, 5)  # the demo's batch
    return Size(64, 256, 256, 5) if setting.on_gpu else Size(16, 64, 64, 3)  # a third of a step of examples/smollm2


def measure(setting: Setting) -> Iterator[Measured]:
    yield _measured(setting, f"{NAME}_tiny", TINY, size_of(setting, tiny=True))
    yield _measured(setting, NAME, base_folder("smollm2-135m"), size_of(setting, tiny=False))


def _measured(setting: Setting, name: str, path: Path, size: Size) -> Measured:
    base = load(path, setting.device)
    model = model_of(path, base)
    everything = answers(base, RUNS * size.sequences, size.prompt_tokens, size.answer_tokens)
    with (
        scratch() as folder,
        MadeRuns.of(folder / "eight", base, model, RUNS, size.micro_batch_tokens) as eight,
        MadeRuns.of(folder / "one", base, model, 1, size.micro_batch_tokens) as one,
    ):
        many = [eight.admit(f"r{run}", size.sequences) for run in range(RUNS)]
        single = one.admit("single", RUNS * size.sequences)
        for count, steps in ((1, 1), (size.sequences, size.rounds)):  # the warm-up is a sequence a run
            for number, tenant in enumerate(many):
                eight.lay(tenant, everything[number * count : (number + 1) * count], steps)
            one.lay(single, everything[: RUNS * count], steps)
            seconds = interleaved({"8 runs": eight.step, "1 run": one.step}, setting.device, rounds=steps, warmup=0)
        work = _equal_work([tenant.tree for tenant in many], single.tree, LOSSES_AGREE[base.dtype])
    ratio = Ratio.of(seconds["1 run"], seconds["8 runs"])
    tokens = RUNS * size.micro_batch_tokens
    figures = {
        "base": path.name, "dtype": str(base.dtype), "tokens_a_side": tokens,
        "micro_batch": f"{size.sequences} x {size.prompt_tokens + size.answer_tokens}",
        "tokens_per_second": {side: round(tokens / took, 1) for side, took in medians(seconds).items()},
        "seconds": {side: [round(each, 3) for each in took] for side, took in seconds.items()},
        **work, **ratio.figures(),
    }  # fmt: skip
    return Measured(ROW, name, ratio.median, at_least(0.95 if setting.on_gpu else 0.92), figures)


def _equal_work(many: Sequence[RunTree], single: RunTree, tolerance: tuple[float, float]) -> dict[str, Any]:
    """In every step: as many tokens, as many of them with loss, the same mean loss, gradients that are not zero."""
    relative, absolute = tolerance
    for of_many, row in zip(zip(*map(rows_of, many), strict=True), rows_of(single), strict=True):
        loss = sum(each["loss"] for each in of_many) / len(many)
        assert sum(each["tokens"] for each in of_many) == row["tokens"], (of_many, row)
        assert sum(each["loss_tokens"] for each in of_many) == row["loss_tokens"], (of_many, row)
        assert math.isclose(loss, row["loss"], rel_tol=relative, abs_tol=absolute), (loss, row["loss"])
        assert all(each["grad_norm"] > 0 and not each["skipped"] for each in (*of_many, row)), (of_many, row)
    return {"loss_tokens": row["loss_tokens"], "loss": {"8 runs": loss, "1 run": row["loss"]}}


if __name__ == "__main__":
    main(ROW, NAME, __doc__, measure)
