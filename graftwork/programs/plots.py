"""Curves of a run as PNG bytes. Drawn with matplotlib's object interface: no window, no global state."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LINE, BAND, GRID = "#1f5fa8", "#9cc3ea", "#e3e3e3"
SIZE_INCHES = (7.0, 4.0)
DOTS_PER_INCH = 130


def reward_png(rows: Sequence[dict[str, Any]]) -> bytes:
    """Mean reward a step, with a band of one standard deviation. Rewards within 0..1 always get that axis."""
    figure, axes = _new_figure("Mean reward of each batch", "reward")
    steps, means, deviations = _column(rows, "step"), _column(rows, "reward"), _column(rows, "reward_std")
    low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
    high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
    known = [mean for mean in means if not math.isnan(mean)]
    if known and min(known) >= 0 and max(known) <= 1:
        axes.set_ylim(0, 1)
        low, high = [max(value, 0.0) for value in low], [min(value, 1.0) for value in high]
    axes.fill_between(steps, low, high, color=BAND, alpha=0.45, linewidth=0, label="± 1 standard deviation")
    axes.plot(steps, means, color=LINE, linewidth=1.8, marker="o", markersize=3, label="mean")
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    return _png(figure)


def loss_png(rows: Sequence[dict[str, Any]]) -> bytes:
    """Loss a step and, below it where it is known, the gradient norm."""
    figure = Figure(figsize=(SIZE_INCHES[0], SIZE_INCHES[1] * 1.4), layout="constrained")
    steps = _column(rows, "step")
    names = [("loss", "loss")]
    if any(row.get("grad_norm") is not None for row in rows):
        names.append(("grad_norm", "gradient norm (before the clip)"))
    for place, (key, label) in enumerate(names, start=1):
        axes = figure.add_subplot(len(names), 1, place)
        _dress(axes, "Loss of each step" if place == 1 else "", label)
        axes.plot(steps, _column(rows, key), color=LINE, linewidth=1.8, marker="o", markersize=3)
    return _png(figure)


def _new_figure(title: str, label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    _dress(axes, title, label)
    return figure, axes


def _dress(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _column(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    """Values of `key`; NaN, which leaves a gap, where a line has none."""
    values = [row.get(key) for row in rows]
    return [float(value) if isinstance(value, int | float) else math.nan for value in values]


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return picture.getvalue()
