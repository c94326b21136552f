"""`graftwork orchestrator RUN_DIR`: sample batches for one run, from the versions that the trainer publishes.

    read control/orch.toml -> claim the run -> (warm start: convert the adapter into step_0) -> wait until admitted
    then, until the trainer says finished:
        find the next batch that is not there, wait for the version that it is sampled from, load that version into
        inference, play the batch, publish it
    at the end, however it comes: unload the run's versions from inference

It holds no state that a restart could lose: what to do next follows from status.json and from the batches on disk. So
a restart, a resume, and a batch that was set aside as stale are one and the same case. Nor does inference: a server
that goes away is waited for, gets the version again, and plays the batch from its start. Torch is never imported.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Coroutine
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from graftwork.config.load import digest
from graftwork.config.run import RunConfig
from graftwork.errors import ConfigError, RunError, StoreError
from graftwork.programs.evaluations import Evaluations
from graftwork.programs.orch_toml import asks_to_stop, read_orch_toml
from graftwork.programs.serving import Serving
from graftwork.programs.warm_start import warm_start
from graftwork.rollouts.chat import ChatTokenizer
from graftwork.rollouts.client import InferenceClient
from graftwork.rollouts.collect import PlaysBatches, Source
from graftwork.rollouts.environment import Environment
from graftwork.rollouts.rounds import Gathered, gather
from graftwork.rollouts.verifiers import environment_of
from graftwork.store.disk import Disk
from graftwork.store.files import is_stable, json_line, read_lines
from graftwork.store.layout import RunTree
from graftwork.store.queue import Batch, Published, SampledVersion, publish_batch, read_version
from graftwork.store.status import Status, read_status

log = logging.getLogger("graftwork.orchestrator")

POLL_SECONDS = 0.02
POLL_GROWTH = 1.25
STEP_POLL_SECONDS_MAX = 0.05
ADMISSION_POLL_SECONDS_MAX = 0.5
"""Pauses between two looks grow from POLL_SECONDS to these: many orchestrators that wait must cost little."""
LOOK_SECONDS = 0.5
"""How often a batch in the making looks whether its run goes on."""
SETTLED_SECONDS = 5.0
"""A status.json of this age is not about to change: what it asks for is really missing."""

T = TypeVar("T")


class RunStopped(Exception):
    """`graftwork stop` ended the run: no error, so outside the error tree."""


def main(run_dir: Path) -> None:
    """Sample for the run in `run_dir` until it is finished or stopped, or until SIGTERM. Raises GraftworkError.

    What it does is logged (one line a step); the command line decides where to.
    """
    try:
        asyncio.run(_main(run_dir))
    except RunStopped as stop:
        log.info("%s", stop)
    except asyncio.CancelledError:
        log.info("%s: stopped by SIGTERM; batches that are published stay", run_dir)


async def _main(run_dir: Path) -> None:
    task = asyncio.current_task()
    if task is not None and threading.current_thread() is threading.main_thread():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    tree, disk = RunTree.at(run_dir), Disk()
    config, orch_digest = read_orch_toml(tree)
    if config.stop:
        raise ConfigError(
            f"run {tree.id}: {tree.orch_toml} says stop = true: the run was stopped; `graftwork resume` goes on with it"
        )
    claim = disk.claim(tree.orchestrator_lock, f"the orchestrator of run {tree.id}")
    try:
        environment = environment_of(config.environment)
        tokenizer = ChatTokenizer.load(config.model.path)
        await warm_start(tree, config)
        async with InferenceClient(config.inference_url, config.request_timeout_seconds) as client:
            await Orchestrator(tree, config, orch_digest, disk, environment, tokenizer, client).run()
    finally:
        claim.release()


@dataclass
class Pauses:
    """Pauses that grow while something does not come. By a quarter: it is seen at most a quarter of the wait late."""

    longest_seconds: float
    seconds: float = POLL_SECONDS

    async def pause(self) -> None:
        await asyncio.sleep(self.seconds)
        self.seconds = min(self.seconds * POLL_GROWTH, self.longest_seconds)


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Another one when the file was replaced; None where it cannot be opened. Opened it is because a network file
    system may answer a bare stat from its cache."""
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
    except OSError:
        return None
    return about.st_mtime_ns, about.st_size, about.st_ino


@dataclass
class Orchestrator:
    """One run's sampling."""

    tree: RunTree
    config: RunConfig
    orch_digest: str
    disk: Disk
    environment: Environment | PlaysBatches
    tokenizer: ChatTokenizer
    client: InferenceClient
    last_step: int = 0
    """Newest batch that is published or was consumed."""
    evaluations: Evaluations = field(init=False)
    serving: Serving = field(init=False)
    _status: Status | None = field(default=None, init=False)
    _status_stamp: tuple[int, int, int] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.evaluations = Evaluations(self.tree, self.config, self.disk)
        self.serving = Serving(self.tree.id, self.client, self.config.tolerance_of_probes)

    async def run(self) -> None:
        """Until the trainer says finished. Raises RunStopped, or GraftworkError with the reason when the run or the
        server ends."""
        status = await self.wait_until_admitted()
        if status.state == "finished":
            log.info("run %s: finished already, at step %d", self.tree.id, status.step or 0)
            return
        log.info("run %s: admitted at step %d; sampling at %s", self.tree.id, status.start_step or 0, self.client.url)
        self.disk.sweep(self.tree.rollouts)
        self.last_step = max(status.start_step or 0, status.step or 0)
        self.evaluations.begin(self.last_step)
        self.skip_published()
        self.disk.cut_log(self.tree.samples_jsonl, self.last_step)
        try:
            await self.sample_until_finished()
        finally:
            await self.serving.leave_inference()
        log.info("run %s: finished at step %d", self.tree.id, self.config.max_steps)

    # --- what the trainer says --------------------------------------------------------------------------------------

    async def wait_until_admitted(self) -> Status:
        """The first status "active" or "finished" that the trainer gave this orch.toml."""
        said, pauses = "", Pauses(ADMISSION_POLL_SECONDS_MAX)
        while True:
            self.refuse_changed_orch_toml()
            status = self.status()
            if status is not None and status.is_of(self.tree.id, self.orch_digest):
                self.refuse_ended(status)
                if status.state in ("active", "finished"):
                    return status
            now = "no status yet" if status is None else status.state
            if now != said:
                log.info("run %s: waiting to be admitted by the trainer (%s)", self.tree.id, now)
                said = now
            await pauses.pause()

    def look(self) -> Status:
        """The status now. Raises RunStopped, or RunError with the reason, when the run has ended, but not well."""
        self.refuse_removed()
        status = self.status()
        if status is None:
            raise RunError(f"run {self.tree.id}: {self.tree.status_json} is gone; start again once the trainer runs")
        if status.run == str(self.tree.id) and status.state == "stopped":
            self.refuse_ended(status)  # it is about the orch.toml that asks to stop, so not about ours
        if not status.is_of(self.tree.id, self.orch_digest):
            raise self.changed()
        self.refuse_ended(status)
        return status

    def status(self) -> Status | None:
        """What the trainer wrote last; parsed when the file has changed, not at every look."""
        now = stamp(self.tree.status_json)
        if now is None or now != self._status_stamp:
            self._status, self._status_stamp = read_status(self.tree), now
        return self._status

    def refuse_removed(self) -> None:
        if not self.tree.root.is_dir():
            raise RunError(f"run {self.tree.id}: {self.tree.root} is gone; the run was removed")

    def refuse_changed_orch_toml(self) -> None:
        self.refuse_removed()
        try:
            if digest(self.tree.orch_toml.read_bytes()) == self.orch_digest:
                return
        except OSError:
            pass
        raise self.changed()

    def changed(self) -> Exception:
        """What an orch.toml that is not the one of this orchestrator ends it with."""
        if asks_to_stop(self.tree):
            return RunStopped(f"run {self.tree.id}: stopped, as its orch.toml asks")
        return ConfigError(f"run {self.tree.id}: {self.tree.orch_toml} changed under this orchestrator; start again")

    def refuse_ended(self, status: Status) -> None:
        if status.state == "stopped":
            raise RunStopped(f"run {self.tree.id}: stopped at step {status.step or 0}; `graftwork resume` goes on")
        if status.state in ("failed", "evicted"):
            raise RunError(
                f"run {self.tree.id} {status.state} at step {status.step or 0}: {status.reason or 'no reason given'}"
                f" (says {self.tree.status_json})"
            )

    async def attended(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` returns or raises. When the run ends meanwhile, `work` is given up and that is raised."""
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait({task}, timeout=LOOK_SECONDS))[0]:
                self.look()
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # --- which batch, from which version ----------------------------------------------------------------------------

    async def sample_until_finished(self) -> None:
        pauses = Pauses(STEP_POLL_SECONDS_MAX)
        while (status := self.look()).state != "finished":
            step = self.step_to_sample(status)
            published = None if step is None else self.version_for(step, status)
            if step is None or published is None:
                await pauses.pause()
            else:
                first = published.version.step == (status.start_step or 0)
                if self.evaluations.is_due(published.version.step, first=first):
                    await self.attended(self.evaluate(published))
                await self.sample(step, published)
                pauses = Pauses(STEP_POLL_SECONDS_MAX)
        last = read_version(self.tree, self.config.max_steps)
        if last is not None and self.evaluations.is_due(last.version.step):
            await self.evaluate(last)

    def step_to_sample(self, status: Status) -> int | None:
        """The batch to make now; None when all are made. A batch that the trainer set aside is made again."""
        if (wanted := status.wanted_batch) is not None and wanted <= self.last_step and self.was_set_aside(wanted):
            return wanted
        self.skip_published()
        return self.last_step + 1 if self.last_step < self.config.max_steps else None

    def was_set_aside(self, step: int) -> bool:
        """Whether the trainer waits for a batch that was there. Where it has published that step's version meanwhile,
        the batch was consumed and its status is about to say so."""
        if is_stable(self.tree.batch(step)):
            return False
        age_seconds = time.time() - self.tree.status_json.stat().st_mtime
        return not is_stable(self.tree.broadcast(step)) or age_seconds > SETTLED_SECONDS

    def skip_published(self) -> None:
        """After a restart, batches that are on disk are consumed as they are."""
        while is_stable(self.tree.batch(self.last_step + 1)):
            self.last_step += 1

    def version_for(self, step: int, status: Status) -> Published | None:
        """The version that batch `step` is sampled from: k - 1 - lag_steps. None while it is not published."""
        wanted = max(0, step - 1 - self.config.lag_steps)
        published = read_version(self.tree, wanted)
        start = status.start_step or 0
        if published is None and wanted < start:
            # Versions before the start are never published again; the start itself is the nearest that will be there.
            published = read_version(self.tree, start)
            if published is not None:
                log.warning(
                    "run %s: batch %d: version %d is not kept; sampling from %s", self.tree.id, step, wanted,
                    published.version.name,
                )  # fmt: skip
        return published

    # --- one batch --------------------------------------------------------------------------------------------------

    async def sample(self, step: int, published: Published) -> None:
        """Make batch `step` from a version, and publish it."""
        version = published.version
        gathered = await self.attended(self.play(step, published))
        self.refuse_failures(step, gathered)
        finding = self.serving.findings.get(version.name)
        probe = None if finding is None else asdict(finding)
        batch = Batch(
            run=self.tree.id,
            step=step,
            temperature=self.config.sampling.temperature,
            versions=(SampledVersion(version.name, version.digest, gathered.digest_source, probe),),
            rollouts=gathered.rollouts,
            orchestrator_state={"next_step": step + 1, "seed": self.config.seed},
            sampled=gathered.sampled,
        )
        self.look()  # a folder that was removed meanwhile must not come back because we write into it
        # Rows first: a batch that is there has its rows, and rows without a batch are cut at the next start.
        try:
            self.write_samples(step, gathered)
            publish_batch(self.disk, self.tree, batch)
        except OSError as error:
            raise StoreError(
                f"run {self.tree.id}: batch {step} cannot be written ({error}), so it does not count; make room, then "
                "resume the run"
            ) from error
        self.last_step = max(self.last_step, step)
        told = gathered.sampled
        log.info(
            "run %s: batch %d from %s: mean reward %.4f, %d answers (%d failed), %d tokens; %d rollouts to learn from, "
            "%d equal groups left out, rounds: %d", self.tree.id, step, version.name, told.reward_mean, told.answers,
            told.failed, told.answer_tokens, len(gathered.rollouts), told.left_out_groups, told.rounds,
        )  # fmt: skip
        if gathered.nothing_to_learn and self.config.sampling.skip_equal_groups:
            log.warning(
                "run %s: batch %d: in every group all answers earned the same; the groups of its first round are kept, "
                "and the step will learn nothing from their rewards", self.tree.id, step,
            )  # fmt: skip

    def refuse_failures(self, step: int, gathered: Gathered) -> None:
        failed, limit = gathered.sampled.failed, self.config.max_failed_share
        if failed / len(gathered.rows) > limit:
            why = next(row["error"] for row in gathered.rows if "error" in row)
            raise RunError(
                f"run {self.tree.id}: {failed} of {len(gathered.rows)} rollouts of batch {step} failed, "
                f"more than max_failed_share = {limit:g} allows; the first: {why}. Mend the environment and resume"
            )

    async def play(self, step: int, published: Published) -> Gathered:
        """The rollouts of batch `step`."""
        source = Source(published.version.name, published.version.digest)
        limit = self.config.environment.timeout_seconds
        which = (str(self.tree.id), self.config.seed, step, self.config.sampling, limit)
        return await self.serving.from_one_server(
            published, f"batch {step}", lambda: gather(self.environment, self.tokenizer, self.client, source, *which)
        )

    async def evaluate(self, published: Published) -> None:
        """Play the held-out tasks with a version."""
        version = published.version
        await self.serving.from_one_server(
            published, f"the evaluation of {version.name}",
            lambda: self.evaluations.evaluate(self.environment, self.tokenizer, self.client, version),
        )  # fmt: skip

    def write_samples(self, step: int, gathered: Gathered) -> None:
        path = self.tree.samples_jsonl
        if step <= self.last_step:  # a batch that is made again: its old rows were of answers that nobody learns from
            kept = [json_line(row) for row in read_lines(path) if row.get("step") != step]
            self.disk.publish_file(path, "".join(f"{line}\n" for line in kept).encode())
        self.disk.append_line(path, "\n".join(json_line(row) for row in gathered.rows))
