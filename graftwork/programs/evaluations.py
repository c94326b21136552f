"""Held-out evaluations in the course of a run: `evals.jsonl`, a line a version that was evaluated."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from graftwork.config.run import RunConfig
from graftwork.rollouts.chat import ChatTokenizer
from graftwork.rollouts.collect import PlaysBatches, Source, evaluate
from graftwork.rollouts.environment import Environment
from graftwork.rollouts.sampling import Sampler
from graftwork.store.disk import Disk
from graftwork.store.files import json_line, read_lines
from graftwork.store.layout import RunTree
from graftwork.store.queue import Version

log = logging.getLogger("graftwork.orchestrator")


@dataclass
class Evaluations:
    """The same tasks and the same seeds for every version: what differs is the adapter. Nothing of it goes into a
    batch, and a run that is evaluated samples the same batches as one that is not."""

    tree: RunTree
    config: RunConfig
    disk: Disk
    done: set[int] = field(default_factory=set)

    def begin(self, step: int) -> None:
        """Drop the lines of versions after `step`, which are made anew."""
        self.disk.cut_log(self.tree.evals_jsonl, step)
        self.done = {row["step"] for row in read_lines(self.tree.evals_jsonl)}

    def is_due(self, step: int, *, first: bool = False) -> bool:
        """Whether the version of this step is yet to be evaluated. first: the run starts from it."""
        interval = self.config.evaluation.interval_steps
        if interval is None or step in self.done:
            return False
        return first or step % interval == 0 or step == self.config.max_steps

    async def evaluate(
        self, environment: Environment | PlaysBatches, tokenizer: ChatTokenizer, sampler: Sampler, version: Version
    ) -> None:
        """Evaluate a version that the sampler serves, and add its line. Raises as `collect`."""
        found = await evaluate(
            environment, tokenizer, sampler, Source(version.name, version.digest),
            n_prompts=self.config.evaluation.prompts, seed=self.config.seed, sampling=self.config.sampling,
            timeout_seconds=self.config.environment.timeout_seconds,
        )  # fmt: skip
        row = {
            "step": version.step, "reward": found.mean_reward, "prompts": self.config.evaluation.prompts,
            "failed": found.failed, "version": version.name,
        }  # fmt: skip
        self.disk.append_line(self.tree.evals_jsonl, json_line(row))
        self.done.add(version.step)
        log.info("run %s: held-out reward of %s: %.4f", self.tree.id, version.name, found.mean_reward)
