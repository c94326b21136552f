"""How long does a saved adapter wait until a trainer that is at work has given it a slot and published its step_0?

The program `graftwork trainer` trains one run, whose next batch is always there and is one micro-batch: a pass is a
step of it. Then runs come, each at a random moment of a pass. Their step_0 was made of a saved adapter by the
converter, which is the orchestrator's part (`convert_seconds`). The clock starts before the last file of the run's
folder is written, its orch.toml, and stops when broadcasts/step_0/STABLE is there. The bar is a pass and half a second:
the ratio is seconds / (pass + 0.5).
"""

from __future__ import annotations

import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from bench.bases import TINY, adapter_for, answers, load, save_adapter
from bench.harness import Measured, Ratio, Setting, at_most, main
from bench.made_runs import batch_of, model_of, rows_of, run_config, scratch
from graftwork.adapters.convert import Target, convert_adapter
from graftwork.config.load import dump
from graftwork.config.run import RetentionConfig
from graftwork.config.schema import TrainerConfig
from graftwork.programs.processes import COMMAND
from graftwork.store.disk import Disk
from graftwork.store.files import MANIFEST, is_stable
from graftwork.store.layout import OutputTree, RunId, RunTree, stable_steps
from graftwork.store.queue import Version, publish_batch, read_version
from graftwork.training.packer import Example

ROW, NAME = 10, "admission"
PROMPT_TOKENS, ANSWER_TOKENS = 10, 16
GRACE_SECONDS = 0.5
LOOK_SECONDS = 0.002
TIMEOUT_SECONDS = 120.0
AHEAD = 6
"""Batches that lie there before they are wanted."""
PASSES = 3
"""Before each admission, to know how long one takes."""


@dataclass(frozen=True)
class Busy:
    """A run that is being trained."""

    tree: RunTree
    start: Version
    examples: list[Example]

    def feed(self) -> None:
        """So that no pass finds it without a batch."""
        newest = max(stable_steps(self.tree.broadcasts))
        for step in range(newest + 1, newest + 1 + AHEAD):
            if not self.tree.batch(step).exists():
                publish_batch(Disk(), self.tree, batch_of(self.start, step, self.examples))

    def after_passes(self, count: int) -> list[float]:
        """Wait for so many, and say how long each took: from version to version."""
        first = max(stable_steps(self.tree.broadcasts))
        for step in range(first + 1, first + count + 1):
            self.feed()
            wait_until(lambda step=step: is_stable(self.tree.broadcast(step)))  # type: ignore[misc]
        when = [(self.tree.broadcast(first + n) / MANIFEST).stat().st_mtime for n in range(count + 1)]
        return [later - earlier for earlier, later in pairwise(when)]


def measure(setting: Setting) -> Iterator[Measured]:
    base = load(TINY, setting.device)
    sequences, admissions = (64, 2) if setting.quick else (512, 11)
    rng = random.Random(0)
    with scratch() as folder:
        outputs, adapter = OutputTree(folder / "outputs"), save_adapter(adapter_for(base), folder / "adapter")
        model = model_of(TINY.absolute(), base)
        config = TrainerConfig(
            model=model, output_dir=str(outputs.root), slots=admissions + 1,
            tokens_per_micro_batch=sequences * (PROMPT_TOKENS + ANSWER_TOKENS),
        )  # fmt: skip
        Disk().publish_file(folder / "trainer.toml", dump(config))
        with program(folder / "trainer.toml", folder / "trainer.log"):
            wait_until(outputs.trainer_json.exists)
            tree = outputs.run(RunId("busy"))
            keep = RetentionConfig(history=True)
            Disk().publish_file(tree.orch_toml, dump(run_config(model, sequences, retention=keep)))
            wait_until(lambda: is_stable(tree.broadcast(0)))
            published = read_version(tree, 0)
            assert published is not None
            busy = Busy(tree, published.version, answers(base, sequences, PROMPT_TOKENS, ANSWER_TOKENS, group=8))
            passes, waited, converted = [], [], []
            for number in range(admissions):
                passes.append(statistics.median(busy.after_passes(PASSES)))
                run = outputs.run(RunId(f"r{number}"))
                began = time.perf_counter()
                convert_adapter(Disk(), adapter, run.root, Target.of_trainer(outputs.trainer_json))
                converted.append(time.perf_counter() - began)
                busy.feed()
                time.sleep(rng.uniform(0, passes[-1]))
                began = time.perf_counter()
                Disk().publish_file(run.orch_toml, dump(run_config(model, sequences)))
                wait_until(lambda run=run: is_stable(run.broadcast(0)))  # type: ignore[misc]
                waited.append(time.perf_counter() - began)
            rows = rows_of(busy.tree)
            assert len(rows) >= admissions * PASSES and all(row["grad_norm"] > 0 for row in rows)
            assert max(row["wait_seconds"] for row in rows[1:]) < LOOK_SECONDS * 100, "the busy run had to wait"
    ratio = Ratio.of(waited, [each + GRACE_SECONDS for each in passes])
    figures = {
        "base": TINY.parent.name, "dtype": str(base.dtype), "pass_tokens": rows[-1]["tokens"],
        "pass_seconds": round(statistics.median(passes), 3), "admission_seconds": round(statistics.median(waited), 3),
        "longest_seconds": round(max(waited), 3), "convert_seconds": round(statistics.median(converted), 3),
        "seconds": {"pass": [round(each, 3) for each in passes], "admission": [round(each, 3) for each in waited]},
        **ratio.figures(),
    }  # fmt: skip
    yield Measured(ROW, NAME, ratio.median, at_most(1.0), figures)


@contextmanager
def program(config: Path, log: Path) -> Iterator[None]:
    """`graftwork trainer`, for as long as the `with` lasts."""
    with log.open("ab") as output:
        process = subprocess.Popen([*COMMAND, "trainer", str(config)], stdout=output, stderr=output)
    try:
        yield
        assert process.poll() is None, f"the trainer has ended: {log.read_text()[-2000:]}"
    finally:
        process.terminate()
        process.wait()


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while not holds():
        assert time.monotonic() < end, f"not so after {TIMEOUT_SECONDS:g} s"
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main(ROW, NAME, __doc__, measure)
