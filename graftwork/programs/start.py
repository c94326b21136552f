"""One start of `graftwork rl`: what it was asked to do, what it refuses, what it writes for the programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from graftwork.config.load import build, digest, dump
from graftwork.config.schema import InferenceConfig, RlConfig, RunConfig, TrainerConfig
from graftwork.errors import CannotResume, ConfigError, Damaged
from graftwork.store.disk import Disk, is_stable
from graftwork.store.layout import OutputTree, RunId, RunTree, stable_steps
from graftwork.store.status import TERMINAL, Status, read_status


@dataclass(frozen=True)
class Start:
    """`config` has absolute paths: the programs may run anywhere."""

    disk: Disk
    config: RlConfig
    outputs: OutputTree
    tree: RunTree

    @staticmethod
    def of(config: RlConfig, *, resume: bool, resume_step: int | None) -> Start:
        """The flags win over the file; a step to resume from implies resume. Raises BadRunId."""
        step = config.run.resume_step if resume_step is None else resume_step
        resume = resume or config.run.resume or step is not None
        init = _absolute(config.run.init_adapter_path)
        run = config.run.model_copy(update={"resume": resume, "resume_step": step, "init_adapter_path": init})
        trainer = config.trainer.model_copy(update={"init_adapter_path": _absolute(config.trainer.init_adapter_path)})
        base = config.model.path  # a hub id stays what it is
        model = config.model.model_copy(update={"path": _absolute(base) if Path(base).is_dir() else base})
        outputs = OutputTree(Path(config.output_dir).absolute())
        changes = {"run": run, "trainer": trainer, "model": model, "output_dir": str(outputs.root)}
        return Start(Disk(), config.model_copy(update=changes), outputs, outputs.run(RunId.parse(run.id)))

    @property
    def ready_file(self) -> Path:
        return self.outputs.logs / "inference.json"

    def run_config(self, inference_url: str) -> RunConfig:
        """control/orch.toml."""
        values = self.config.run.model_dump(exclude={"id"}, exclude_none=True)
        values |= {"model": self.config.model.model_dump(), "inference_url": inference_url}
        return build(RunConfig, values, source="[run] of the configuration")

    def settled(self) -> bool:
        """Whether a trainer that looks now finds nothing to do in this run's folder."""
        return not self.tree.orch_toml.exists() or is_settled(self.tree)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def is_settled(tree: RunTree) -> bool:
    """Whether the run ended under the orch.toml that is there now."""
    status = status_of(tree)
    if status is None or status.state not in TERMINAL:
        return False
    return status.orch_digest == digest(tree.orch_toml.read_bytes())


def status_of(tree: RunTree) -> Status | None:
    """A run's status; None while there is none that can be read."""
    try:
        return read_status(tree)
    except Damaged:
        return None


# --- before anything starts -------------------------------------------------------------------------------------------


def refuse_what_cannot_work(start: Start) -> None:
    """Every refusal that needs no program, before the first file is written. Raises ConfigError, CannotResume, Busy."""
    refuse_busy(start)
    steps = stable_steps(start.tree.checkpoints)
    if start.config.run.resume:
        refuse_impossible_resume(start, steps)
    else:
        refuse_to_start_over(start, steps)
    refuse_unfinished_neighbours(start)


def refuse_busy(start: Start) -> None:
    """A trainer or an orchestrator of somebody else would act on the orch.toml that we are about to write."""
    for lock in (start.outputs.trainer_lock, start.tree.orchestrator_lock):
        if lock.exists():
            start.disk.claim(lock, "graftwork rl, which only looked").release()


def refuse_impossible_resume(start: Start, steps: list[int]) -> None:
    where, wanted = start.tree.checkpoints, start.config.run.resume_step
    if not steps:
        raise CannotResume(
            f"run {start.tree.id}: nothing to go on from: no checkpoint with a STABLE file in {where}. "
            "Without --resume the run starts from its beginning"
        )
    if wanted is not None and wanted not in steps:
        there = ", ".join(map(str, steps))
        raise CannotResume(f"run {start.tree.id}: no checkpoint of step {wanted} in {where}; there are steps {there}")


def refuse_to_start_over(start: Start, steps: list[int]) -> None:
    name, adapter = start.tree.root.name, start.config.run.init_adapter_path
    if steps and steps[-1] > 0:
        raise ConfigError(
            f"{name} already has checkpoints up to step {steps[-1]} in {start.tree.checkpoints}: "
            "--resume goes on from there, or choose another run.id"
        )
    if is_stable(start.tree.batch(1)):
        way_on = "--resume goes on from step 0" if steps else f"move {start.tree.root} away to start again"
        raise ConfigError(
            f"{name} was started before and stopped before its first checkpoint ({start.tree.batch(1)} is there): "
            f"{way_on}, or choose another run.id"
        )
    if adapter is not None and not steps and not Path(adapter).is_dir():
        raise ConfigError(f"run.init_adapter_path: no adapter folder at {adapter}; `graftwork sft` makes one")


def refuse_unfinished_neighbours(start: Start) -> None:
    """This trainer would take up another run that is not finished, and wait for its batches for ever."""
    for tree in start.outputs.scan()[0]:
        if tree.id == start.tree.id or not tree.orch_toml.exists() or is_settled(tree):
            continue
        status = status_of(tree)
        state = status.state if status else "not seen by a trainer yet"
        raise ConfigError(
            f"{tree.root} holds a run that is not finished ({state}), and the trainer of this command would wait for "
            "its batches. Finish it with --resume, move its folder away, or choose another output_dir"
        )


# --- files for the programs -------------------------------------------------------------------------------------------


def write_inference_toml(start: Start) -> Path:
    if start.ready_file.exists():  # of an earlier start: its URL is stale
        start.disk.quarantine(start.ready_file, start.outputs.trash)
    section = start.config.inference.model_dump(exclude_none=True) | {"ready_file": str(start.ready_file)}
    values = {**section, "model": start.config.model.model_dump(), "lora": start.config.lora.model_dump()}
    path = start.outputs.logs / "inference.toml"
    start.disk.publish_file(path, dump(build(InferenceConfig, values, source="[inference] of the configuration")))
    return path


def write_trainer_toml(start: Start) -> Path:
    section = start.config.trainer.model_dump(exclude_none=True) | {"exit_when_done": True}
    tables = {"model": start.config.model.model_dump(), "lora": start.config.lora.model_dump()}
    values = {**section, **tables, "output_dir": str(start.outputs.root)}
    path = start.outputs.logs / "trainer.toml"
    start.disk.publish_file(path, dump(build(TrainerConfig, values, source="[trainer] of the configuration")))
    return path


def write_orch_toml(start: Start, inference_url: str) -> str:
    """Publish control/orch.toml; return its digest, by which everyone knows this start.

    The status of an earlier start under the very same bytes is set aside first: it would settle this one too.
    """
    data = dump(start.run_config(inference_url))
    status = status_of(start.tree)
    if status is not None and status.orch_digest == digest(data):
        start.disk.quarantine(start.tree.status_json, start.tree.trash)
    start.disk.publish_file(start.tree.orch_toml, data)
    return digest(data)
