"""A good run beside bad neighbours is, byte for byte, the run that it is alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftwork.config.section import ModelConfig
from graftwork.model.base import BaseModel
from graftwork.store.layout import RunId
from proofs import neighbours
from proofs.neighbour_kinds import Kind, Offender, at_once
from proofs.neighbour_lab import GOOD, Lab, Record
from proofs.neighbours import KINDS, Plan, Scenario, drawn, play, scenarios

COUNT = max(40, len(KINDS) + 8)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny: BaseModel, tiny_model_config: ModelConfig) -> Lab:
    return Lab(tmp_path_factory.mktemp("neighbours"), tiny, tiny_model_config)


@pytest.mark.parametrize("scenario", drawn(COUNT, seed=0), ids=str)
def test_a_good_run_beside_bad_neighbours_is_the_run_that_it_is_alone(lab: Lab, scenario: Scenario) -> None:
    assert play(lab, scenario) == []


def test_every_kind_stands_alone_once_and_others_stand_together() -> None:
    plans = [scenario.plans for scenario in drawn(200, seed=3)]
    assert len(KINDS) >= 12
    assert [kinds[0].kind for kinds in plans[: len(KINDS)]] == list(KINDS)
    assert {len(kinds) for kinds in plans[len(KINDS) :]} == {2, 3}
    assert {plan.kind for kinds in plans[len(KINDS) :] for plan in kinds} == set(KINDS)


def test_a_scenario_is_drawn_from_its_number_and_the_seed_alone() -> None:
    assert drawn(60, seed=5)[:50] == drawn(50, seed=5) != drawn(50, seed=6)


def test_figures_tell_what_was_asked_and_what_held(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([[], ["the chain differs"]])
    monkeypatch.setattr(neighbours, "play", lambda lab, scenario: next(found))
    figures = scenarios(2, seed=4)
    first = next(iter(KINDS))
    assert (figures.asked, figures.done, dict(figures.kinds)) == (2, 1, {first: 1})
    [failure] = figures.failures
    assert failure.endswith("the chain differs. Replay: python -m proofs.neighbours --seed 4 --only 1")


# --- what the scenarios would see -------------------------------------------------------------------------------------


def nothing(offender: Offender) -> None:
    pass


def nudge_the_good_run(offender: Offender) -> None:
    trainer = offender.scene.trainer
    trainer.banks.training.weights[trainer.tenants[GOOD].learner.slot, 0] += 1e-6


def break_the_trainer(offender: Offender) -> None:
    offender.scene.trainer.observer = None  # type: ignore[assignment]


def leave_a_gradient(offender: Offender) -> None:
    """Once its slot is given back."""
    bank, slot = offender.scene.trainer.banks.training, offender.seated.learner.slot
    assert bank.gradients is not None
    reset, gradient = bank.reset, bank.gradients[slot]

    def reset_badly(which: int) -> None:
        reset(which)
        gradient[-1] = 1.0

    bank.reset = reset_badly  # type: ignore[assignment, method-assign]
    offender.tree.orch_toml.unlink()


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        (Kind(nothing, "what is never said"), "2 passes after it did harm"),
        (Kind(nudge_the_good_run, "", "goes on"), "published digests"),
        (Kind(break_the_trainer, ""), "AttributeError left it"),
        (Kind(leave_a_gradient, "is absent", "evicted", at_once), "left something in training slot 0"),
    ],
    ids=["unnamed", "another run's weights", "an exception", "a gradient"],
)
def test_what_would_be_wrong_is_seen(lab: Lab, monkeypatch: pytest.MonkeyPatch, kind: Kind, seen: str) -> None:
    monkeypatch.setattr(neighbours, "KINDS", {"bad": kind})
    plan = Plan(RunId("a"), "bad", at=1, joins=0, rollouts=2, settings={}, seed=0)
    found = play(lab, Scenario(0, 0, "fresh", 3, (plan,)))
    assert any(seen in text for text in found), found


def test_a_record_holds_every_kind_of_file_and_tells_two_runs_apart(lab: Lab) -> None:
    record = lab.records["kl"]
    paths = {Path(path).name for path in record.files}
    assert paths >= {"chain.jsonl", "rank_0.safetensors", "state.json", "STABLE", "adapter_model.safetensors"}
    assert [row["step"] for row in record.rows] == [1, 2, 3, 4, 5, 6] and all("loss" in row for row in record.rows)
    other = Record(record.digests[:-1], {**record.files, "chain.jsonl": b""}, record.rows[1:])
    assert len(list(record.differences(other))) == 3 + len(other.rows)
    assert not list(record.differences(record))
