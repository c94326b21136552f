"""Bad neighbours: a good run beside runs that do what they should not is, byte for byte, the run that it is alone.

For each variant of the good run a reference is made first, in a trainer of its own. Each scenario then has a trainer
and a tree of its own: the good run's batches are replayed, byte by byte, beside one to three offenders, each of a kind
of neighbour_kinds.py. What must hold:

- every published digest, every byte of every checkpoint and of the chain, and the rows of metrics.jsonl (times aside)
  are those of the reference;
- nothing is raised out of a pass;
- within two passes after the harm could be seen, the offender has ended as its kind should, with the reason in its
  status.json, or goes on where that is right;
- its slot is free and zero, and a newcomer gets a slot and starts with what it would start with elsewhere.

Replay one: `python -m proofs.neighbours --seed SEED --only NUMBER`.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from graftwork.config.load import dump
from graftwork.config.run import AdapterConfig, LossConfig, RetentionConfig
from graftwork.store.layout import OutputTree, RunId
from graftwork.store.queue import read_version
from proofs.neighbour_kinds import MISHAPS, Kind, Offender
from proofs.neighbour_lab import (
    GOOD,
    PROMPTS,
    SAMPLES,
    VARIANTS,
    Clock,
    Lab,
    Record,
    Scene,
    SceneDisk,
    Variant,
    status_of,
)
from proofs.neighbour_tricks import TRICKS

KINDS: Mapping[str, Kind] = {**MISHAPS, **TRICKS}
NEWCOMER = RunId("newcomer")
PASSES_TO_NAME, PASSES_MAX = 2, 100
SLOTS = (3, 4)


# --- scenarios --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One offender. at: steps that it takes before it does harm. joins: the pass before which its folder appears."""

    run: RunId
    kind: str
    at: int
    joins: int
    rollouts: int
    settings: Mapping[str, Any]
    seed: int


@dataclass(frozen=True)
class Scenario:
    seed: int
    number: int
    variant: Variant
    slots: int
    plans: tuple[Plan, ...]

    def __str__(self) -> str:
        kinds = " + ".join(f"{plan.kind} at {plan.at}" for plan in self.plans)
        return f"{self.number}: {self.variant}, {self.slots} slots, {kinds}"


def drawn(count: int, seed: int) -> list[Scenario]:
    """Every kind once alone, then two or three together. A scenario depends on its number and the seed alone."""
    return [_draw(number, seed) for number in range(count)]


def _draw(number: int, seed: int) -> Scenario:
    rng = random.Random(f"{seed} {number}")
    kinds = list(KINDS)[number : number + 1] or rng.sample(list(KINDS), rng.choice([2, 3]))
    plans = tuple(_plan(rng, index, kind) for index, kind in enumerate(kinds))
    return Scenario(seed, number, rng.choice(VARIANTS), rng.choice(SLOTS), plans)


def _plan(rng: random.Random, index: int, kind: str) -> Plan:
    settings = {
        "isolation": rng.choice(["exact", "mixed"]),
        "adapter": AdapterConfig(rank=rng.choice([1, 4])),
        "loss": LossConfig(kl_coefficient=rng.choice([0.0, 0.1])),
        "retention": RetentionConfig(history=rng.random() < 0.5),
        **KINDS[kind].settings,
    }
    return Plan(
        run=RunId(f"{rng.choice('az')}{index}"),  # in line before the good run, or after it
        kind=kind,
        at=rng.randint(KINDS[kind].earliest, 3),
        joins=rng.randint(0, 2),
        rollouts=rng.choice([2, PROMPTS * SAMPLES]),
        settings=settings,
        seed=rng.randrange(2**32),
    )


@dataclass
class Watch:
    """What came of one offender. passes: since its harm could be seen. slot: the one that it has. heard: the reason was
    said. judged: there is nothing more to wait for."""

    offender: Offender
    passes: int = 0
    slot: int | None = None
    heard: bool = False
    judged: bool = False

    def before_pass(self) -> None:
        if self.offender.struck is not None and self.offender.kind.visible(self.offender):
            self.passes += 1

    def after_pass(self) -> Iterator[str]:
        """What is wrong with it by now."""
        if self.offender.tenant is not None:
            self.slot = self.offender.seated.learner.slot
        elif self.slot is not None:
            yield from self._traces(self.slot)
            self.slot = None
        if self.judged or self.offender.struck is None:
            return
        self.heard = self.heard or self._is_named()
        if self.heard and self._is_through():
            self.judged = True
        elif not self.heard and self.passes >= PASSES_TO_NAME:
            self.judged = True
            tree = self.offender.tree
            yield f"run {tree.id}, {self.passes} passes after it did harm: {status_of(tree) or 'no status'}"

    def _is_named(self) -> bool:
        offender, trainer = self.offender, self.offender.scene.trainer
        tree, fate, says = offender.tree, offender.kind.fate, offender.kind.says
        status = status_of(tree)
        if fate == "removed":
            return offender.tenant is None and any(gone["run"] == str(tree.id) for gone in trainer.liveness.removed)
        if fate == "unwritten":
            return offender.tenant is None and tree.id in trainer.unwritten
        if fate == "goes on":
            return not says or (status is not None and status.state == "active" and says in str(status.reason))
        return offender.tenant is None and status is not None and status.state == fate and says in str(status.reason)

    def _is_through(self) -> bool:
        offender = self.offender
        if offender.kind.fate != "goes on":
            return True
        status = status_of(offender.tree)
        assert offender.struck is not None
        return status is not None and status.step is not None and status.step > offender.struck

    def _traces(self, slot: int) -> Iterator[str]:
        """What it left behind, at the end of the pass that took its slot back."""
        banks = self.offender.scene.trainer.banks
        for name, bank in (("training", banks.training), ("reference", banks.reference)):
            if bank is None:
                continue
            rows = [bank.weights[slot]] + ([] if bank.gradients is None else [bank.gradients[slot]])
            if bank.held[slot] is not None or any(row.count_nonzero() for row in rows):
                yield f"run {self.offender.tree.id} left something in {name} slot {slot}"
        if self.offender.kind.fate == "removed" and self.offender.tree.root.exists():
            yield f"the folder of run {self.offender.tree.id} came back"


class LeftPass(Exception):
    """The trainer would have ended."""


class Play:
    """One scenario from its first pass to its last."""

    def __init__(self, lab: Lab, scenario: Scenario, folder: Path) -> None:
        self.lab, self.scenario = lab, scenario
        clock, disk, outputs = Clock(), SceneDisk(), OutputTree(folder)
        tree = lab.begin(outputs, scenario.variant)
        self.scene = Scene(outputs, lab.trainer(outputs, scenario.slots, clock, disk), clock, disk, tree)
        self.watches = [Watch(self._offender(plan)) for plan in scenario.plans]
        self.newcomer_since: int | None = None

    def _offender(self, plan: Plan) -> Offender:
        config = self.lab.config(seed=plan.seed, **plan.settings)
        tree, rng = self.scene.outputs.run(plan.run), np.random.default_rng(plan.seed)
        return Offender(self.scene, tree, config, KINDS[plan.kind], plan.at, plan.rollouts, rng)

    def wrong(self) -> Iterator[str]:
        """Play it; what does not hold."""
        for number in range(PASSES_MAX):
            try:
                yield from self._one_pass(number)
            except LeftPass as error:
                yield f"pass {number}: {error}"
                return
            if self._is_over(number):
                break
        else:
            yield f"not over after {PASSES_MAX} passes: {[status_of(w.offender.tree) for w in self.watches]}"
        yield from self.lab.records[self.scenario.variant].differences(Record.of(self.scene.good))
        status = status_of(self.scene.good)
        if status is None or (status.state, status.reason) != ("finished", None):
            yield f"the good run: {status}"

    def _one_pass(self, number: int) -> Iterator[str]:
        """Raises LeftPass."""
        self._turns(number)
        for watch in self.watches:
            watch.before_pass()
        try:
            self.scene.trainer.one_pass()
        except Exception as error:
            raise LeftPass(f"{type(error).__name__} left it: {error}") from error
        self.scene.clock.next_pass()
        for watch in self.watches:
            yield from watch.after_pass()
        if self.newcomer_since is None and self._is_time_for_newcomer():
            self._bring_newcomer(number)
        elif self.newcomer_since == number - PASSES_TO_NAME:
            yield from self._wrong_with_newcomer()

    def _turns(self, number: int) -> None:
        """What the orchestrators do before a pass."""
        good, tenant = self.scene.good, self.scene.trainer.tenants.get(GOOD)
        if tenant is not None and not tenant.finished and not good.batch(tenant.step + 1).exists():
            recorded = self.lab.alone[self.scenario.variant].batch(tenant.step + 1)
            shutil.copytree(recorded, good.batch(tenant.step + 1))
        for plan, watch in zip(self.scenario.plans, self.watches, strict=True):
            if plan.joins == number:
                self.scene.disk.publish_file(watch.offender.tree.orch_toml, dump(watch.offender.config))
            watch.offender.turn()

    def _is_time_for_newcomer(self) -> bool:
        seated = len(self.scene.trainer.tenants)
        return all(watch.judged for watch in self.watches) and seated < self.scenario.slots

    def _bring_newcomer(self, number: int) -> None:
        self.newcomer_since = number
        config = dump(self.lab.config(seed=7, adapter=AdapterConfig(rank=3)))
        self.scene.disk.publish_file(self.scene.outputs.run(NEWCOMER).orch_toml, config)

    def _wrong_with_newcomer(self) -> Iterator[str]:
        """It starts fresh, with the seed of the good run's fresh variant."""
        tree = self.scene.outputs.run(NEWCOMER)
        tenant, version = self.scene.trainer.tenants.get(NEWCOMER), read_version(tree, 0)
        if tenant is None or version is None:
            yield f"the newcomer has no slot: {status_of(tree)}"
        elif version.version.digest != self.lab.records["fresh"].digests[0]:
            yield f"the newcomer starts at {version.version.name}"

    def _is_over(self, number: int) -> bool:
        since = self.newcomer_since
        return since is not None and number >= since + PASSES_TO_NAME and GOOD not in self.scene.trainer.tenants


def play(lab: Lab, scenario: Scenario) -> list[str]:
    """What does not hold in a scenario: nothing, if all is well."""
    with tempfile.TemporaryDirectory(dir=lab.folder) as folder:
        return list(Play(lab, scenario, Path(folder)).wrong())


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass
class Figures:
    """asked and done: scenarios, and of them those that held. kinds: in how many of these each stood. failures: what
    did not hold, and what replays it."""

    asked: int
    done: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, scenario: Scenario, wrong: Sequence[str]) -> None:
        if wrong:
            replay = f"python -m proofs.neighbours --seed {scenario.seed} --only {scenario.number}"
            self.failures.append(f"{scenario}: {'; '.join(wrong)}. Replay: {replay}")
        else:
            self.done += 1
            self.kinds.update(plan.kind for plan in scenario.plans)


def scenarios(count: int, seed: int) -> Figures:
    """Play `count` of them; every kind stands in at least one, if `count` is as many as there are kinds."""
    return _play_all(drawn(count, seed))


def _play_all(chosen: Sequence[Scenario]) -> Figures:
    figures = Figures(len(chosen))
    logging.disable(logging.CRITICAL)  # a trainer says of each offender why it ended
    try:
        with tempfile.TemporaryDirectory() as folder:
            lab = Lab.make(Path(folder))
            for scenario in chosen:
                figures.add(scenario, play(lab, scenario))
    finally:
        logging.disable(logging.NOTSET)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--only", type=int, help="number of the one scenario to play")
    options = parser.parse_args()
    if options.only is None:
        chosen = drawn(options.count, options.seed)
    else:
        chosen = [_draw(options.only, options.seed)]
    figures = _play_all(chosen)
    print("\n".join([*figures.failures, f"{figures.done} of {figures.asked} scenarios held"]))
    return 0 if figures.done == figures.asked else 1


if __name__ == "__main__":
    sys.exit(main())
