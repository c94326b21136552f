"""A workload of three runs on a tiny base, with batches that were recorded once: a function of its files.

One run starts from a saved adapter of another rank than the slots', one is fresh and has a KL loss, one is "mixed"; two
slots, so one of them waits. All its batches are laid into the tree before a trainer starts. They are good however often
that trainer is broken off and started again, as long as every version comes out with the digest that it was recorded
with, which is what `proofs/faults.py` is about.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftwork.adapters.convert import convert_adapter
from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.source import AdapterFacts
from graftwork.config.load import dump, load
from graftwork.config.run import AdapterConfig, LossConfig, OptimizerConfig, RetentionConfig, RunConfig
from graftwork.config.schema import TrainerConfig
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.errors import Damaged
from graftwork.model.base import BaseModel, load_base
from graftwork.programs.verify import verify_run
from graftwork.store.chain import read_chain
from graftwork.store.disk import RETIRED_PREFIX, STAGING_PREFIX, Disk
from graftwork.store.files import Content, is_stable, pieces, read_json
from graftwork.store.layout import OutputTree, RunId, RunTree, stable_steps
from graftwork.store.queue import publish_batch, read_version
from graftwork.store.status import TERMINAL, read_status
from graftwork.training.liveness import Liveness
from graftwork.training.tenant import Tenant
from graftwork.training.trainer import Trainer
from proofs.adapter_models import make_base
from proofs.killing import POLL_SECONDS
from proofs.made_up import random_adapter, random_batch

SLOTS, SLOT_RANK, ADAPTER_RANK = 2, 4, 2
PASSES_MAX = 500
"""Far more than the workload takes: a trainer that is still busy then never comes to rest."""
TIMEOUT_SECONDS = 600.0
"""Of a whole workload in a process; it takes seconds."""
WARM = "warm"
RUNS: Mapping[str, dict[str, Any]] = {
    "kl": {
        "max_steps": 5, "seed": 1, "loss": LossConfig(kl_coefficient=0.1), "adapter": AdapterConfig(rank=4),
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
    },
    "mixed": {
        "max_steps": 4, "seed": 2, "isolation": "mixed", "adapter": AdapterConfig(rank=1),
        "optimizer": OptimizerConfig(learning_rate=5e-3, weight_decay=0.1),
    },
    WARM: {
        "max_steps": 4, "seed": 3, "adapter": AdapterConfig(rank=3),
        "optimizer": OptimizerConfig(schedule="cosine", decay_steps=9),
    },
}  # fmt: skip
SHARED: dict[str, Any] = {"checkpoint_interval_steps": 2, "max_staleness_steps": 1}
"""So few steps that versions, batches and checkpoints are retired in a run of four."""


class StillBusy(Exception):
    """A trainer that never came to rest."""


class EveryPass(Liveness):
    """Writes its file in every pass, so that what a trainer writes does not hang on the clock."""

    def publish(self, passes: int, tenants: Mapping[RunId, Tenant]) -> None:
        self.published = 0.0
        super().publish(passes, tenants)


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    digests  of every version, in order
    trainer  the files of its last checkpoint's trainer/
    kept     steps of the checkpoints, versions and batches that are there
    """

    digests: tuple[str, ...]
    trainer: Mapping[str, bytes]
    kept: Mapping[str, list[int]]

    def differences(self, found: Outcome) -> list[str]:
        """How what `found` computed differs; nothing, if it is bit-equal."""
        if self.digests != found.digests:
            pairs = zip(self.digests, found.digests, strict=False)
            first = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(self.digests), len(found.digests)))
            return [f"version {first} differs ({len(found.digests)} of {len(self.digests)} versions)"]
        names = sorted(self.trainer.keys() | found.trainer.keys())
        return [f"trainer/{name} differs" for name in names if self.trainer.get(name) != found.trainer.get(name)]


def outcome_of(tree: RunTree) -> Outcome:
    """Raises Damaged when its chain cannot be read."""
    folder = tree.checkpoint(RUNS[str(tree.id)]["max_steps"]) / "trainer"
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*"))}
    return Outcome(tuple(link.digest for link in read_chain(tree)), files, _kept(tree))


def _kept(tree: RunTree) -> dict[str, list[int]]:
    return {parent.name: stable_steps(parent) for parent in (tree.checkpoints, tree.broadcasts, tree.rollouts)}


def trees_of(outputs: OutputTree) -> list[RunTree]:
    return [outputs.run(RunId(name)) for name in RUNS]


class Unsynced(Disk):
    """Without fsync: what a process wrote outlives the process. What fsync is for is the machine's own end."""

    def write(self, path: Path, data: Content) -> None:
        with path.open("xb") as file:
            for piece in pieces(data):
                file.write(piece)

    def sync_file(self, path: Path) -> None:
        path.stat()

    def sync_folder(self, path: Path) -> None:
        path.stat()


def unfinished(outputs: OutputTree) -> list[str]:
    """Runs that are not, and what they are."""
    states = {tree.id: _state_of(tree) for tree in trees_of(outputs)}
    return [f"run {run} is {state}" for run, state in states.items() if state != "finished"]


def _state_of(tree: RunTree) -> str:
    status = read_status(tree)
    if status is None:
        return "without a status"
    return status.state if status.reason is None else f"{status.state} ({status.reason})"


def settle(trainer: Trainer) -> None:
    """Passes until there is nothing to do. Raises StillBusy."""
    for _ in range(PASSES_MAX):
        if not trainer.one_pass():
            return
    raise StillBusy(f"the trainer is still busy after {PASSES_MAX} passes")


@dataclass(frozen=True)
class Workload:
    """ready: the tree as it is before the first trainer starts. expected: what the runs come to when nothing fails."""

    base: BaseModel
    model: ModelConfig
    ready: Path
    expected: Mapping[str, Outcome]

    @staticmethod
    def make(folder: Path) -> Workload:
        """Make a base of its own, and record."""
        model = ModelConfig(path=str(make_base("qwen3", folder)), dtype="float32", device="cpu")
        return Workload.record(folder, load_base(model, LoraConfig(max_rank=SLOT_RANK)), model)

    @staticmethod
    def record(folder: Path, base: BaseModel, model: ModelConfig) -> Workload:
        """Run the workload once, feeding every step with a batch sampled from the version before it, and keep them."""
        torch.set_num_threads(1)
        adapter = save_adapter(folder / "adapter", base)
        recording, ready = OutputTree(folder / "recording"), OutputTree(folder / "ready")
        for outputs, history in ((recording, True), (ready, False)):
            for tree in trees_of(outputs):
                write_run(tree, model, adapter, history=history)
        _feed(_trainer(recording, base, model, Disk()), trees_of(recording))
        for recorded, tree in zip(trees_of(recording), trees_of(ready), strict=True):
            shutil.copytree(recorded.rollouts, tree.rollouts)
        whole = OutputTree(shutil.copytree(ready.root, folder / "whole"))
        settle(_trainer(whole, base, model, Disk()))
        workload = Workload(base, model, ready.root, {str(tree.id): outcome_of(tree) for tree in trees_of(whole)})
        assert workload.differences(recording) == [], "it makes a difference when the batches come"
        return workload

    def lay(self, folder: Path) -> OutputTree:
        """The workload, ready to be trained, as a new tree in `folder`."""
        shutil.copytree(self.ready, folder)
        return OutputTree(folder)

    @contextmanager
    def laid(self) -> Iterator[OutputTree]:
        """The same in a temporary folder, and no logs: a trainer tells of every fault, and many are meant to happen."""
        logging.disable(logging.CRITICAL)
        try:
            with tempfile.TemporaryDirectory() as folder:
                yield self.lay(Path(folder) / "outputs")
        finally:
            logging.disable(logging.NOTSET)

    def trainer(self, outputs: OutputTree, disk: Disk) -> Trainer:
        return _trainer(outputs, self.base, self.model, disk)

    def differences(self, outputs: OutputTree) -> list[str]:
        """What is not as it is when nothing fails, and what `graftwork runs verify` finds."""
        wrong = unfinished(outputs)
        for tree in trees_of(outputs):
            try:
                texts = self.expected[str(tree.id)].differences(outcome_of(tree))
            except Damaged as error:
                texts = [str(error)]
            texts += [f"verify: {text.replace(f'{tree.root}/', '')}" for text in verify_run(tree).findings]
            wrong += [f"run {tree.id}: {text}" for text in texts]
        return wrong

    def cost(self, outputs: OutputTree, of: str | None, error: int) -> list[str]:
        """What an operation that failed may not have done: cost another run than `of`, or that one without a word."""
        wrong = []
        for tree in trees_of(outputs):
            state = _state_of(tree)
            if str(tree.id) != of and state != "finished":
                wrong.append(f"it cost run {tree.id}, which is {state}")
            elif state.startswith("failed") and (os.strerror(error) not in state or "nobody foresaw" in state):
                wrong.append(f"run {tree.id} does not say why: {state}")
        return wrong

    def remains(self, outputs: OutputTree) -> list[str]:
        """Folders that were half written or half removed, and that nobody tidied up. Single files may stay
        (docs/files.md)."""
        remains = []
        for tree in trees_of(outputs):
            found = [*tree.root.glob(f"*/{STAGING_PREFIX}*"), *tree.trash.glob(f"{RETIRED_PREFIX}*")]
            remains += [f"run {tree.id}: {path.parent.name}/{path.name} is left" for path in found if path.is_dir()]
        return remains

    def kept_too_long(self, outputs: OutputTree) -> list[str]:
        """Folders that are not retired, and would be when nothing fails."""
        kept = []
        for tree in trees_of(outputs):
            expected, found = self.expected[str(tree.id)].kept, _kept(tree)
            kept += [f"run {tree.id}: {n} of {found[n]}, not {expected[n]}" for n in found if found[n] != expected[n]]
        return kept


def ask_again(outputs: OutputTree) -> None:
    """What `graftwork resume` does to runs that failed; one without a checkpoint to resume from is submitted anew."""
    for tree in trees_of(outputs):
        status = read_status(tree)
        if status is None or status.state != "failed":
            continue
        if stable_steps(tree.checkpoints):
            config = load(RunConfig, tree.orch_toml).model_copy(update={"resume": True})
            Disk().publish_file(tree.orch_toml, dump(config))
        else:
            Disk().quarantine(tree.status_json, tree.trash)


@contextmanager
def scratch() -> Iterator[Workload]:
    """A workload in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield Workload.make(Path(folder))


def trainer_config(outputs: OutputTree, model: ModelConfig, **settings: Any) -> TrainerConfig:
    return TrainerConfig(
        model=model, lora=LoraConfig(max_rank=SLOT_RANK), output_dir=str(outputs.root), slots=SLOTS,
        tokens_per_micro_batch=40, threads=1, **settings,
    )  # fmt: skip


def _trainer(outputs: OutputTree, base: BaseModel, model: ModelConfig, disk: Disk) -> Trainer:
    trainer = Trainer(trainer_config(outputs, model), base, disk, None)
    trainer.liveness = EveryPass(disk, trainer.outputs)
    return trainer


def save_adapter(folder: Path, base: BaseModel) -> Path:
    with Disk().publish_dir(folder, "adapter", {}) as staging:
        for name, data in write_peft(random_adapter(base.spec.shapes, ADAPTER_RANK), AdapterFacts()).items():
            staging.write(name, data)
    return folder


def write_run(tree: RunTree, model: ModelConfig, adapter: Path, *, history: bool) -> None:
    """Its orch.toml; the warm run's step_0, too, made without sight of any slots: the trainer brings it to them."""
    retention = RetentionConfig(checkpoints=2, history=history)
    config = RunConfig(model=model, retention=retention, **SHARED, **RUNS[str(tree.id)])
    if str(tree.id) == WARM:
        config = config.model_copy(update={"init_adapter_path": str(adapter)})
        convert_adapter(Disk(), adapter, tree.root)
    Disk().publish_file(tree.orch_toml, dump(config))


def _feed(trainer: Trainer, trees: list[RunTree]) -> None:
    settle(trainer)
    while feed(trees):
        settle(trainer)
    assert not trainer.tenants, "the recording did not come to its end"


def feed(trees: Sequence[RunTree]) -> bool:
    """Publish a made-up batch for every run that waits for one; whether any did."""
    waiting = [(tree, batch) for tree in trees if (batch := wanted(tree)) and not is_stable(tree.batch(batch))]
    for tree, batch in waiting:
        published = read_version(tree, batch - 1)
        assert published is not None
        publish_batch(Disk(), tree, random_batch(tree.id, batch, published, seed=RUNS[str(tree.id)]["seed"]))
    return bool(waiting)


def wanted(tree: RunTree) -> int | None:
    status = read_status(tree)
    return None if status is None else status.wanted_batch


def versions_in(outputs: OutputTree) -> int:
    """How many the runs have published, by their chains."""
    chains = [tree.chain_jsonl for tree in trees_of(outputs)]
    return sum(chain.read_bytes().count(b"\n") for chain in chains if chain.exists())


class Processes:
    """`graftwork trainer` on a workload, one process after the other."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        self.workload, self.outputs, self.log = workload, workload.lay(folder), folder.with_suffix(".log")
        self.config = folder.with_suffix(".toml")
        self.config.write_bytes(dump(trainer_config(self.outputs, workload.model, exit_when_done=True)))

    def to_the_end(self, rng: random.Random, seconds: float, most: int) -> list[str]:
        """Kill at random moments, `most` times at most, until a process ends by itself; what was hit: the places of
        what was left half done. A moment is a number of versions, and up to `seconds` into the next one: on a machine
        that is now slow and now fast, a time alone would hit the beginning or nothing."""
        moments: list[str] = []
        while not self.ended:
            before = self.half_done()
            with self.at_work() as process:
                if len(moments) < most:
                    self._wait_for_versions(
                        process, rng.randint(there := versions_in(self.outputs), max(there, self.versions_max - 1))
                    )
                    time.sleep(rng.uniform(0, seconds))
                    process.kill()
                code = process.wait(timeout=TIMEOUT_SECONDS)
            if code == -signal.SIGKILL:
                moments.append(min((path.parent.name for path in self.half_done() - before), default="nothing"))
            elif code:
                break
        return moments

    @property
    def versions_max(self) -> int:
        return sum(len(outcome.digests) for outcome in self.workload.expected.values())

    def _wait_for_versions(self, process: subprocess.Popen[bytes], count: int) -> None:
        end = time.monotonic() + TIMEOUT_SECONDS
        while process.poll() is None and versions_in(self.outputs) < count:
            assert time.monotonic() < end, f"{versions_in(self.outputs)} of {count} versions after {TIMEOUT_SECONDS} s"
            time.sleep(POLL_SECONDS)

    @contextmanager
    def at_work(self) -> Iterator[subprocess.Popen[bytes]]:
        """A process that has begun its work, or has ended; it does not outlive the `with`."""
        with self.log.open("ab") as output:
            command = [sys.executable, "-m", "graftwork", "trainer", str(self.config)]
            process = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        try:
            while process.poll() is None and not self._is_open(process.pid):
                time.sleep(POLL_SECONDS)
            yield process
        finally:
            process.kill()
            process.wait()

    def _is_open(self, pid: int) -> bool:
        path = self.outputs.trainer_json
        return path.exists() and read_json(path, "trainer")["pid"] == pid

    def seconds_of_a_version(self) -> float:
        """How long one takes, on average over a whole workload, once its trainer has started."""
        with self.at_work() as process:
            began = time.monotonic()
            process.wait(timeout=TIMEOUT_SECONDS)
            return (time.monotonic() - began) / self.versions_max

    @property
    def ended(self) -> bool:
        """Whether every run has, well or badly; another trainer would wait for more."""
        statuses = [read_status(tree) for tree in trees_of(self.outputs)]
        return all(status is not None and status.state in TERMINAL for status in statuses)

    def half_done(self) -> set[Path]:
        """What a process that is now dead was writing or removing."""
        return {p for p in self.outputs.root.rglob("*") if p.name.startswith((STAGING_PREFIX, RETIRED_PREFIX))}

    def wrong(self) -> list[str]:
        differences = self.workload.differences(self.outputs)
        return [*differences, self.log.read_text()[-2000:]] if differences else []
