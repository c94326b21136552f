"""A run that holds a slot: takes its batches, steps, publishes, checkpoints. All that touches its folder is here."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from graftwork.adapters.formats.peft_write import peft_files
from graftwork.adapters.snapshot import write_snapshot
from graftwork.adapters.source import AdapterFacts
from graftwork.config.schema import RunConfig
from graftwork.errors import RunError, StaleBatch
from graftwork.store.checkpoint import Checkpoint, save_checkpoint
from graftwork.store.disk import Disk, Manifest, Staging, json_line
from graftwork.store.layout import RunTree, stable_steps, step_folder
from graftwork.store.queue import Batch, Version, publish_version, read_batch, read_version
from graftwork.store.status import State, Status, write_status
from graftwork.training.batches import BatchLimits, examples_of
from graftwork.training.learner import Learner, Sums
from graftwork.training.optim import StepOutcome
from graftwork.training.packer import MicroBatch


@dataclass
class Work:
    """A batch that is being learnt. `left`: micro-batches still to do, next one last."""

    batch: Batch
    digest: str
    left: list[MicroBatch]
    started: float


class Tenant:
    """`advance` does one turn of work. Whatever it raises from the error tree ends this run and no other."""

    def __init__(
        self, disk: Disk, tree: RunTree, config: RunConfig, status: Status, learner: Learner, max_tokens: int
    ) -> None:
        self.disk, self.tree, self.config, self.status, self.learner = disk, tree, config, status, learner
        self.max_tokens = max_tokens
        self.facts = AdapterFacts(config.model.path, learner.state.base_fingerprint)
        self.orchestrator_state: dict[str, Any] | None = None
        self.known: dict[int, list[str]] = {int(k): list(v) for k, v in learner.state.known_digests.items()}
        self.work: Work | None = None
        self.step_ended = time.monotonic()

    @property
    def step(self) -> int:
        return self.learner.state.step

    @property
    def finished(self) -> bool:
        return self.step >= self.config.max_steps

    # --- admission ----------------------------------------------------------------------------------------------------

    def open(self, checkpoint: Checkpoint, *, go_back: bool) -> bool:
        """Bring the folder into line with the checkpoint that the run starts from, publish its version, say `active`.

        go_back: the run was told to resume from this step, so later ones are set aside.
        Returns True: there was work, as in `advance`.
        """
        for folder in (self.tree.checkpoints, self.tree.broadcasts):
            self.disk.sweep(folder)
        if go_back:
            self._set_aside_after(self.step)
        self._set_aside_of_other_runs()
        self.disk.cut_log(self.tree.metrics_jsonl, self.step)
        self.orchestrator_state = checkpoint.orchestrator_state
        self._know_published()
        self._publish(skipped=False)
        self.say("active", start_step=self.step)
        return True

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

    def advance(self) -> bool:
        """Learn one micro-batch, and finish the step after its last. False if there is nothing to do yet."""
        if self.work is None:
            self.work = self._take_batch()
        if self.work is None:
            return False
        self.learner.learn(self.work.left.pop())
        if not self.work.left:
            self._finish_step(self.work)
            self.work = None
        return True

    def _take_batch(self) -> Work | None:
        step = self.step + 1
        found = read_batch(self.tree, step)
        if found is None:
            return None
        batch, digest = found
        try:
            examples = examples_of(batch, self._limits())
        except StaleBatch as stale:
            self.disk.quarantine(self.tree.batch(step), self.tree.trash)
            self.say("active", reason=str(stale))
            return None
        return Work(batch, digest, self.learner.plan(examples)[::-1], time.monotonic())

    def _limits(self) -> BatchLimits:
        return BatchLimits(
            vocab_size=self.learner.banks.base.vocab_size,
            max_tokens=self.max_tokens,
            temperature=self.config.sampling.temperature,
            max_staleness_steps=self.config.max_staleness_steps,
            known_digests=self.known,
        )

    def _finish_step(self, work: Work) -> None:
        outcome, sums = self.learner.step(work.digest)
        self.orchestrator_state = work.batch.orchestrator_state
        version = self._publish(skipped=outcome.skipped)
        now = time.monotonic()
        row = self._metrics(work, outcome, sums, version, now)
        self.disk.append_line(self.tree.metrics_jsonl, json_line(row))
        self.step_ended = now
        if self.finished or self.step % self.config.checkpoint_interval_steps == 0:
            self.checkpoint()
        self.say("active")

    def _must_be_there(self) -> None:
        """A folder that somebody removed must not come back because we write into it."""
        if not self.tree.root.is_dir():
            raise RunError(f"run {self.tree.id}: its folder {self.tree.root} is gone; the slot is given back")

    def _publish(self, *, skipped: bool) -> Version:
        self._must_be_there()
        adapter, state = self.learner.adapter(), self.learner.state
        version = Version(self.tree.id, state.step, adapter.digest())
        files = peft_files(adapter, self.facts)
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
        """Publish `checkpoints/step_k` for the step that the run is at."""

        def fill(staging: Staging) -> None:
            write_snapshot(staging, self.learner.snapshot(self.orchestrator_state), self.facts)

        self._must_be_there()
        save_checkpoint(self.disk, self.tree.checkpoints, self.step, fill)

    def _metrics(self, work: Work, outcome: StepOutcome, sums: Sums, version: Version, now: float) -> dict[str, Any]:
        rewards = [rollout.reward for rollout in work.batch.rollouts]
        mean = sum(rewards) / len(rewards)
        means = sums.means()
        return {
            "step": self.step,
            "reward": mean,
            "reward_std": (sum((r - mean) ** 2 for r in rewards) / len(rewards)) ** 0.5,
            "loss": sums.loss,
            "kl": means.get("kl"),
            "entropy": means["entropy"],
            "grad_norm": outcome.gradient_norm,
            "learning_rate": outcome.learning_rate,
            "mismatch_mean": means["mismatch"],
            "mismatch_max": sums.mismatch_max,
            "truncated": means["truncated"],
            "rollouts": len(rewards),
            "tokens": sums.tokens,
            "loss_tokens": sums.loss_tokens,
            "answer_tokens_mean": sums.loss_tokens / len(rewards),
            "skipped": outcome.skipped,
            "version": version.name,
            "batch": work.digest,
            "train_seconds": now - work.started,
            "wait_seconds": work.started - self.step_ended,
            "tokens_per_second": sums.tokens / max(now - self.step_ended, 1e-9),
        }

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
