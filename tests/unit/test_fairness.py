"""Deficit round robin: every run with work gets its share of tokens, whatever its micro-batches and batches are.

Over K passes in which a run always had work, |tokens it learnt - K * quantum| < its largest micro-batch. What the tests
below hold beside this follows from it: two such runs differ by less than the sum of their largest micro-batches, and by
less than the larger of the two where both began with the window. Shares of what was learnt by all (not of what was
granted) are then met to one micro-batch, too; over later windows of n runs, to 2 (1 - 1/n) of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graftwork.config.load import dump
from graftwork.config.run import SamplingConfig
from graftwork.config.section import ModelConfig
from graftwork.model.attention import AttentionPlan
from graftwork.model.base import Ask, BaseModel
from graftwork.model.inject import Route
from graftwork.store.files import read_lines
from graftwork.store.layout import OutputTree, RunId, RunTree
from graftwork.store.queue import Version, publish_batch
from graftwork.training.fairness import DeficitRoundRobin
from graftwork.training.tenant import Tenant
from proofs.neighbour_lab import TOKENS_PER_MICRO_BATCH, Clock, Lab, SceneDisk, made_up_batch

QUANTUM = 40
RUNS = tuple(RunId(name) for name in "abcd")


@dataclass(frozen=True)
class Window:
    """first, last: passes. served: tokens of each run that had work before, in and after every pass of the window.
    largest: of their micro-batches. fresh: those that began with the window."""

    first: int
    last: int
    served: Mapping[RunId, int]
    largest: Mapping[RunId, int]
    fresh: frozenset[RunId]

    @property
    def passes(self) -> int:
        return self.last - self.first + 1


@dataclass
class History:
    """What each run learnt in each pass, and whether it had work before the pass, and still after it."""

    served: list[dict[RunId, int]] = field(default_factory=list)
    before: list[set[RunId]] = field(default_factory=list)
    after: list[set[RunId]] = field(default_factory=list)
    largest: dict[RunId, int] = field(default_factory=dict)

    def windows(self) -> Iterator[Window]:
        for first in range(len(self.served)):
            always = set(RUNS)
            for last in range(first, len(self.served)):
                always &= self.before[last] & self.after[last]
                span = range(first, last + 1)
                served = {run: sum(self.served[i].get(run, 0) for i in span) for run in sorted(always)}
                began = {run for run in always if first == 0 or run not in self.after[first - 1]}
                yield Window(first, last, served, {run: self.largest[run] for run in always}, frozenset(began))


def hold(history: History, quantum: int) -> int:
    """Assert every bound over every window; how many windows had several runs."""
    several = 0
    for window in history.windows():
        for run, served in window.served.items():
            assert abs(served - window.passes * quantum) < window.largest[run], (run, window)
        for one, other in combinations(window.served, 2):
            apart, largest = (
                abs(window.served[one] - window.served[other]),
                (window.largest[one], window.largest[other]),
            )
            assert apart < sum(largest), (one, other, window)
            if {one, other} <= window.fresh:
                assert apart < max(largest), (one, other, window)
        if len(window.served) > 1:
            several += 1
            share = sum(window.served.values()) / len(window.served)
            worst = max(abs(served - share) for served in window.served.values()) / max(window.largest.values())
            assert worst < (1 if set(window.served) == window.fresh else 2 * (1 - 1 / len(window.served))), window
    return several


# --- the shares alone -------------------------------------------------------------------------------------------------


class Simulation:
    """Passes over runs whose micro-batches are numbers of tokens, as the trainer makes them."""

    def __init__(self, quantum: int) -> None:
        self.shares = DeficitRoundRobin(quantum)
        self.queues: dict[RunId, deque[int]] = {run: deque() for run in RUNS}
        self.history = History()

    def arrive(self, run: RunId, sizes: Sequence[int]) -> None:
        self.queues[run].extend(sizes)
        self.history.largest[run] = max(self.history.largest.get(run, 0), *sizes)

    def leave(self, run: RunId) -> None:
        """It is evicted, say: slot and work are gone."""
        self.queues[run].clear()
        self.shares.forget(run)
        if self.history.after:
            self.history.after[-1].discard(run)

    def one_pass(self) -> None:
        with_work = [run for run, queue in self.queues.items() if queue]
        self.shares.grant(with_work)
        served = {run: self._serve(run, self.queues[run]) for run in with_work}
        self.history.before.append(set(with_work))
        self.history.after.append({run for run, queue in self.queues.items() if queue})
        self.history.served.append(served)

    def _serve(self, run: RunId, queue: deque[int]) -> int:
        served = 0
        while queue and self.shares.affords(run, queue[0]):
            self.shares.spend(run, queue[0])
            served += queue.popleft()
        if not queue:
            self.shares.forget(run)
        return served


Happening = tuple[RunId, Sequence[int] | None]
"""A run gets micro-batches of these sizes, or goes (None)."""
sizes = st.lists(st.integers(1, QUANTUM), min_size=1, max_size=30)
happenings = st.lists(st.tuples(st.sampled_from(RUNS), st.one_of(sizes, sizes, sizes, st.none())), max_size=3)


@given(st.lists(happenings, min_size=1, max_size=25))
def test_over_any_window_each_run_is_within_a_micro_batch_of_its_share(passes: list[list[Happening]]) -> None:
    simulation = Simulation(QUANTUM)
    for happened in passes:
        for run, arrived in happened:
            if arrived is None:
                simulation.leave(run)
            else:
                simulation.arrive(run, arrived)
        simulation.one_pass()
    hold(simulation.history, QUANTUM)


def test_the_bound_cannot_be_made_smaller() -> None:
    """Micro-batches of 39 tokens in shares of 40: at worst 38 behind or before."""
    simulation = Simulation(QUANTUM)
    simulation.arrive(RUNS[0], [39] * 100)
    for _ in range(80):
        simulation.one_pass()
    off = {w.served[RUNS[0]] - w.passes * QUANTUM for w in simulation.history.windows()}
    assert (min(off), max(off)) == (-38, 38)


def test_what_a_run_did_not_use_is_not_saved_up() -> None:
    simulation = Simulation(QUANTUM)
    for _ in range(10):
        simulation.arrive(RUNS[0], [1])
        simulation.one_pass()
    for run in RUNS[:2]:
        simulation.arrive(run, [40] * 10)
    simulation.one_pass()
    assert simulation.history.served[-1] == {RUNS[0]: 40, RUNS[1]: 40}


def test_a_run_that_cannot_afford_its_micro_batch_yet_keeps_what_it_was_granted() -> None:
    shares = DeficitRoundRobin(10)
    shares.grant([RUNS[0]])
    shares.spend(RUNS[0], 4)
    assert not shares.affords(RUNS[0], 7)
    shares.grant([RUNS[0]])
    assert shares.affords(RUNS[0], 16) and not shares.affords(RUNS[0], 17)
    assert not shares.affords(RUNS[1], 1)


# --- in the trainer ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guest:
    """A run of the trainer tests. lengths: of the rollouts in each of its batches, without the last token, which is
    only predicted."""

    lengths: Sequence[int]
    isolation: str = "exact"


class House:
    """A trainer and its guests, whose batches are all said to be sampled from their first version."""

    def __init__(self, lab: Lab, folder: Path, guests: Mapping[RunId, Guest], clock: Clock) -> None:
        self.guests, self.outputs = guests, OutputTree(folder)
        self.trainer = lab.trainer(self.outputs, len(guests), clock, SceneDisk())
        for run, guest in guests.items():
            rollouts = SamplingConfig(prompts_per_step=1, samples_per_prompt=len(guest.lengths))
            config = lab.config(
                max_steps=1000, checkpoint_interval_steps=1000, max_staleness_steps=1000, isolation=guest.isolation,
                sampling=rollouts,
            )  # fmt: skip
            self.trainer.disk.publish_file(self.tree(run).orch_toml, dump(config))
        self.trainer.one_pass()
        self.first = {run: Version(run, 0, self.tenant(run).known[0][-1]) for run in guests}

    def tree(self, run: RunId) -> RunTree:
        return self.outputs.run(run)

    def tenant(self, run: RunId) -> Tenant:
        return self.trainer.tenants[run]

    def publish(self, run: RunId, step: int) -> None:
        lengths = [length + 1 for length in self.guests[run].lengths]
        batch = made_up_batch(run, step, self.first[run], np.random.default_rng(step), lengths)
        publish_batch(self.trainer.disk, self.tree(run), batch)

    def one_pass(self) -> dict[RunId, int]:
        """Tokens that each run learnt in it."""
        before = {run: self.tenant(run).tokens_learnt for run in self.guests}
        self.trainer.one_pass()
        return {run: self.tenant(run).tokens_learnt - before[run] for run in self.guests}


@pytest.fixture
def house(tmp_path: Path, tiny: BaseModel, tiny_model_config: ModelConfig) -> Callable[[Mapping[RunId, Guest]], House]:
    lab = Lab(tmp_path, tiny, tiny_model_config)
    return lambda guests: House(lab, tmp_path / "outputs", guests, Clock())


def test_runs_with_work_waiting_are_within_a_micro_batch_of_their_shares(
    house: Callable[[Mapping[RunId, Guest]], House],
) -> None:
    """Through the trainer: short and long sequences, small and large batches, exact and mixed."""
    guests = {
        RUNS[0]: Guest([39] * 6),
        RUNS[1]: Guest([3] * 4),
        RUNS[2]: Guest([7, 9], isolation="mixed"),
        RUNS[3]: Guest([5] * 5, isolation="mixed"),
    }
    passes = 12
    full = house(guests)
    for run, guest in guests.items():
        for step in range(1, 2 + -(-(passes + 1) * TOKENS_PER_MICRO_BATCH // sum(guest.lengths))):
            full.publish(run, step)
    history = History(largest={run: min(TOKENS_PER_MICRO_BATCH, sum(g.lengths)) for run, g in guests.items()})
    for _ in range(passes):
        history.served.append(full.one_pass())
        history.before.append(set(RUNS))
        history.after.append(set(RUNS))
    assert hold(history, TOKENS_PER_MICRO_BATCH) == passes * (passes + 1) // 2


def test_a_small_run_is_not_held_up_by_a_large_batch(house: Callable[[Mapping[RunId, Guest]], House]) -> None:
    """The large run's batch takes 25 passes; meanwhile the small one finishes a step in each."""
    large, small = RUNS[0], RUNS[1]
    full = house({large: Guest([20] * 50), small: Guest([6, 7])})
    full.publish(large, 1)
    for step in range(1, 26):
        assert full.tenant(large).step == 0
        full.publish(small, step)
        served = full.one_pass()
        assert full.tenant(small).step == step
        assert served == {large: 40, small: 13}
    assert full.tenant(large).step == 1
    rows = [read_lines(full.tree(run).metrics_jsonl) for run in (large, small)]
    assert [len(rows[0]), len(rows[1])] == [1, 25]


@dataclass(frozen=True)
class SlowBase(BaseModel):
    """A forward pass of a micro-batch takes ten seconds of a clock that nothing else moves; a probe takes none."""

    clock: Clock = field(default_factory=Clock)

    def logprobs(
        self, tokens: Tensor, positions: Tensor, plan: AttentionPlan, route: Route, asks: Sequence[Ask], chunk: int
    ) -> list[tuple[Tensor, Tensor]]:
        self.clock.now += 10 if torch.is_grad_enabled() else 0
        return super().logprobs(tokens, positions, plan, route, asks, chunk)


def test_waiting_for_a_turn_is_measured_apart_from_work_and_from_waiting_for_a_batch(
    tmp_path: Path, tiny: BaseModel, tiny_model_config: ModelConfig
) -> None:
    """Between its two micro-batches the large run waits for the small one's."""
    slow = SlowBase(**vars(tiny))
    large, small = RUNS[0], RUNS[1]
    guests = {large: Guest([20] * 4), small: Guest([6, 7])}
    full = House(Lab(tmp_path, slow, tiny_model_config), tmp_path / "outputs", guests, slow.clock)
    slow.clock.now += 100
    full.publish(large, 1)
    full.publish(small, 1)
    full.one_pass()
    full.one_pass()
    names = ("train_seconds", "turn_wait_seconds", "wait_seconds", "tokens_per_second")
    [of_large], [of_small] = (read_lines(full.tree(run).metrics_jsonl) for run in (large, small))
    assert [of_large[name] for name in names] == [20, 10, 100, pytest.approx(84 / 130)]
    assert [of_small[name] for name in names] == [10, 10, 100, pytest.approx(15 / 120)]
