"""Draw docs/results/smollm2.png from the curves in docs/results/: the picture of the README.

python examples/smollm2/picture.py
"""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
SMOOTHED = 5
"""Batches of a running mean; the single ones are faint behind it."""
STARTS = {
    "adapter": ("from the SFT adapter", "#1f77b4"),
    "imported": ("from the SFT adapter, at another rank and alpha", "#2ca02c"),
    "trl": ("from an adapter that TRL's SFTTrainer made", "#9467bd"),
    "fresh": ("from a fresh adapter", "#7f7f7f"),
}
TASKS = {
    "reverse_text": "Reverse the letters: q w e r t y",
    "chain_sum": "reasoning-gym chain_sum: 47 - 8 =",
}


def main() -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, len(TASKS), sharey=True, gridspec_kw={"width_ratios": (3, 2)})
    for axes, (task, title) in zip(panels, TASKS.items(), strict=True):
        draw(axes, task)
        axes.set(title=title, xlabel="step (128 answers)", ylim=(0, 1))
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("mean reward of a batch")
    panels[0].legend(loc="lower right", fontsize="small")
    figure.suptitle("SmolLM2-135M-Instruct on two CPU cores: LoRA RL with Graftwork")
    figure.savefig(RESULTS / "smollm2.png", dpi=110)


def draw(axes: Axes, task: str) -> None:
    for start, (label, colour) in STARTS.items():
        for number, path in enumerate(sorted(RESULTS.glob(f"smollm2_{task}_{start}_seed*.csv"))):
            with path.open(newline="") as file:
                rewards = [float(row["reward"]) for row in csv.DictReader(file)]
            steps = range(1, len(rewards) + 1)
            means = [sum(rewards[max(0, s - SMOOTHED) : s]) / len(rewards[max(0, s - SMOOTHED) : s]) for s in steps]
            axes.plot(steps, rewards, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, means, color=colour, linestyle=("-", "--")[number % 2], label=None if number else label)


if __name__ == "__main__":
    main()
