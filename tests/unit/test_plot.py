"""`graftwork plot`: what is drawn, how runs are found, what is refused. The picture itself is for eyes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from graftwork.errors import ConfigError, StoreError
from graftwork.programs import plots
from graftwork.programs.plot import find, find_all, main, steps_of
from graftwork.programs.plots import Curves, colours, curves_png, running_mean

PNG = b"\x89PNG\r\n\x1a\n"


def row(step: int, **values: Any) -> dict[str, Any]:
    usual = {
        "reward": 0.1 * step, "loss": -0.01, "kl": None, "mismatch_mean": 1e-6, "mismatch_max": 1e-4,
        "answer_tokens_mean": 12.0, "tokens_per_second": 900.0, "skipped": False,
    }  # fmt: skip
    return {"step": step, **usual, **values}


def write(folder: Path, rows: Sequence[Mapping[str, Any]], name: str = "metrics.jsonl", tail: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in rows) + tail)
    return folder / name


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("alpha", "beta"):
        write(Path("outputs") / f"run_{name}", [row(step) for step in range(1, 4)])
    return Path("outputs")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures, as they are turned into PNG."""
    figures: list[Figure] = []
    turn = plots._png
    monkeypatch.setattr(plots, "_png", lambda figure: figures.append(figure) or turn(figure))
    return figures


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def panel(figure: Figure, title: str) -> Axes:
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


# --- the picture ------------------------------------------------------------------------------------------------------


def test_panels_without_data_are_left_out(drawn: list[Figure]) -> None:
    assert curves_png([Curves("a", [row(1), row(2)])]).startswith(PNG)
    curves_png([Curves("a", [row(1)]), Curves("b", [row(1, kl=0.1), row(2, kl=0.2)])])
    assert titles(drawn[0]) == [
        "Reward", "Loss", "Mismatch of trainer and sampler", "Answer length", "Throughput",
    ]  # fmt: skip
    assert titles(drawn[1])[2] == "KL to the reference"
    assert len(panel(drawn[1], "KL").get_lines()) == 1, "b's; a has only gaps"
    assert panel(drawn[0], "Mismatch").get_yscale() == "log"


def test_a_colour_a_run_and_the_held_out_reward_dashed(drawn: list[Figure]) -> None:
    evals = [{"step": 0, "reward": 0.0}, {"step": 2, "reward": 0.3}]
    curves_png([Curves("a", [row(1), row(2)], evals), Curves("b", [row(1), row(2)])])
    lines = [
        (line.get_color(), line.get_linestyle(), list(line.get_xdata())) for line in panel(drawn[0], "Reward").lines
    ]
    first, second = colours(2)
    assert lines == [(first, "-", [1, 2]), (first, "--", [0, 2]), (second, "-", [1, 2])]
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a", "b"]
    assert len(set(map(str, colours(30)))) == 30


def test_skipped_steps_leave_a_gap_and_a_cross(drawn: list[Figure]) -> None:
    curves_png([Curves("a", [row(1), row(2, loss=None, skipped=True), row(3)])])
    curve, crosses = panel(drawn[0], "Loss").get_lines()
    assert [str(value) for value in curve.get_ydata()] == ["-0.01", "nan", "-0.01"]
    assert (crosses.get_marker(), list(crosses.get_xdata())) == ("x", [2])
    assert "step that was skipped" in [text.get_text() for text in drawn[0].legends[0].get_texts()]


def test_a_mismatch_of_zero_is_named_where_the_axis_is_logarithmic(drawn: list[Figure]) -> None:
    zero = [row(step, mismatch_mean=0.0, mismatch_max=0.0) for step in (1, 2)]
    curves_png([Curves("exact", zero), Curves("rounded", [row(1), row(2)])])
    curves_png([Curves("exact", zero)])
    assert panel(drawn[0], "Mismatch").get_title(loc="left").endswith("(exact: 0)")
    assert panel(drawn[1], "Mismatch").get_yscale() == "linear"


def test_long_runs_get_a_running_mean(drawn: list[Figure]) -> None:
    curves_png([Curves("a", [row(step) for step in range(1, 101)])])
    faint, bold = panel(drawn[0], "Reward").get_lines()
    assert faint.get_alpha() < 0.5 < bold.get_linewidth()
    assert running_mean([1.0, 2.0, 3.0, float("nan"), 5.0], 3) == [1.5, 2.0, 2.5, 4.0, 5.0]


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_picture_lies_beside_the_logs_or_where_it_is_told_to(outputs: Path) -> None:
    one = main("outputs", ["alpha"], None)
    assert one == outputs.absolute() / "run_alpha" / "plot.png"
    assert main("outputs", ["alpha", "beta"], None) == Path("outputs/plot.png")
    told = main("outputs", ["alpha"], Path("there/x.png"))
    width, height = struct.unpack(">II", told.read_bytes()[16:24])
    assert told.read_bytes().startswith(PNG) and width > 1000 and height > 500


def test_a_run_is_an_id_a_folder_or_a_file(outputs: Path) -> None:
    for name in ("alpha", "outputs/run_alpha", "outputs/run_alpha/", "outputs/run_alpha/metrics.jsonl"):
        found = find("outputs", name)
        assert (found.name, found.metrics) == ("alpha", outputs.absolute() / "run_alpha" / "metrics.jsonl")
    write(Path("sft"), [row(1)])
    assert find("outputs", "sft").name == "sft"
    assert [run.name for run in find_all("outputs", ["alpha", "outputs/run_alpha", "beta"])] == ["alpha", "beta"]


def test_runs_of_one_name_are_told_apart(outputs: Path) -> None:
    write(Path("other/run_alpha"), [row(1)])
    names = [run.name for run in find_all("outputs", ["alpha", "other/run_alpha"])]
    assert names == ["outputs/run_alpha", "other/run_alpha"]


def test_a_torn_last_line_does_not_matter(outputs: Path) -> None:
    log = write(outputs / "run_alpha", [row(2), row(1), {"no": "step"}], tail='{"step": 3, "rew')
    assert [line["step"] for line in steps_of(log)] == [1, 2]
    assert main("outputs", ["alpha"], None).is_file()


def test_what_is_refused(outputs: Path) -> None:
    (outputs / "run_new").mkdir()
    (outputs / "file").touch()
    with pytest.raises(ConfigError, match=r"no run alfa in outputs.*did you mean alpha\?"):
        main("outputs", ["alfa"], None)
    with pytest.raises(ConfigError, match=r"no run Zzz in outputs.*there are: alpha, beta, new"):
        main("outputs", ["Zzz"], None)
    with pytest.raises(ConfigError, match=r"no run x in nowhere.*there are: none"):
        main("nowhere", ["x"], None)
    with pytest.raises(ConfigError, match="run new has no finished step yet"):
        main("outputs", ["alpha", "new"], None)
    with pytest.raises(ConfigError, match=r"ends in .png"):
        main("outputs", ["alpha"], Path("picture.pdf"))
    with pytest.raises(StoreError, match=r"cannot be written to outputs/file/x.png"):
        main("outputs", ["alpha"], Path("outputs/file/x.png"))
    assert not (outputs / "plot.png").exists()
