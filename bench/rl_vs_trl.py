"""Row 5: are 4 RL runs in one Graftwork done sooner than 4 runs of TRL's GRPOTrainer, one after another?

    TRL TRL Graftwork TRL TRL       wall clock from the start of the processes to the last adapter on disk

Both begin with the SFT adapter of examples/reverse_text and do 20 steps of 64 prompts x 8 answers of at most 16 tokens
with AdamW of the same settings; the prompts are the same ones in the same order. Graftwork learns from every group,
also from those whose rewards are all equal, as TRL does. One round: the spread is that of TRL's single runs, each taken
four times.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import harness
from bench.bases import TINY
from bench.graftwork_rl import FOLDER, OPTIONS, Told, Work, sft_adapter, train
from bench.harness import Measured, Ratio, Setting, at_least, need
from bench.trl_grpo import TrlRun

RUNS = 4
LAST = 3
"""Batches at the end whose mean reward is told."""
PEER = ("trl", "peft", "datasets")
PASS_SEQUENCES = 512
"""Of TRL's forward and backward passes."""


@dataclass(frozen=True)
class TrlTold:
    """Seconds from the start of its process; `about` is its report."""

    began: float
    seconds: float
    about: dict[str, Any]

    @property
    def start_up(self) -> float:
        """Until it samples its first batch."""
        return float(self.about["training_began"]) - self.began


def trl_run(run: TrlRun) -> TrlTold:
    """Train it in a process of its own."""
    settings = run.write(Path(run.report).with_suffix(".settings.json"))
    began, clock = time.time(), time.perf_counter()
    command = [sys.executable, "-m", "bench.trl_grpo", str(settings)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - clock
    if done.returncode:
        raise RuntimeError(f"TRL ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return TrlTold(began, seconds, json.loads(Path(run.report).read_text()))


def trl_of(seed: int, device: torch.device, folder: Path, **settings: Any) -> TrlRun:
    """The settings that Graftwork's runs have; what it writes goes into `folder`."""
    return TrlRun(
        base=str(TINY), adapter=str(sft_adapter(device)), out=str(folder / f"seed{seed}"), device=device.type,
        report=str(folder / f"seed{seed}.json"), seed=seed, options=OPTIONS, **settings,
    )  # fmt: skip


def measure(setting: Setting) -> Iterator[Measured]:
    need(*PEER)
    steps, prompts = (2, 16) if setting.quick else (20, 64)
    sft_adapter(setting.device)
    trl: list[TrlTold] = []

    def peer(seeds: range) -> None:
        for seed in seeds:
            size = min(PASS_SEQUENCES, prompts * 8)
            trl.append(
                trl_run(trl_of(seed, setting.device, FOLDER / "trl", steps=steps, prompts=prompts, pass_sequences=size))
            )

    peer(range(RUNS // 2))
    ours = train(Work(device=setting.device, seeds=range(RUNS), steps=steps, prompts=prompts), FOLDER / "ours")
    peer(range(RUNS // 2, RUNS))
    refuse_unequal(ours, trl, steps, rollouts=prompts * 8)
    yield Measured(5, "rl_vs_trl", sum(t.seconds for t in trl) / ours.ended, at_least(2.5), figures(ours, trl, steps))


def refuse_unequal(ours: Told, trl: list[TrlTold], steps: int, rollouts: int) -> None:
    """Raises when a side did less than was asked."""
    wanted = [rollouts] * steps
    for rows in ours.rows:
        done = [row["rollouts"] for row in rows if row["answers"] == row["rollouts"]]
        assert done == wanted, f"Graftwork learnt from {done}"
        assert all(row["grad_norm"] > 0 and not row["skipped"] for row in rows), "a step of Graftwork had no gradient"
        assert all(row["loss_tokens"] == round(row["answer_tokens_mean"] * row["answers"]) for row in rows)
    for told in trl:
        assert told.about["rollouts"] == wanted, f"TRL sampled {told.about['rollouts']}"
        assert len(told.about["gradient_norms"]) == steps and all(norm > 0 for norm in told.about["gradient_norms"])


def figures(ours: Told, trl: list[TrlTold], steps: int) -> dict[str, Any]:
    total = sum(told.seconds for told in trl)
    spread = Ratio.of([RUNS * told.seconds for told in trl], [ours.ended] * len(trl))
    steady = {"graftwork": ours.ended - ours.admitted, "trl": total - sum(told.start_up for told in trl)}
    ours_tokens = sum(row["loss_tokens"] for rows in ours.rows for row in rows)
    return {
        **spread.figures(),
        "rounds": 1,
        "runs": RUNS,
        "steps": steps,
        "seconds": {"graftwork": round(ours.ended, 1), "trl": round(total, 1)},
        "seconds_of_trl_runs": [round(told.seconds, 1) for told in trl],
        "start_up_seconds": {
            "graftwork": round(ours.admitted, 1), "trl, each": [round(told.start_up, 1) for told in trl],
        },
        "steady_seconds": {name: round(value, 1) for name, value in steady.items()},
        "steady_ratio": round(steady["trl"] / steady["graftwork"], 3),
        "rollouts": {
            "graftwork": sum(row["rollouts"] for rows in ours.rows for row in rows),
            "trl": sum(sum(told.about["rollouts"]) for told in trl),
        },
        "answer_tokens": {"graftwork": ours_tokens, "trl": sum(sum(told.about["answer_tokens"]) for told in trl)},
        "reward_first_batch": {
            "graftwork": [round(rows[0]["reward"], 3) for rows in ours.rows],
            "trl": [round(told.about["rewards"][0], 3) for told in trl],
        },
        f"reward_last_{LAST}_batches": {
            "graftwork": [round(statistics.mean(row["reward"] for row in rows[-LAST:]), 3) for rows in ours.rows],
            "trl": [round(statistics.mean(told.about["rewards"][-LAST:]), 3) for told in trl],
        },
    }  # fmt: skip


if __name__ == "__main__":
    harness.main(5, "rl_vs_trl", __doc__, measure)
