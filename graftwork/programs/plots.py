"""Curves of a run as PNG bytes. Drawn with matplotlib's object interface: no window, no global state."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

LINE, BAND, GRID, INK = "#1f5fa8", "#9cc3ea", "#e3e3e3", "#333333"
SIZE_INCHES = (7.0, 4.0)
DOTS_PER_INCH = 130

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#7a5195", "#555555")
"""Of runs; told apart by people who see few colours too (Okabe and Ito). More runs than that share a rainbow."""
PANEL_INCHES = (5.6, 2.9)
MARKED_STEPS_MAX = 60
"""A line of more steps has no markers: they would hide it."""


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


# --- several runs in one picture --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """A run to be drawn: the lines of its metrics.jsonl, and those of its evals.jsonl if it was evaluated."""

    name: str
    rows: Sequence[dict[str, Any]]
    evals: Sequence[dict[str, Any]] = ()


Values = Callable[[Curves], tuple[list[float], list[float]]]
"""Steps, and a number for each: NaN, which leaves a gap, where there is none."""


@dataclass(frozen=True)
class Panel:
    """One diagram. solid, dashed: (meaning, values) of the one or two lines that a run has in it."""

    title: str
    label: str
    solid: tuple[str, Values]
    dashed: tuple[str, Values] | None = None
    log: bool = False

    @property
    def kinds(self) -> list[tuple[Literal["-", "--"], str, Values]]:
        """(line style, meaning, values) of each line."""
        second: list[tuple[Literal["-", "--"], str, Values]] = [("--", *self.dashed)] if self.dashed else []
        return [("-", *self.solid), *second]


def metric(key: str) -> Values:
    return lambda run: (_column(run.rows, "step"), _column(run.rows, key))


def _held_out(run: Curves) -> tuple[list[float], list[float]]:
    return _column(run.evals, "step"), _column(run.evals, "reward")


PANELS = (
    Panel("Reward", "mean reward", ("train", metric("reward")), ("held-out", _held_out)),
    Panel("Loss", "loss", ("loss", metric("loss"))),
    Panel("KL to the reference", "KL (nats a token)", ("KL", metric("kl"))),
    Panel(
        "Mismatch of trainer and sampler", "|difference of log-probs|",
        ("mean", metric("mismatch_mean")), ("max", metric("mismatch_max")), log=True,
    ),
    Panel("Answer length", "tokens (mean)", ("answer_tokens_mean", metric("answer_tokens_mean"))),
    Panel("Throughput", "tokens a second", ("tokens_per_second", metric("tokens_per_second"))),
)  # fmt: skip


def curves_png(runs: Sequence[Curves]) -> bytes:
    """All runs in each of PANELS for which any of them has a number; a colour a run. Steps that were skipped are marked
    at the foot of the panels. Long lines are drawn faint, with their running mean."""
    panels = [panel for panel in PANELS if any(_known(values(run)[1]) for _, _, values in panel.kinds for run in runs)]
    columns = min(2, max(len(panels), 1))
    lines = math.ceil(max(len(panels), 1) / columns)
    figure = Figure(layout="constrained")
    legend_lines = _add_legend(figure, runs, mean_of := _steps_to_average(runs))
    figure.set_size_inches(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines + 0.25 * legend_lines)
    steps = [step for run in runs for row in (*run.rows, *run.evals) if (step := row.get("step")) is not None]
    first, last = (min(steps), max(steps)) if steps else (0, 0)
    margin = max((last - first) * 0.02, 0.5 if last > first else 1.0)
    for place, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(lines, columns, place)
        _dress(axes, panel.title, panel.label)
        _draw_panel(axes, panel, runs, mean_of)
        axes.set_xlim(first - margin, last + margin)
    return _png(figure)


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[Curves], mean_of: int) -> None:
    drawn: dict[str, Literal["-", "--"]] = {}
    zero = []
    for colour, run in zip(colours(len(runs)), runs, strict=True):
        lines = [(style, meaning, *values(run)) for style, meaning, values in panel.kinds]
        if panel.log and (any(_known(line[3]) for line in lines) and not any(_positive(line[3]) for line in lines)):
            zero.append(run.name)
        for style, meaning, steps, numbers in lines:
            if _known(numbers):
                drawn[meaning] = style
                if panel.log and _positive(numbers):  # a logarithmic axis has no place for 0: a gap
                    numbers = [number if number > 0 else math.nan for number in numbers]
                _draw_line(axes, style, colour, steps, numbers, mean_of if style == "-" and not panel.log else 1)
    if panel.log and len(zero) < len(runs):
        axes.set_yscale("log")
        if zero:  # a logarithmic axis has no place for them
            axes.set_title(
                f"{panel.title} ({', '.join(zero) if len(zero) <= 3 else f'{len(zero)} runs'}: 0)",
                loc="left",
                fontsize=11,
            )
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    _mark_skipped(axes, runs)
    if len(drawn) > 1:
        handles = [Line2D([], [], color=INK, linestyle=style, label=meaning) for meaning, style in drawn.items()]
        axes.legend(handles=handles, frameon=False, fontsize=8, loc="best")


def _draw_line(
    axes: Axes, style: str, colour: Any, steps: Sequence[float], numbers: Sequence[float], mean_of: int
) -> None:
    """mean_of: steps that the running mean is taken over; 1 draws none."""
    few = len(numbers) <= MARKED_STEPS_MAX
    axes.plot(
        steps, numbers, style, color=colour, linewidth=1.5 if few else 0.9, alpha=0.9 if mean_of == 1 else 0.3,
        marker="o" if few else "", markersize=3.5, markerfacecolor=colour if style == "-" else "white",
    )  # fmt: skip
    if mean_of > 1:
        axes.plot(steps, running_mean(numbers, mean_of), style, color=colour, linewidth=1.8)


def _steps_to_average(runs: Sequence[Curves]) -> int:
    longest = max((len(run.rows) for run in runs), default=0)
    return 1 if longest <= MARKED_STEPS_MAX else max(longest // 40, 5) | 1  # odd: as many before as after


def running_mean(values: Sequence[float], count: int) -> list[float]:
    """Over `count` (odd) values around each, fewer at the ends; what is not known is left out."""
    half = count // 2
    windows = [values[max(0, place - half) : place + half + 1] for place in range(len(values))]
    known = [[value for value in window if math.isfinite(value)] for window in windows]
    return [sum(window) / len(window) if window else math.nan for window in known]


def _mark_skipped(axes: Axes, runs: Sequence[Curves]) -> None:
    """Crosses along the foot of the panel, a line of them a run, so that they never hide one another."""
    if not any(row.get("skipped") for run in runs for row in run.rows):
        return
    axes.margins(y=0.14)  # room for them
    for place, (colour, run) in enumerate(zip(colours(len(runs)), runs, strict=True)):
        steps = [row["step"] for row in run.rows if row.get("skipped")]
        heights = [0.03 + 0.9 * place / max(len(runs), 20)] * len(steps)
        foot = axes.get_xaxis_transform()
        axes.plot(steps, heights, "x", color=colour, markersize=5, markeredgewidth=1.3, transform=foot)


def _add_legend(figure: Figure, runs: Sequence[Curves], mean_of: int) -> int:
    """How many lines it has."""
    handles = [
        Line2D([], [], color=colour, linewidth=2.5, label=run.name)
        for colour, run in zip(colours(len(runs)), runs, strict=True)
    ]
    if any(row.get("skipped") for run in runs for row in run.rows):
        handles.append(Line2D([], [], color=INK, linestyle="", marker="x", label="step that was skipped"))
    if mean_of > 1:
        handles.append(Line2D([], [], color=INK, linewidth=0.9, alpha=0.3, label=f"each step; bold: mean of {mean_of}"))
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = max(1, min(5, 130 // (longest + 10)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False, fontsize=9)
    return math.ceil(len(handles) / columns)


def colours(count: int) -> list[Any]:
    """One for each of `count` runs."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [matplotlib.colormaps["turbo"](0.05 + 0.9 * place / (count - 1)) for place in range(count)]


def _known(values: Sequence[float]) -> bool:
    return any(math.isfinite(value) for value in values)


def _positive(values: Sequence[float]) -> bool:
    return any(value > 0 for value in values)


# --- what all pictures share ------------------------------------------------------------------------------------------


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
