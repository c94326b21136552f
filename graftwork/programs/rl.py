"""`graftwork rl`: start inference, trainer and orchestrator for one run, watch them, show progress, end them in order.

Torch-free, and it holds no lock: the trainer claims the outputs, the orchestrator claims the run. The run's orch.toml
is written when the inference server answers, so that a start which fails early (port taken, base missing) leaves the
run as it was.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graftwork.adapters.report import REPORT_NAME, lines_of
from graftwork.config.schema import RlConfig
from graftwork.errors import Damaged, ProgramFailed
from graftwork.logs import say
from graftwork.programs.orch_toml import publish_orch_toml
from graftwork.programs.processes import COMMAND, Interrupted, Programs, noted_signals
from graftwork.programs.progress import ProgressView, RunWatch
from graftwork.programs.report import draw, last_lines, what_next
from graftwork.programs.start import Start, refuse_what_cannot_work, said_by, write_inference_toml, write_trainer_toml
from graftwork.store.files import read_json
from graftwork.store.layout import RunTree, stable_steps
from graftwork.store.status import TERMINAL

POLL_SECONDS = 0.1
LAST_STATUS_SECONDS = 60.0
"""After the trainer has ended well: time for the orchestrator to read the last status and end too."""


def main(config: RlConfig, *, resume: bool, resume_step: int | None, command: Sequence[str] = COMMAND) -> None:
    """Train one run to run.max_steps. Raises ProgramFailed, naming the program that failed and why.

    `command` starts the command line; tests hand in programs of their own.
    """
    start = Start.of(config, resume=resume, resume_step=resume_step)
    refuse_what_cannot_work(start)
    began = time.monotonic()
    try:
        with noted_signals() as signals, Programs(start.outputs.logs, command, signals) as programs:
            if start.config.inference.base_url is None:
                programs.start("inference", write_inference_toml(start.disk, start.outputs, start.config))
            if start.settled():  # the trainer can load its base meanwhile: it finds nothing to do yet
                start_trainer(start, programs)
            url = wait_for_inference(start, programs)
            watched = RunWatch(start.tree, publish_orch_toml(start.disk, start.tree, start.run_config(url)))
            if "trainer" not in programs.started:
                start_trainer(start, programs)
            wait_for_trainer(start, programs)
            programs.start("orchestrator", start.tree.root)
            watch(programs, watched, start.config.run.max_steps)
    except ProgramFailed as error:
        raise ProgramFailed(f"run {start.tree.id}: {error}\n  {what_next(start.tree)}") from None
    except Interrupted as stop:
        say(f"stopped by {stop}; {what_next(start.tree)}")
        sys.exit(128 + stop.number)
    draw(start)
    print("\n".join(last_lines(start, time.monotonic() - began)))


# --- starting ---------------------------------------------------------------------------------------------------------


def start_trainer(start: Start, programs: Programs) -> None:
    settings = write_trainer_toml(start.disk, start.outputs, start.config, exit_when_done=True)
    programs.start("trainer", settings)


def wait_for_inference(start: Start, programs: Programs) -> str:
    """The URL of the inference server, once it answers."""
    if (url := start.config.inference.base_url) is not None:
        return url
    say(f"run {start.tree.id}: inference and trainer load {start.config.model.path}")
    return str(_wait_for_own(start.ready_file, "inference", programs)["url"])


def wait_for_trainer(start: Start, programs: Programs) -> None:
    """Until trainer.json describes the trainer of this start: the orchestrator's converter reads it."""
    _wait_for_own(start.outputs.trainer_json, "trainer", programs)


def _wait_for_own(path: Path, name: str, programs: Programs) -> dict[str, Any]:
    """The JSON in `path`, once the program `name` has written it: one of an earlier start names another pid."""
    while True:
        programs.check()
        if found := said_by(path, programs.started[name].process.pid):
            return found
        time.sleep(POLL_SECONDS)


# --- watching ---------------------------------------------------------------------------------------------------------


def watch(programs: Programs, run: RunWatch, max_steps: int) -> None:
    """Show steps until orchestrator and trainer have both ended well. Raises ProgramFailed, Interrupted."""
    with ProgressView(max_steps) as view:
        try:
            while not all_done(programs, run):
                show_news(run, view)
                time.sleep(POLL_SECONDS)
            show_news(run, view)
        except ProgramFailed as error:
            raise ProgramFailed(f"{verdict(run)}{error}") from None


def all_done(programs: Programs, run: RunWatch) -> bool:
    """Whether the run is finished and its programs have ended. Raises when something ended that should not have."""
    programs.check()
    ended = [name for name in ("trainer", "orchestrator") if programs.finished(name)]
    if not ended:
        return False
    status, log = run.status(), programs.started[ended[0]].log  # read after they ended: nothing is said later
    if status is None or status.state not in TERMINAL:
        raise ProgramFailed(f"the {ended[0]} was stopped from outside before the run was finished; its log: {log}")
    if ended == ["trainer"] and programs.seconds_since("trainer") > LAST_STATUS_SECONDS:
        log = programs.started["orchestrator"].log
        raise ProgramFailed(f"the trainer has ended, and the orchestrator did not follow; its log: {log}")
    if len(ended) == 2 and status.state not in ("finished", "stopped"):
        raise ProgramFailed(f"its programs ended; the trainer's log: {log}")
    return len(ended) == 2


def show_news(run: RunWatch, view: ProgressView) -> None:
    """Show new steps, and what the trainer says of a run that waits."""
    status = run.status()
    if status is None:
        view.say("waiting for the trainer to see the run")
    elif status.reason:
        view.say(f"{status.state}: {status.reason}")
    if status is None or status.start_step is None:
        return
    if not view.marks:
        for line in start_lines(run.tree):
            view.say(line)
        view.say(f"training from step {status.start_step} to {view.max_steps}")
        view.begin(status.start_step)
    for row in run.new_rows():
        view.show(row)


def start_lines(tree: RunTree) -> list[str]:
    """What became of the adapter that the run starts from; nothing where its step_0 is gone, or says nothing."""
    if stable_steps(tree.checkpoints) != [0]:
        return []
    try:
        lines = lines_of(read_json(tree.checkpoint(0) / REPORT_NAME, "report of the start"))
    except (Damaged, LookupError, TypeError, ValueError):
        return []
    return [f"start: {line}" for line in lines]


def verdict(run: RunWatch) -> str:
    """What the trainer said of a run that it ended: `failed at step 3: <reason>`."""
    status = run.status()
    if status is None or status.state not in ("failed", "evicted"):
        return ""
    return f"{status.state}{'' if status.step is None else f' at step {status.step}'}: {status.reason}\n  "
