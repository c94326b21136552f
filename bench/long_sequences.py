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
from bench.bases import RANK, TINY, adapter_for, answers, base_folder, load, start_of
from bench.harness import Measured, PeerMissing, Setting, at_least, interleaved
from graftwork.config.run import LossConfig, OptimizerConfig
from graftwork.training.learner import Banks, Learner, LearnerConfig

ROW = 13
PROMPT_SHARE = 16
"""One in this many tokens is the prompt's."""
CHUNK_TOKENS = 2048
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
    base = load(base_path, setting.device, dtype, activation_checkpointing=True)
    config = LearnerConfig(OptimizerConfig(learning_rate=1e-5), LossConfig(), 1.0, sequences * length, CHUNK_TOKENS)
    learner = Learner(Banks.of(base, 1), 0, config, start_of(base, adapter_for(base)))
    prompt = length // PROMPT_SHARE
    examples = answers(base, sequences, prompt, length - prompt)
    norms: list[float] = []

    def step() -> None:
        outcome, sums = learner.learn_from(examples, "a batch")
        assert not outcome.skipped and sums.loss_tokens == sequences * (length - prompt)
        norms.append(outcome.gradient_norm)

    if setting.on_gpu:
        torch.cuda.reset_peak_memory_stats(setting.device)
    seconds = interleaved({"step": step}, setting.device, rounds=rounds, warmup=2 if setting.on_gpu else 1)["step"]
    assert all(norm > 0 for norm in norms), f"gradient norms {norms}"
    peak = torch.cuda.max_memory_allocated(setting.device) if setting.on_gpu else 0
    return Speed(seconds, sequences * length, norms[-1], peak)


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
    rates = [done.tokens / seconds / bar for seconds in done.seconds]
    low, _, high = statistics.quantiles(rates, n=4, method="inclusive")
    figures = {
        "quartiles": [round(low, 4), round(high, 4)],
        "rounds": len(rates),
        "tokens_per_second": round(done.tokens_per_second, 1),
        "tokens_per_second_bar": bar,
        "sequence_tokens": length,
        "sequences": sequences,
        "rank": RANK,
        "gradient_norm": round(done.gradient_norm, 6),
        "peak_memory_gib": round(done.peak_bytes / 2**30, 2),
    }
    return Measured(ROW, name, done.tokens_per_second / bar, at_least(1), figures)


if __name__ == "__main__":
    harness.main(ROW, "long_sequences", __doc__, measure)
