"""Draw docs/results/smollm2.png, the picture of the README, and write docs/results/README.md, from the curves there.

python examples/smollm2/picture.py
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
SMOOTHED = 5
"""Batches of a running mean; the single ones are faint behind it."""
STARTS = {
    "adapter": ("from its SFT adapter", "#0072b2"),
    "imported": ("from it, imported at another rank and alpha", "#e69f00"),
    "trl": ("from an adapter that TRL's SFTTrainer made", "#009e73"),
    "fresh": ("from a fresh adapter", "#555555"),
}
TASKS = {
    "reverse_text": "reverse the letters: q w e r t y",
    "chain_sum": "reasoning-gym's chain_sum: 47 - 8",
}
ABOUT = """# Curves

SmolLM2-135M-Instruct on two CPU cores, `make demo-smollm2` with TASK, START and SEED as below: a short SFT, then RL.
Mean reward of the first and last {smoothed} batches, and on 256 held-out prompts before and after. Made by
`python examples/smollm2/picture.py`.

| task | start | seed | steps | first {smoothed} | last {smoothed} | held out, start | held out, end |
|---|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Curve:
    task: str
    start: str
    seed: int
    rewards: list[float]
    held_out: list[float]
    """Before and after."""

    @staticmethod
    def read(path: Path) -> Curve:
        found = re.fullmatch(r"smollm2_(\w+)_([a-z]+)_seed(\d+)", path.stem)
        assert found is not None, path
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        rewards, held_out = ([float(row[key]) for row in rows if row[key]] for key in ("reward", "heldout_reward"))
        return Curve(found[1], found[2], int(found[3]), rewards, held_out)

    def line(self) -> str:
        means = (fmean(self.rewards[:SMOOTHED]), fmean(self.rewards[-SMOOTHED:]), *self.held_out)
        cells = (self.task, self.start, self.seed, len(self.rewards), *(f"{mean:.3f}" for mean in means))
        return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    curves = [Curve.read(path) for path in sorted(RESULTS.glob("smollm2_*.csv"))]
    (RESULTS / "README.md").write_text(
        ABOUT.format(smoothed=SMOOTHED) + "".join(f"{curve.line()}\n" for curve in curves)
    )
    figure = Figure(figsize=(11, 4), layout="constrained")
    shown = [task for task in TASKS if any(curve.task == task for curve in curves)]
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, task in zip(panels, shown, strict=True):
        for start in STARTS:
            draw(axes, [curve for curve in curves if (curve.task, curve.start) == (task, start)])
        axes.set(title=TASKS[task], xlabel="step", ylim=(0, 1))
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("mean reward of a batch")
    panels[0].legend(loc="lower right", fontsize="small")
    figure.suptitle("SmolLM2-135M-Instruct, LoRA RL with Graftwork on two CPU cores")
    figure.savefig(RESULTS / "smollm2.png", dpi=100)


def draw(axes: Axes, seeds: list[Curve]) -> None:
    """The curves of one start; a second seed is dashed."""
    for number, curve in enumerate(seeds):
        label, colour = STARTS[curve.start]
        steps = range(1, len(curve.rewards) + 1)
        smooth = [fmean(curve.rewards[max(0, step - SMOOTHED) : step]) for step in steps]
        axes.plot(steps, curve.rewards, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth, color=colour, linestyle=("-", "--")[number % 2], label=None if number else label)


if __name__ == "__main__":
    main()
