"""A run that holds a slot: takes its batches, steps, publishes, checkpoints. All that touches its folder is here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from graftwork.adapters.formats.peft_write import peft_files
from graftwork.adapters.source import AdapterFacts
from graftwork.config.run import RunConfig
from graftwork.errors import BadBatch, RunError, StaleBatch
from graftwork.store.chain import Link, append_link, begin_chain
from graftwork.store.checkpoint import Checkpoint
from graftwork.store.disk import Disk, Pin
from graftwork.store.files import Manifest, is_stable, json_line
from graftwork.store.layout import RunTree, stable_steps, step_folder
from graftwork.store.queue import BatchSize, Version, publish_version, read_batch, read_version
from graftwork.store.status import State, Status, as_reason, write_status
from graftwork.training.batches import BatchLimits, examples_of
from graftwork.training.crew import Crew
from graftwork.training.learner import Learner, Sums, gradient_norm
from graftwork.training.metrics import Work, metrics_row
from graftwork.training.packer import Round
from graftwork.training.retention import Retention
from graftwork.training.runs import Seat

Clock = Callable[[], float]
"""Seconds, monotonic."""


log = logging.getLogger(__name__)


def refuse_links(tree: RunTree) -> None:
    """Raises RunError, naming the first folder of the run that is a symbolic link."""
    for folder in tree.folders:
        if folder.is_symlink():
            raise RunError(f"run {tree.id}: {folder} is a symbolic link; a run's folders are its own")


class Tenant:
    """`head` is the next round, `learned` is told when it went into the slot. What they raise from the error tree
    ends this run and no other."""

    def __init__(
        self, disk: Disk, tree: RunTree, config: RunConfig, status: Status, crew: Crew, learner: Learner,
        max_tokens: int, clock: Clock,
    ) -> None:  # fmt: skip
        self.disk, self.tree, self.config, self.status = disk, tree, config, status
        self.crew, self.learner, self.max_tokens, self.clock = crew, learner, max_tokens, clock
        self.facts = AdapterFacts(config.model.path, learner.state.base_fingerprint)
        self.retention = Retention(disk, tree, config, learner.state.step)
        self.pin = Pin(tree.root)
        self.folder_id = tree.folder_id()
        self.probes = crew.probes()
        self.orchestrator_state: dict[str, Any] | None = None
        self.known: dict[int, list[str]] = {int(k): list(v) for k, v in learner.state.known_digests.items()}
        self.newest_checkpoint = 0
        self.work: Work | None = None
        self.step_ended = clock()
        self.doubted = False
        """Whether its orch.toml could not be read in the last pass."""
        self.tokens_learnt = 0
        self.mismatch = 0.0
        """Mean difference of trainer's and sampler's log-probs in the last step."""

    @property
    def step(self) -> int:
        return self.learner.state.step

    @property
    def finished(self) -> bool:
        return self.step >= self.config.max_steps

    @property
    def is_there(self) -> bool:
        """Whether the folder that was admitted is still there: not gone, and not another of its name."""
        return self.tree.folder_id() == self.folder_id

    @property
    def seat(self) -> Seat:
        return Seat(self.learner.slot, self.status.orch_digest, self.status.arrival, self.doubted, self.folder_id)

    @property
    def may_share(self) -> bool:
        """Whether its micro-batches may be learnt together with those of other runs."""
        return self.config.isolation == "mixed" and not (self.work is not None and self.work.alone)

    @property
    def seconds_without_batch(self) -> float:
        """How long it has been waiting for its next batch; 0 while it has one."""
        return 0.0 if self.work is not None or self.finished else self.clock() - self.step_ended

    # --- admission ----------------------------------------------------------------------------------------------------

    def open(self, checkpoint: Checkpoint, *, go_back: bool) -> None:
        """Bring the folder into line with the checkpoint that the run starts from, publish its version, say `active`.

        go_back: the run was told to resume from this step, so later ones are set aside.
        """
        self._must_be_there()
        for folder in (self.tree.checkpoints, self.tree.broadcasts):
            self.disk.sweep(folder)
        self.retention.sweep()
        if go_back:
            self._set_aside_after(self.step)
        self._set_aside_of_other_runs()
        self.disk.cut_log(self.tree.metrics_jsonl, self.step)
        self.newest_checkpoint = checkpoint.step
        self.orchestrator_state = checkpoint.orchestrator_state
        self._know_published()
        version = self._publish(skipped=False)
        begin_chain(self.disk, self.tree, self._link(None, version, skipped=False))
        self.say("active", start_step=self.step)

    def _set_aside_after(self, step: int) -> None:
        """A resume from a named earlier step: what came after it goes to the trash, before anything new is written."""
        for parent in (self.tree.checkpoints, self.tree.broadcasts, self.tree.rollouts):
            for path in sorted(parent.glob("step_*")) if parent.is_dir() else []:
                if path.name.removeprefix("step_").isdecimal() and int(path.name.removeprefix("step_")) > step:
                    self.disk.quarantine(path, self.tree.trash)

    def _set_aside_of_other_runs(self) -> None:
        """A folder that was copied from another run brings that run's versions and batches: none of them is ours."""
        for parent in (self.tree.broadcasts, self.tree.rollouts):
            for step in stable_steps(parent):
                folder = step_folder(parent, step)
                if Manifest.read(folder).facts.get("run") != str(self.tree.id):
                    self.disk.quarantine(folder, self.tree.trash)

    def _know_published(self) -> None:
        """Versions published after the checkpoint: batches that were sampled from them are still to come."""
        for step in stable_steps(self.tree.broadcasts):
            published = read_version(self.tree, step)
            if published is not None and step >= self.step:
                for digest in (*published.replaces, published.version.digest):
                    self._know(step, digest)

    def _know(self, step: int, digest: str) -> None:
        digests = self.known.setdefault(step, [])
        if digest not in digests:
            digests.append(digest)

    # --- work ---------------------------------------------------------------------------------------------------------

    def head(self) -> Round | None:
        """The round to learn next; None while there is no batch. Takes the next batch where there is one."""
        if self.work is None and not self.finished:
            self.work = self._take_batch()
        return None if self.work is None else self.learner.rounds[-1]

    def learned(self, tokens: int, seconds: float) -> None:
        """The head, of so many tokens, is learnt; it took `seconds`. Finishes the step after the batch's last."""
        work = self.work
        assert work is not None
        self.tokens_learnt += tokens
        work.compute_seconds += seconds
        if not self.learner.rounds:
            self._finish_step(work)

    def begin_again(self) -> None:
        """Drop what was learnt of the batch, and learn it alone: a micro-batch that it shared came to nothing."""
        assert self.work is not None
        self.crew.begin_again(self.learner)
        self.work = replace(self.work, alone=True)

    def _take_batch(self) -> Work | None:
        step = self.step + 1
        sampling = self.config.sampling
        most = sampling.prompts_per_step * sampling.samples_per_prompt * self.config.environment.sequences_max
        if not is_stable(self.tree.batch(step)):
            return None
        self._must_be_there()
        try:
            found = read_batch(self.tree, step, BatchSize(most, most * self.max_tokens))
            if found is None:
                return None
            batch, digest = found
            examples, stale_rollouts = examples_of(batch, self._limits())
        except StaleBatch as stale:
            self.disk.quarantine(self.tree.batch(step), self.tree.trash)
            self.say("active", reason=as_reason(stale))
            return None
        except BadBatch:
            self._set_aside(step)
            raise
        self.crew.feed(self.learner, examples)
        return Work(batch, digest, self.clock(), stale_rollouts)

    def _set_aside(self, step: int) -> None:
        """A batch that is at fault: a resume must not meet it again. That this cannot be done is said, but the batch's
        own fault is the reason for the end of the run."""
        self._must_be_there()
        try:
            self.disk.quarantine(self.tree.batch(step), self.tree.trash)
        except OSError as error:
            log.warning("run %s: batch %d cannot be set aside: %s", self.tree.id, step, error)

    def _limits(self) -> BatchLimits:
        return BatchLimits(
            vocab_size=self.learner.banks.base.vocab_size,
            max_tokens=self.max_tokens,
            temperature=self.config.sampling.temperature,
            max_staleness_steps=self.config.max_staleness_steps,
            known_digests=self.known,
        )

    def _finish_step(self, work: Work) -> None:
        reports = self.crew.reports(self.learner)
        if faults := [f"rank {rank}: {report.fault}" for rank, report in enumerate(reports) if report.fault]:
            if self.may_share:
                self.begin_again()
                return
            raise RunError(f"run {self.tree.id}: step {self.step + 1}: {faults[0]}")
        outcome = self.crew.step(self.learner, work.digest, gradient_norm(reports))
        sums = Sums.merged([report.sums for report in reports])
        self.work, self.mismatch = None, sums.means().get("mismatch", 0.0)
        self.orchestrator_state = work.batch.orchestrator_state
        version = self._publish(skipped=outcome.skipped)
        append_link(self.disk, self.tree, self._link(work.digest, version, skipped=outcome.skipped))
        now = self.clock()
        row = metrics_row(work, outcome, sums, version, work.started - self.step_ended, now - self.step_ended, now)
        self.disk.append_line(self.tree.metrics_jsonl, json_line(row))
        log.info("run %s: step %d of %d", self.tree.id, self.step, self.config.max_steps, extra={"row": row})
        self.step_ended = now
        if self.finished or self.step % self.config.checkpoint_interval_steps == 0:
            self.checkpoint()
        self.say("active")
        self.retention.tidy(self.step, self.newest_checkpoint)

    def _link(self, batch: str | None, version: Version, *, skipped: bool) -> Link:
        chain = self.learner.state.cursor.chain
        return Link(self.step, str(self.tree.id), batch, version.digest, chain, skipped)

    def _must_be_there(self) -> None:
        """A folder that somebody removed must not come back because we write into it, and what is a link may lead into
        another run's."""
        if not self.is_there:
            raise RunError(f"run {self.tree.id}: its folder {self.tree.root} is gone; the slot is given back")
        refuse_links(self.tree)

    def _publish(self, *, skipped: bool) -> Version:
        self._must_be_there()
        adapter, state = self.crew.adapter(self.learner), self.learner.state
        version = Version(self.tree.id, state.step, adapter.digest())
        files = peft_files(adapter, self.facts)
        if self.probes is not None:
            probe = self.probes.of(version.digest, self.crew.probe(self.learner))
            files["probe.json"] = [json_line(probe).encode()]
        if state.step == 0:
            files["report.json"] = [json_line(state.start).encode()]
        facts = {"skipped": skipped, "base_fingerprint": state.base_fingerprint, "chain": state.cursor.chain}
        publish_version(self.disk, self.tree, version, files, facts)
        self._know(state.step, version.digest)
        self._forget_old_digests()
        return version

    def _forget_old_digests(self) -> None:
        oldest = self.step - self.config.max_staleness_steps
        self.known = {step: digests for step, digests in self.known.items() if step >= oldest}
        known = {str(step): digests for step, digests in self.known.items() if step <= self.step}
        self.learner.state = replace(self.learner.state, known_digests=known)

    def checkpoint(self) -> None:
        """Publish `checkpoints/step_k` for the step that the run is at, unless it is there."""
        if self.newest_checkpoint == self.step and self.tree.checkpoint(self.step).is_dir():
            return
        self._must_be_there()
        for path in (self.tree.chain_jsonl, self.tree.metrics_jsonl):
            if path.exists():
                self.disk.sync_file(path)  # so that the lines up to a checkpoint are as durable as it is
        self.crew.save(self.learner, self.tree.checkpoints, self.orchestrator_state, self.facts)
        self.newest_checkpoint = self.step
        self.retention.tidy_checkpoints()

    def release(self) -> None:
        self.crew.vacate(self.learner.slot)
        self.pin.release()

    def take_over(self, orch_digest: str) -> None:
        """What is said from now on is about another state of orch.toml: the one that asks to stop."""
        self.status = replace(self.status, orch_digest=orch_digest)

    def say(self, state: State, *, reason: str | None = None, start_step: int | None = None) -> None:
        """Write the run's status."""
        waiting = state == "active" and not self.finished
        self.status = replace(
            self.status,
            state=state,
            slot=self.learner.slot if state == "active" else None,
            step=self.step,
            start_step=self.status.start_step if start_step is None else start_step,
            wanted_batch=self.step + 1 if waiting else None,
            reason=reason,
        )
        write_status(self.disk, self.tree, self.status)
