"""Row 13: how many tokens a second does a training step of 16384-token sequences learn from on one GPU?

Qwen3-0.6B and Qwen3-4B shapes with random weights in bfloat16, LoRA of rank 16 on all linear layers, activation
checkpointing; loss on all positions but the prompt's. A step is `Learner.learn_from`: forward, backward, clip, AdamW.
There is no peer: the rate is held against a bar, and the best open trainer that publishes such figures has 13.3k and
6.2k tokens/s on one H100. Without a GPU there is nothing to measure; `--quick` shows on the tiny base that it runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import harness
from bench.bases import RANK, TINY, base_folder
from bench.harness import Measured, PeerMissing, Ratio, Setting, at_least, interleaved
from bench.steps import Workload, one_run

ROW = 13
PROMPT_SHARE = 16
"""One in this many tokens is the prompt's."""
BARS = {"qwen3-0.6b": ("long_sequences_0.6b", 20_000, 2), "qwen3-4b": ("long_sequences_4b", 7_500, 1)}
"""Name of the line, tokens/s to reach, sequences in a micro-batch."""


@dataclass(frozen=True)
class Speed:
    """Of the steps of a round: seconds each, tokens of one, and the most memory that was taken, in bytes."""

    seconds: list[float]
    tokens: int
    gradient_norm: float
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / statistics.median(self.seconds)


def speed(base_path: Path, length: int, sequences: int, setting: Setting, rounds: int) -> Speed:
    """Steps of `sequences` sequences of `length` tokens, all in one micro-batch."""
    dtype = "bfloat16" if setting.on_gpu else "float32"
    prompt = length // PROMPT_SHARE
    work = Workload(sequences, prompt, length - prompt)
    run = one_run(base_path, setting.device, work, dtype=dtype, activation_checkpointing=True)
    norms: list[float] = []

    def step() -> None:
        outcome, sums = run.step()
        assert sums.loss_tokens == sequences * work.answer_tokens
        norms.append(outcome.gradient_norm)

    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats(setting.device)
    seconds = interleaved({"step": step}, setting.device, rounds=rounds, warmup=2 if setting.on_gpu else 1)["step"]
    peak = torch.cuda.max_memory_allocated(setting.device) if setting.on_gpu else 0
    return Speed(seconds, work.tokens, norms[-1], peak)


def measure(setting: Setting) -> Iterator[Measured]:
    if setting.quick:
        yield line("long_sequences_quick", speed(TINY, 512, 2, setting, rounds=2), bar=1, length=512, sequences=2)
        return
    if not setting.on_gpu:
        raise PeerMissing("needs a GPU; --quick shows on the CPU that it runs")
    for shape, (name, bar, sequences) in BARS.items():
        torch.cuda.empty_cache()
        done = speed(base_folder(shape), 16384, sequences, setting, rounds=5)
        yield line(name, done, bar, length=16384, sequences=sequences)


def line(name: str, done: Speed, bar: int, length: int, sequences: int) -> Measured:
    """The ratio is the rate over the bar, so that it has to reach 1."""
    ratio = Ratio.of([done.tokens / seconds for seconds in done.seconds], [bar] * len(done.seconds))
    figures = {
        **ratio.figures(),
        "tokens_per_second": round(done.tokens_per_second, 1),
        "tokens_per_second_bar": bar,
        "sequence_tokens": length,
        "sequences": sequences,
        "rank": RANK,
        "gradient_norm": round(done.gradient_norm, 6),
        "peak_memory_gib": round(done.peak_bytes / 2**30, 2),
    }
    return Measured(ROW, name, ratio.median, at_least(1), figures)


if __name__ == "__main__":
    harness.main(ROW, "long_sequences", __doc__, measure)
