"""`graftwork plot`: the curves of one run, or of several in one picture. Also how a command finds the logs of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from graftwork.errors import BadRunId, ConfigError, StoreError
from graftwork.programs.report import shown
from graftwork.store.disk import Disk
from graftwork.store.files import read_lines
from graftwork.store.layout import RUN_PREFIX, OutputTree, RunId

METRICS = "metrics.jsonl"
PICTURE = "plot.png"


@dataclass(frozen=True)
class RunLogs:
    """The logs of a run, wherever they lie. name: the run's id, or what its folder is called."""

    name: str
    metrics: Path

    @property
    def folder(self) -> Path:
        return self.metrics.parent

    @property
    def evals(self) -> Path:
        return self.folder / "evals.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl that are about a step, in the order of the steps."""
        return steps_of(self.metrics)


def main(output_dir: str, names: Sequence[str], out: Path | None) -> Path:
    """Draw the runs; return where the picture lies. Raises ConfigError, naming the run, and StoreError."""
    if out is not None and out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: the picture is a PNG; give it a name that ends in .png")
    runs = find_all(output_dir, names)
    if empty := [run for run in runs if not run.rows()]:
        raise ConfigError(
            f"run {empty[0].name} has no finished step yet: no line of {shown(empty[0].metrics)} is about one; "
            "`graftwork runs` says what a run waits for"
        )
    from graftwork.programs.plots import Curves, curves_png  # matplotlib: a second of loading that can wait

    picture = curves_png([Curves(run.name, run.rows(), steps_of(run.evals)) for run in runs])
    path = out or default_path(output_dir, runs)
    try:
        Disk().publish_file(path, picture)
    except OSError as error:
        raise StoreError(f"the picture cannot be written to {path} ({error}); --out names another place") from None
    return path


def default_path(output_dir: str, runs: Sequence[RunLogs]) -> Path:
    """Beside the logs of one run; of several, in the tree, or here where there is none."""
    tree = Path(output_dir)
    folder = runs[0].folder if len(runs) == 1 else tree if tree.is_dir() else Path()
    return folder / PICTURE


# --- the logs of a run ------------------------------------------------------------------------------------------------


def find_all(output_dir: str, names: Sequence[str]) -> list[RunLogs]:
    """One a run, in order, a run that is named twice once; each has a name of its own. Raises ConfigError."""
    found = {run.metrics.resolve(): run for run in (find(output_dir, name) for name in names)}
    called = [run.name for run in found.values()]
    return [run if called.count(run.name) == 1 else replace(run, name=shown(run.folder)) for run in found.values()]


def find(output_dir: str, name: str) -> RunLogs:
    """`name`: a run id, which goes first, or the path of a run's folder or of its metrics.jsonl. Raises ConfigError."""
    try:
        tree = OutputTree(Path(output_dir)).run(RunId.parse(name))
    except BadRunId:
        tree = None
    if tree is not None and tree.root.is_dir():
        return RunLogs(str(tree.id), tree.metrics_jsonl)
    path = Path(name)
    if path.is_file():
        return RunLogs(_called(path.absolute().parent), path.absolute())
    if path.is_dir():
        return RunLogs(_called(path.resolve()), path.absolute() / METRICS)
    raise ConfigError(
        f"no run {name} in {output_dir}, and no folder or file of that path; {_nearest(output_dir, name)}"
    )


def _called(folder: Path) -> str:
    return folder.name.removeprefix(RUN_PREFIX) or str(folder)


def _nearest(output_dir: str, name: str) -> str:
    there = [str(tree.id) for tree in OutputTree(Path(output_dir)).scan()[0]]
    near = get_close_matches(_called(Path(name)), there, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(there) or 'none'}"


def steps_of(log: Path) -> list[dict[str, Any]]:
    """Lines that have a step, in the order of the steps; a torn last line is left out. Raises Damaged."""
    rows = [row for row in read_lines(log) if isinstance(row.get("step"), int)]
    return sorted(rows, key=lambda row: int(row["step"]))
