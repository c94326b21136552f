"""`graftwork submit`, `stop` and `resume`: what a person asks for, written into a run's orch.toml.

None of them talks to the trainer: it sees the file in its next pass. The orchestrators that they start live on alone.
Each command looks at all runs first and refuses before it writes anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from graftwork.config.load import build
from graftwork.config.run import RunConfig, SubmitConfig
from graftwork.errors import ConfigError, GraftworkError, ProgramFailed
from graftwork.logs import say
from graftwork.programs.glance import read_liveness, read_max_rank, told
from graftwork.programs.orch_toml import is_settled, publish_orch_toml, read_orch_toml, status_of
from graftwork.programs.orchestrators import (
    copied_from,
    end_orchestrator,
    live_orchestrator,
    start_orchestrator,
    wait_until_gone,
)
from graftwork.programs.processes import COMMAND
from graftwork.programs.report import shown
from graftwork.programs.runs import run_of
from graftwork.programs.start import (
    Served,
    absolute_model,
    absolute_path,
    beyond_the_end,
    read_served,
    refuse_held,
    refuse_impossible_resume,
    refuse_missing_adapter,
    start_of,
)
from graftwork.rollouts.environment import refuse_unknown
from graftwork.store.disk import Disk
from graftwork.store.layout import OutputTree, RunId, RunTree, stable_steps
from graftwork.store.status import TERMINAL, Status

POLL_SECONDS = 0.2
FOLLOW_SECONDS = 10.0
"""What an orchestrator is given to notice that its run has ended, before `resume` calls it alive."""

T = TypeVar("T")


# --- submit -----------------------------------------------------------------------------------------------------------


def submit(config: SubmitConfig, ids: Sequence[str], command: Sequence[str] = COMMAND) -> None:
    """Make a run of these settings for each id. Raises BadRunId, ConfigError, Damaged (serve.json)."""
    disk, outputs = Disk(), OutputTree(Path(config.output_dir).absolute())
    trees = [outputs.run(run_id) for run_id in parse_ids(ids)]
    served = read_served(outputs)
    run = run_config(config, served)
    refuse_unknown(run.environment.name, run.environment.options)
    refuse_high_rank(run, outputs)
    for_all(trees, lambda tree: refuse_what_is_there(tree, run), "nothing was submitted")
    warn(served, run, outputs)
    for tree in trees:
        publish_orch_toml(disk, tree, run)
        pid = start_orchestrator(disk, tree, command)
        print(
            f"{tree.id}: submitted to {shown(tree.root)}; its orchestrator (pid {pid}) samples at {run.inference_url}"
        )


def parse_ids(ids: Sequence[str]) -> list[RunId]:
    """Raises BadRunId, and ConfigError when none is given or one is given twice."""
    if not ids:
        raise ConfigError("no run is named")
    if twice := sorted({name for name in ids if ids.count(name) > 1}):
        raise ConfigError(f"given twice: {', '.join(twice)}; every run has an id of its own")
    return [RunId.parse(name) for name in ids]


def run_config(config: SubmitConfig, served: Served | None) -> RunConfig:
    """control/orch.toml: the file's settings, and what serve.json says where the file is silent. Raises ConfigError."""
    if config.stop:
        raise ConfigError("stop = true: a run is not submitted to be stopped; `graftwork stop` sets it")
    model = config.model or (served.model if served is not None else None)
    if model is None:
        raise ConfigError(
            f"model.path: must be given, as there is no serve.json in {config.output_dir}: `graftwork serve` writes "
            "it when inference answers, and --output-dir says where"
        )
    values = config.model_dump(exclude={"output_dir"}, exclude_none=True)
    values["model"] = absolute_model(model).model_dump()
    if config.init_adapter_path is not None:
        values["init_adapter_path"] = absolute_path(config.init_adapter_path)
    if served is not None and "inference_url" not in config.model_fields_set:
        values["inference_url"] = served.inference_url
    return build(RunConfig, values, source="the settings of the run")


def refuse_what_is_there(tree: RunTree, run: RunConfig) -> None:
    """A folder that is there already must be one to go on from: made ready by a person, or copied from another run."""
    if tree.root.exists() and not tree.root.is_dir():
        raise ConfigError(f"{tree.root} is there and no folder")
    refuse_held(tree.orchestrator_lock)
    steps, status = stable_steps(tree.checkpoints), status_of(tree)
    original = copied_from(tree, status)
    if tree.orch_toml.exists() and original is None and not came_to_nothing(tree, steps):
        raise ConfigError(
            f"{tree.root} holds a run already{f' ({told(status)})' if status else ''}: `graftwork resume {tree.id}` "
            f"takes it on from a checkpoint, `graftwork stop {tree.id}` ends it first; or choose another id"
        )
    if run.resume:
        refuse_impossible_resume(
            tree, run.resume_step, steps, "Without resume = true the run starts from its beginning"
        )
    elif original is not None or (steps and steps[-1] > 0):
        what = f"is a copy of run {original}" if original else f"has checkpoints up to step {steps[-1]}"
        raise ConfigError(f"{tree.root} {what}: --resume true goes on from its checkpoint, or choose another id")
    else:
        refuse_missing_adapter("init_adapter_path", run.init_adapter_path, steps)


def refuse_high_rank(run: RunConfig, outputs: OutputTree) -> None:
    """The slots of a trainer that is up say how much a run may ask for."""
    most, rank = read_max_rank(outputs), run.adapter.rank
    if most is not None and rank is not None and rank > most and trainer_lives(outputs):
        raise ConfigError(
            f"adapter.rank is {rank}, and the trainer in {shown(outputs.root)} holds adapters of rank {most} at most "
            "(its lora.max_rank)"
        )


def came_to_nothing(tree: RunTree, steps: Sequence[int]) -> bool:
    """Whether the run that is there has ended before its first batch: its settings were refused, or it was stopped in
    the line. Then its id is free."""
    return is_settled(tree) and max(steps, default=0) == 0 and not stable_steps(tree.rollouts)


def warn(served: Served | None, run: RunConfig, outputs: OutputTree) -> None:
    """What does not keep a run from being submitted, but may keep it from training."""
    if served is not None and run.model.path != served.model.path:
        _warn(f"model.path is {run.model.path}, and {outputs.serve_json} says {served.model.path}")
    if not trainer_lives(outputs):
        _warn(f"no trainer is running in {shown(outputs.root)}; the run waits until `graftwork serve` is up")


def _warn(text: str) -> None:
    say(f"warning: {text}")


# --- stop -------------------------------------------------------------------------------------------------------------


def stop(output_dir: str, ids: Sequence[str], wait_seconds: float) -> None:
    """Have the trainer checkpoint these runs and give their slots back; end their orchestrators.

    wait_seconds: for the trainer to say so; 0: do not wait. Raises ConfigError, BadRunId, and ProgramFailed when the
    time is over.
    """
    disk, outputs = Disk(), OutputTree(Path(output_dir).absolute())
    trees = [run_of(output_dir, str(name)) for name in parse_ids(ids)]
    asked = {}
    for tree, (config, orch_digest) in zip(trees, for_all(trees, read_orch_toml, "nothing was stopped"), strict=True):
        if ended := ended_under(tree, orch_digest):
            print(f"{tree.id}: {told(ended)}; it had ended already, nothing was changed")
            continue
        if not config.stop:
            orch_digest = publish_orch_toml(disk, tree, config.model_copy(update={"stop": True}))
        asked[tree] = orch_digest
    for tree in trees:  # of a run that has ended, too: its orchestrator may be slow to notice
        try:
            end_orchestrator(tree)
        except GraftworkError as error:
            _warn(str(error))
    if wait_seconds > 0:
        await_release(outputs, asked, wait_seconds)
    else:
        for tree in asked:
            print(f"{tree.id}: to be stopped; not waited for")


def ended_under(tree: RunTree, orch_digest: str) -> Status | None:
    """The status of a run that has ended under this very orch.toml."""
    status = status_of(tree)
    return status if status and status.is_of(tree.id, orch_digest) and status.state in TERMINAL else None


def await_release(outputs: OutputTree, asked: Mapping[RunTree, str], seconds: float) -> None:
    """Say of each run that it has stopped, as it does, or that no trainer is there to stop it. Raises ProgramFailed for
    those that have not in this time. asked: the orch.toml digest of each."""
    deadline = time.monotonic() + seconds
    waiting = dict(asked)
    while waiting:
        alive = trainer_lives(outputs)
        for tree, orch_digest in list(waiting.items()):
            if said := _outcome(tree, orch_digest, alive=alive):
                print(f"{tree.id}: {said}", flush=True)
                del waiting[tree]
        if waiting and time.monotonic() > deadline:
            names = ", ".join(str(tree.id) for tree in waiting)
            raise ProgramFailed(
                f"not stopped within {seconds:g} seconds: {names}. They are still asked to; `graftwork runs` shows when"
            )
        time.sleep(POLL_SECONDS if waiting else 0)


def _outcome(tree: RunTree, orch_digest: str, *, alive: bool) -> str | None:
    """How the wait for a run ends; None: not yet."""
    if ended := ended_under(tree, orch_digest):
        return told(ended)
    if not tree.root.is_dir():
        return "its folder is gone"
    return None if alive else "to be stopped; no trainer is running, the next one will release it when it is up"


# --- resume -----------------------------------------------------------------------------------------------------------


def resume(
    output_dir: str, ids: Sequence[str], max_steps: int | None, step: int | None, command: Sequence[str] = COMMAND
) -> None:
    """Take runs that have ended on from a checkpoint, the newest if no step is named. A run that trains, but has lost
    its orchestrator (the machine was started again), gets another one and nothing else.

    Raises BadRunId, ConfigError (also for CannotResume and Busy of a run), Damaged (serve.json).
    """
    disk, outputs = Disk(), OutputTree(Path(output_dir).absolute())
    trees = [run_of(output_dir, str(name)) for name in parse_ids(ids)]
    served, alive = read_served(outputs), trainer_lives(outputs)
    changes = {
        "stop": False,
        "resume": True,
        "resume_step": step,
        **({} if max_steps is None else {"max_steps": max_steps}),
        **({} if served is None else {"inference_url": served.inference_url}),
    }

    def plan(tree: RunTree) -> RunConfig | None:
        config, orch_digest = read_orch_toml(tree)
        if lacks_only_its_orchestrator(tree, config, orch_digest):
            return None
        refuse_while_it_trains(tree, config, orch_digest, alive=alive)
        config = config.model_copy(update=changes)
        refuse_what_leads_nowhere(tree, config)
        return config

    plans = for_all(trees, plan, "nothing was resumed")
    if not alive:
        _warn(f"no trainer is running in {shown(outputs.root)}; the run waits until `graftwork serve` is up")
    for tree, config in zip(trees, plans, strict=True):
        if config is None:
            status, pid = status_of(tree), start_orchestrator(disk, tree, command)
            now = f"{told(status)}, " if status else ""
            print(f"{tree.id}: {now}and had lost its orchestrator; another one (pid {pid}) is started")
            continue
        start = start_of(tree, config.resume_step)
        publish_orch_toml(disk, tree, config)
        pid = start_orchestrator(disk, tree, command)
        print(
            f"{tree.id}: goes on from step {start} to {config.max_steps}; its orchestrator (pid {pid}) samples at "
            f"{config.inference_url}"
        )


def lacks_only_its_orchestrator(tree: RunTree, config: RunConfig, orch_digest: str) -> bool:
    """Whether the trainer has the run in its slots or in the line, under this very orch.toml, and nobody samples."""
    status = status_of(tree)
    at_work = status is not None and status.is_of(tree.id, orch_digest) and status.state not in TERMINAL
    return at_work and not config.stop and live_orchestrator(tree) is None


def refuse_while_it_trains(tree: RunTree, config: RunConfig, orch_digest: str, *, alive: bool) -> None:
    """Raises ConfigError. A run that was told to stop while no trainer lives need not have stopped.

    alive: whether a trainer does.
    """
    status, pid = status_of(tree), live_orchestrator(tree)
    at_work = status is not None and status.run == str(tree.id) and status.state not in TERMINAL
    if status is not None and at_work and (alive or status.orch_digest == orch_digest):
        way_on = (
            "It is being stopped: try again when it is" if config.stop else f"`graftwork stop {tree.id}` comes first"
        )
        raise ConfigError(f"run {tree.id} is {told(status)}; there is nothing to resume. {way_on}")
    if pid is not None and not wait_until_gone(tree, pid, FOLLOW_SECONDS):
        raise ConfigError(
            f"run {tree.id}: its orchestrator (pid {pid}) is still there; `graftwork stop {tree.id}` ends it"
        )


def refuse_what_leads_nowhere(tree: RunTree, config: RunConfig) -> None:
    steps = stable_steps(tree.checkpoints)
    otherwise = "`graftwork submit` starts a run anew that ended before its first batch, and others under another id"
    refuse_impossible_resume(tree, config.resume_step, steps, otherwise)
    if (start := start_of(tree, config.resume_step)) >= config.max_steps:
        raise beyond_the_end(tree, start, config.max_steps, "--step")


# --- what they share --------------------------------------------------------------------------------------------------


def for_all(trees: Iterable[RunTree], look: Callable[[RunTree], T], outcome: str) -> list[T]:
    """`look` at each run before anything is done to any. Raises ConfigError with every refusal, and the outcome."""
    found, refusals = [], []
    for tree in trees:
        try:
            found.append(look(tree))
        except GraftworkError as error:
            refusals.append(str(error))
    if refusals:
        raise ConfigError("\n  ".join([*dict.fromkeys(refusals), outcome]))
    return found


def trainer_lives(outputs: OutputTree) -> bool:
    liveness = read_liveness(outputs)
    return liveness is not None and liveness.is_live(time.time())
