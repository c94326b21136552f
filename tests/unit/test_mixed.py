"""isolation = "mixed": runs that share a micro-batch get their own gradients, and nobody's NaN is anybody else's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.prepare import prepare
from graftwork.adapters.snapshot import snapshot_of
from graftwork.adapters.source import InMemory
from graftwork.config.load import dump
from graftwork.config.run import LossConfig, OptimizerConfig
from graftwork.config.section import ModelConfig
from graftwork.model.attention import AttentionPlan
from graftwork.model.base import Ask, BaseModel
from graftwork.model.inject import Route
from graftwork.store.files import read_lines
from graftwork.store.layout import OutputTree, RunId, RunTree
from graftwork.store.queue import Version, publish_batch, read_version
from graftwork.training.learner import Banks, Learner, LearnerConfig, learn
from graftwork.training.packer import Example, Round
from proofs.made_up import VOCAB, random_adapter
from proofs.neighbour_lab import Clock, Lab, SceneDisk, made_up_batch, status_of

BAR = 1e-5
"""Of a run's gradient in a joint micro-batch: how far from its own, over its own."""


@pytest.fixture(params=["dense", "moe"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    return request.getfixturevalue({"dense": "tiny", "moe": "moe"}[request.param])


# --- gradients --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tenancy:
    """A run in a slot, and what it learns from."""

    rank: int
    scale: float
    temperature: float
    loss: LossConfig | None
    lengths: Sequence[int]
    seed: int

    def part(self, banks: Banks, slot: int) -> Part:
        shapes = banks.base.spec.shapes
        adapters = [random_adapter(shapes, self.rank, scale=self.scale, seed=self.seed + i) for i in range(2)]
        snapshot = snapshot_of(prepare(InMemory(adapters[0]), banks.base.spec), banks.base.fingerprint)
        snapshot = replace(snapshot, reference=adapters[1])  # another than its own, so that the KL term has a gradient
        learner = Learner(banks, slot, LearnerConfig(OptimizerConfig(), self.loss, self.temperature, 512, 16), snapshot)
        learner.feed([self._example(index, length) for index, length in enumerate(self.lengths)])
        [only] = learner.rounds
        return Part(learner, only)

    def _example(self, index: int, length: int) -> Example:
        rng = np.random.default_rng([self.seed, index])
        mask = np.arange(length) >= 2
        tokens = rng.integers(0, VOCAB, length).astype(np.int32)
        return Example(tokens, mask, (-4 * rng.random(length)).astype(np.float32), float(rng.normal()))


@dataclass(frozen=True)
class Part:
    """A run, and the round that it learns."""

    learner: Learner
    round: Round


def learn_together(parts: Sequence[Part]) -> None:
    for part in parts:
        part.learner.rounds = [part.round]
    learn([part.learner for part in parts])


TENANCIES = (
    Tenancy(4, 2.0, 1.0, LossConfig(), (5, 9, 9, 12), 1),
    Tenancy(1, 0.5, 0.7, LossConfig(kl_coefficient=0.5, normaliser="sequence_mean"), (7, 7), 2),
    Tenancy(3, 3.0, 1.5, LossConfig(kl_coefficient=0.1, ratio="mask"), (4, 11, 6), 3),
    Tenancy(2, 1.0, 1.0, None, (3, 20), 4),
)
TOGETHER = [(0, 1), (1, 2), (2, 0, 3), (3, 2, 1, 0)]


def parts_of(base: BaseModel, which: Sequence[int]) -> list[Part]:
    """In slots whose order is not that of their rows."""
    banks = Banks.of(base, len(which) + 1)
    return [TENANCIES[tenancy].part(banks, len(which) - place) for place, tenancy in enumerate(which)]


def gradient(part: Part) -> Tensor:
    gradients = part.learner.banks.training.gradients
    assert gradients is not None
    return gradients[part.learner.slot].clone()


def learn_alone(part: Part) -> Tensor:
    """Its gradient, and a slot as if it had learnt nothing."""
    learn_together([part])
    own = gradient(part)
    part.learner.forget_gradient()
    return own


@pytest.mark.parametrize("which", TOGETHER)
def test_a_joint_micro_batch_gives_each_run_its_own_gradient(base: BaseModel, which: tuple[int, ...]) -> None:
    parts = parts_of(base, which)
    alone = [learn_alone(part) for part in parts]
    learn_together(parts)
    for part, own in zip(parts, alone, strict=True):
        assert own.norm() > 0
        assert (gradient(part) - own).norm() <= BAR * own.norm()
    unused = parts[0].learner.banks.training.gradients
    assert unused is not None and not unused[0].count_nonzero()


@pytest.mark.parametrize("which", TOGETHER)
def test_losses_and_sums_are_each_runs_own(base: BaseModel, which: tuple[int, ...]) -> None:
    parts = parts_of(base, which)
    alone = []
    for part in parts:
        learn_together([part])
        alone.append(part.learner.sums)
        part.learner.forget_gradient()
    learn_together(parts)
    for part, own in zip(parts, alone, strict=True):
        sums = part.learner.sums
        assert (sums.tokens, sums.loss_tokens) == (own.tokens, own.loss_tokens)
        assert sums.loss == pytest.approx(own.loss, rel=1e-4, abs=1e-6)
        assert sums.means() == pytest.approx(own.means(), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("tenancy", range(len(TENANCIES)))
def test_a_single_part_is_bit_equal_to_learning_alone(base: BaseModel, tenancy: int) -> None:
    """In another slot of another bank, beside runs that learn too."""
    [only] = parts_of(base, (tenancy,))
    others = [other for other in range(len(TENANCIES)) if other != tenancy]
    parts = parts_of(base, (*others[:2], tenancy, *others[2:]))
    learn_together(parts[:2])
    learn_together([parts[2]])
    assert torch.equal(gradient(parts[2]), learn_alone(only))


def nan_weights(part: Part) -> Part:
    bank = part.learner.banks.training
    bank.weights[part.learner.slot] = float("nan")
    bank.refresh(part.learner.slot)
    return part


def infinite_advantages(part: Part) -> Part:
    micro = part.round.micro
    assert micro is not None
    infinite = replace(micro, advantages=torch.full_like(micro.advantages, float("inf")))
    return replace(part, round=replace(part.round, micro=infinite))


def huge_weights(part: Part) -> Part:
    """Finite, and what they compute is not."""
    bank = part.learner.banks.training
    bank.weights[part.learner.slot] *= 1e25
    bank.refresh(part.learner.slot)
    return part


@pytest.mark.parametrize("harm", [nan_weights, infinite_advantages, huge_weights])
@pytest.mark.parametrize("which", TOGETHER)
def test_what_is_not_finite_in_one_run_stays_in_it(
    base: BaseModel, which: tuple[int, ...], harm: Callable[[Part], Part]
) -> None:
    """Dense: not one bit of another run's gradient changes. Experts are chosen by a run's own rows: other choices make
    other products out of the same numbers, so there it is equal to rounding."""
    good, bad = parts_of(base, which), parts_of(base, which)
    hurt = next(place for place, tenancy in enumerate(which) if TENANCIES[tenancy].loss)  # only these have advantages
    learn_together(good)
    bad[hurt] = harm(bad[hurt])
    learn_together(bad)
    assert not gradient(bad.pop(hurt)).isfinite().all() and gradient(good.pop(hurt)).isfinite().all()
    same_rows = harm is infinite_advantages or not any(".experts." in path for path in base.spec.shapes)
    for before, after in zip(good, bad, strict=True):
        expected, found = gradient(before), gradient(after)
        assert found.isfinite().all()
        if same_rows:
            assert torch.equal(found, expected)
        assert (found - expected).norm() <= BAR * expected.norm()


# --- in the trainer ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WatchedBase(BaseModel):
    """counts: runs in each forward pass of micro-batches. refuse: those that raise, by their slots."""

    counts: list[int] = field(default_factory=list)
    refuse: Callable[[set[int]], bool] = lambda slots: False

    def logprobs(
        self, tokens: Tensor, positions: Tensor, plan: AttentionPlan, route: Route, asks: Sequence[Ask], chunk: int
    ) -> list[tuple[Tensor, Tensor]]:
        if not torch.is_grad_enabled():  # a probe
            return super().logprobs(tokens, positions, plan, route, asks, chunk)
        self.counts.append(len(route.segments))
        if self.refuse({segment.slot for segment in route.segments}):
            raise RuntimeError("refused")
        return super().logprobs(tokens, positions, plan, route, asks, chunk)


class Duo:
    """Two runs in one trainer. lengths: of the rollouts in every batch; short enough for one micro-batch of both."""

    STEPS = 4

    def __init__(
        self, root: Path, base: BaseModel, model: ModelConfig, isolation: str, *, overflow: str = "",
        lengths: Sequence[int] = (8, 10), refuse: Callable[[set[int]], bool] = lambda slots: False,
    ) -> None:  # fmt: skip
        """overflow: the run whose advantages make no finite gradient. refuse: as in WatchedBase."""
        self.base = WatchedBase(**vars(base), refuse=refuse)
        self.overflow, self.lengths = overflow, lengths
        lab, self.outputs = Lab(root, self.base, model), OutputTree(root / "outputs")
        self.trainer = lab.trainer(self.outputs, 2, Clock(), SceneDisk())
        self.trees = [self.outputs.run(RunId(name)) for name in "ab"]
        for seed, tree in enumerate(self.trees):
            config = lab.config(seed=seed, isolation=isolation, max_steps=self.STEPS)
            self.trainer.disk.publish_file(tree.orch_toml, dump(config))
        self.trainer.one_pass()

    def train(self) -> Duo:
        """Until both have ended."""
        for _ in range(20 * self.STEPS):
            for tree in self.trees:
                self.feed(tree)
            self.trainer.one_pass()
        assert not self.trainer.tenants
        return self

    def feed(self, tree: RunTree) -> None:
        tenant = self.trainer.tenants.get(tree.id)
        if tenant is None or tenant.work is not None or tree.batch(tenant.step + 1).exists():
            return
        version = Version(tree.id, tenant.step, tenant.known[tenant.step][-1])
        rng = np.random.default_rng([tenant.step, *tree.id.value.encode()])
        advantage = 3e38 if tree.id.value == self.overflow else None
        batch = made_up_batch(tree.id, tenant.step + 1, version, rng, list(self.lengths), advantage)
        publish_batch(self.trainer.disk, tree, batch)

    def digests(self, run: str) -> list[str]:
        versions = [read_version(self.outputs.run(RunId(run)), step) for step in range(self.STEPS + 1)]
        return [version.version.digest for version in versions if version is not None]

    def last(self, run: str) -> Tensor:
        """All numbers of the last published adapter."""
        adapter = read_peft(self.outputs.run(RunId(run)).broadcast(self.STEPS)).adapter
        return torch.cat([t.flatten() for path in sorted(adapter.pairs) for t in _factors(adapter.pairs[path])])


def _factors(pair: Any) -> tuple[Tensor, Tensor]:
    return pair.a, pair.b


@pytest.fixture
def duo(tmp_path: Path, tiny: BaseModel, tiny_model_config: ModelConfig) -> Callable[..., Duo]:
    def make(name: str, isolation: str, **settings: Any) -> Duo:
        return Duo(tmp_path / name, tiny, tiny_model_config, isolation, **settings).train()

    return make


def test_mixed_runs_share_micro_batches_and_end_where_exact_runs_end(duo: Callable[..., Duo]) -> None:
    exact, mixed = duo("exact", "exact"), duo("mixed", "mixed")
    assert exact.base.counts == [1] * 2 * Duo.STEPS and mixed.base.counts == [2] * Duo.STEPS
    for run in "ab":
        assert (mixed.last(run) - exact.last(run)).norm() <= 1e-4 * exact.last(run).norm()
        rows = [read_lines(side.outputs.run(RunId(run)).metrics_jsonl) for side in (mixed, exact)]
        for ours, theirs in zip(*rows, strict=True):
            assert (ours["step"], ours["tokens"], ours["rollouts"]) == (theirs["step"], 18, 2)
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4, abs=1e-6)
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_mixed_run_beside_exact_ones_is_bit_equal_to_itself_alone(duo: Callable[..., Duo]) -> None:
    """Micro-batches that do not fit into one with another's are learnt alone."""
    mixed, exact = duo("mixed", "mixed", lengths=(12, 12)), duo("exact", "exact", lengths=(12, 12))
    assert set(mixed.base.counts) == {1}
    assert [mixed.digests(run) for run in "ab"] == [exact.digests(run) for run in "ab"]


@pytest.mark.parametrize(
    ("lengths", "passes_a_step"),
    [((8, 10), [2, 1, 1]), ((10, 10, 15, 16), [1, 1, 2, 1, 1, 1, 1])],
    ids=["first of the step", "second of the step"],
)
def test_a_joint_micro_batch_that_fails_is_learnt_alone_by_each(
    duo: Callable[..., Duo], caplog: pytest.LogCaptureFixture, lengths: tuple[int, ...], passes_a_step: list[int]
) -> None:
    """Also where it is not the step's first: what was learnt before is not counted twice."""
    exact = duo("exact", "exact", lengths=lengths)
    mixed = duo("mixed", "mixed", lengths=lengths, refuse=lambda slots: len(slots) > 1)
    assert mixed.base.counts == passes_a_step * Duo.STEPS
    assert "a micro-batch of a, b failed; each learns alone" in caplog.text
    for run in "ab":
        assert mixed.digests(run) == exact.digests(run)
        status = status_of(mixed.outputs.run(RunId(run)))
        assert status is not None and status.state == "finished"


def test_the_run_that_makes_a_joint_micro_batch_fail_ends_and_the_other_goes_on(duo: Callable[..., Duo]) -> None:
    exact, mixed = duo("exact", "exact"), duo("mixed", "mixed", refuse=lambda slots: 1 in slots)
    assert mixed.base.counts == [2, 1, 1] + [1] * (Duo.STEPS - 1)
    assert mixed.digests("a") == exact.digests("a")
    status = status_of(mixed.outputs.run(RunId("b")))
    assert status is not None and status.state == "failed" and "refused" in str(status.reason)
    assert not mixed.trainer.banks.training.weights.count_nonzero()


def test_a_step_that_is_not_finite_leaves_no_trace_in_the_run_it_was_learnt_with(duo: Callable[..., Duo]) -> None:
    whole, beside = duo("whole", "mixed"), duo("beside", "mixed", overflow="b")
    assert whole.base.counts[:3] == beside.base.counts[:3] == [2, 2, 2]
    assert beside.digests("a")[:4] == whole.digests("a")[:4]
    assert len(set(whole.digests("a"))) == Duo.STEPS + 1
    status = status_of(beside.outputs.run(RunId("b")))
    assert status is not None and status.state == "evicted" and "not finite" in str(status.reason)
