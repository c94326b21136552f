"""Names of runs and every path of the run tree: parse once, then pass objects."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from graftwork.errors import BadRunId
from graftwork.store.files import is_stable

RUN_PREFIX = "run_"
RUN_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
STEP_NAME = re.compile(r"step_(0|[1-9][0-9]{0,17})")


@dataclass(frozen=True, order=True)
class RunId:
    """The id of a run: `[a-z0-9][a-z0-9_-]{0,62}`, nothing else; its folder is `run_<id>`."""

    value: str

    @staticmethod
    def parse(text: str) -> RunId:
        """Raises BadRunId, saying what an id looks like."""
        if not RUN_ID.fullmatch(text):
            raise BadRunId(
                f"{text!r} is not a run id: 1 to 63 of a-z, 0-9, '_' and '-', and it starts with a letter or digit"
            )
        return RunId(text)

    @staticmethod
    def of_folder(folder: Path) -> RunId:
        """The id in the folder name `run_<id>`. Raises BadRunId."""
        if not folder.name.startswith(RUN_PREFIX):
            raise BadRunId(f"{folder} is not a run folder: its name does not start with {RUN_PREFIX!r}")
        return RunId.parse(folder.name.removeprefix(RUN_PREFIX))

    def __str__(self) -> str:
        return self.value


def step_folder(parent: Path, step: int) -> Path:
    if step < 0:
        raise ValueError(f"a step is not negative: {step}")
    return parent / f"step_{step}"


def stable_steps(parent: Path) -> list[int]:
    """Steps that were published under `parent`, ascending. For admission only: polling opens the next name instead."""
    if not parent.is_dir():
        return []
    matches = (STEP_NAME.fullmatch(path.name) for path in parent.iterdir() if is_stable(path))
    return sorted(int(match[1]) for match in matches if match)


@dataclass(frozen=True)
class RunTree:
    """Paths of one run."""

    id: RunId
    root: Path

    @staticmethod
    def at(folder: Path) -> RunTree:
        """The tree in a folder named `run_<id>`. Raises BadRunId."""
        folder = Path(folder).absolute()
        return RunTree(RunId.of_folder(folder), folder)

    def folder_id(self) -> tuple[int, int] | None:
        """(device, inode): tells a folder from another that was made under its name; None while there is none."""
        try:
            facts = self.root.lstat()
        except OSError:
            return None
        return (facts.st_dev, facts.st_ino) if stat.S_ISDIR(facts.st_mode) else None

    @property
    def folders(self) -> tuple[Path, ...]:
        """Every folder of the run, its own first."""
        names = ("control", "rollouts", "broadcasts", "checkpoints", ".trash")
        return (self.root, *(self.root / name for name in names))

    @property
    def orch_toml(self) -> Path:
        return self.root / "control" / "orch.toml"

    @property
    def status_json(self) -> Path:
        return self.root / "control" / "status.json"

    @property
    def rollouts(self) -> Path:
        return self.root / "rollouts"

    @property
    def broadcasts(self) -> Path:
        return self.root / "broadcasts"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def metrics_jsonl(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def chain_jsonl(self) -> Path:
        return self.root / "chain.jsonl"

    @property
    def samples_jsonl(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def evals_jsonl(self) -> Path:
        return self.root / "evals.jsonl"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def trash(self) -> Path:
        return self.root / ".trash"

    @property
    def orchestrator_lock(self) -> Path:
        return self.root / "control" / ".orchestrator.lock"

    def batch(self, step: int) -> Path:
        return step_folder(self.rollouts, step)

    def broadcast(self, step: int) -> Path:
        return step_folder(self.broadcasts, step)

    def checkpoint(self, step: int) -> Path:
        return step_folder(self.checkpoints, step)


@dataclass(frozen=True)
class OutputTree:
    """Paths of one trainer and of all its runs."""

    root: Path

    @property
    def trainer_json(self) -> Path:
        return self.root / "trainer.json"

    @property
    def liveness_json(self) -> Path:
        return self.root / "liveness.json"

    @property
    def serve_json(self) -> Path:
        return self.root / "serve.json"

    @property
    def trainer_lock(self) -> Path:
        return self.root / ".trainer.lock"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def trash(self) -> Path:
        return self.root / ".trash"

    def run(self, run_id: RunId) -> RunTree:
        return RunTree(run_id, self.root.absolute() / f"{RUN_PREFIX}{run_id}")

    def scan(self) -> tuple[list[RunTree], list[BadRunId]]:
        """Run folders that are there now, by id, and one error for each folder `run_*` that has no valid id."""
        trees: list[RunTree] = []
        errors: list[BadRunId] = []
        for folder in self._run_folders():
            try:
                if folder.is_symlink():
                    raise BadRunId("it is a symbolic link; a run is a folder of its own")
                trees.append(self.run(RunId.of_folder(folder)))
            except BadRunId as error:
                errors.append(BadRunId(f"{folder}: {error}; the folder is left alone"))
        return sorted(trees, key=lambda tree: tree.id), errors

    def _run_folders(self) -> Iterator[Path]:
        if self.root.is_dir():
            yield from sorted(p for p in self.root.glob(f"{RUN_PREFIX}*") if p.is_dir())
