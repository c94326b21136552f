"""For how long does a checkpoint hold the trainer up, as a share of a training step?

A step is 64 rollouts of 64 + 64 tokens: read, learnt, published. A checkpoint holds what the run needs to go on, fp32
masters and both moments, and the adapter once more for those who read PEFT; each file is hashed and synced to disk.
Every step is followed by one, and the oldest is deleted, as it would be where one is kept. On a GPU the bar is a time.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from bench.bases import answers, base_folder, load
from bench.harness import Measured, Ratio, Setting, at_most, interleaved, main
from bench.made_runs import MadeRuns, model_of, rows_of, scratch
from graftwork.adapters.snapshot import read_snapshot
from graftwork.config.run import RetentionConfig
from graftwork.store.checkpoint import open_checkpoint

ROW, NAME = 12, "checkpoint_stall"
STALL_SECONDS_ON_GPU = 0.020
PROMPT_TOKENS, ANSWER_TOKENS = 64, 64


def measure(setting: Setting) -> Iterator[Measured]:
    path = base_folder("smollm2-135m")
    base = load(path, setting.device)
    sequences, rounds = (8, 1) if setting.quick else (64, 15 if setting.on_gpu else 3)
    micro_batch_tokens = min(sequences * (PROMPT_TOKENS + ANSWER_TOKENS), 8192 if setting.on_gpu else 2048)
    with scratch() as folder, MadeRuns.of(folder, base, model_of(path, base), 1, micro_batch_tokens) as runs:
        tenant = runs.admit("a", sequences, retention=RetentionConfig(checkpoints=1))
        for count, steps in ((8, 1), (sequences, rounds)):  # the warm-up is shorter, and the same but for that
            runs.lay(tenant, answers(base, count, PROMPT_TOKENS, ANSWER_TOKENS, group=8), steps)
            if steps == 1:
                runs.step()
                tenant.checkpoint()
        seconds = interleaved(
            {"step": runs.step, "checkpoint": tenant.checkpoint}, setting.device, rounds=rounds, warmup=0
        )
        kept = open_checkpoint(tenant.tree.checkpoints)
        assert kept.step == tenant.step and read_snapshot(kept).moments is not None
        assert all(row["grad_norm"] > 0 and not row["skipped"] for row in rows_of(tenant.tree))
    ratio = Ratio.of(seconds["checkpoint"], seconds["step"])
    stall = statistics.median(seconds["checkpoint"])
    figures = {
        "base": path.name, "dtype": str(base.dtype), "step_tokens": sequences * (PROMPT_TOKENS + ANSWER_TOKENS),
        "checkpoint_bytes": sum(file.bytes for file in kept.manifest.files.values()),
        "stall_seconds": round(stall, 4), "share_of_a_step": round(ratio.median, 4),
        "seconds": {side: [round(each, 4) for each in took] for side, took in seconds.items()},
    }  # fmt: skip
    if setting.on_gpu:
        yield Measured(ROW, NAME, stall / STALL_SECONDS_ON_GPU, at_most(1), {**figures, "bar_seconds": 0.020})
    else:
        yield Measured(ROW, NAME, ratio.median, at_most(0.02), {**figures, **ratio.figures()})


if __name__ == "__main__":
    main(ROW, NAME, __doc__, measure)
