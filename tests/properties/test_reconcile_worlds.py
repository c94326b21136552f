"""reconcile over made-up worlds: it converges, repeats itself, and never gives what it must not."""

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from graftwork.config.schema import ModelConfig, RunConfig
from graftwork.store.layout import RunId, RunTree
from graftwork.store.status import TERMINAL, Status
from graftwork.training.runs import (
    Action,
    Admit,
    Enqueue,
    Fail,
    FromTrainer,
    Release,
    Seat,
    SeenRun,
    World,
    reconcile,
)

MODEL = ModelConfig(path="base")
NAMES = ["a", "b", "c", "d", "e"]
DIGESTS = st.sampled_from(["d1", "d2"])
STEPS = st.sampled_from([(), (0,), (0, 10), (0, 10, 20)])


@st.composite
def seen_runs(draw: st.DrawFn, name: str) -> SeenRun:
    tree = RunTree.at(Path(f"/x/run_{name}"))
    digest = draw(st.one_of(st.none(), DIGESTS))
    if digest is None:
        return SeenRun(tree, None, None, None, (), None)
    status = None
    if draw(st.booleans()):
        state = draw(st.sampled_from(["queued", "active", *sorted(TERMINAL)]))
        admitted = state == "active" or draw(st.booleans())
        run = draw(st.sampled_from([name, "other"]))
        status = Status(run, state, draw(DIGESTS), draw(st.integers(1, 9)), admitted=admitted)
    if draw(st.integers(0, 9)) == 0:
        return SeenRun(tree, digest, None, "refused", draw(STEPS), status)
    init = draw(st.sampled_from([None, "/adapter"]))
    config = RunConfig(model=MODEL, resume=draw(st.booleans()), init_adapter_path=init)
    return SeenRun(tree, digest, config, None, draw(STEPS), status)


@st.composite
def situations(draw: st.DrawFn) -> tuple[World, dict[RunId, Seat], int]:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True))
    world = World({RunId(name): draw(seen_runs(name)) for name in names})
    slots = draw(st.integers(1, 4))
    seated = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=slots))
    places = draw(st.permutations(range(slots)))
    seats = {RunId(n): Seat(places[i], draw(DIGESTS), draw(st.integers(1, 9))) for i, n in enumerate(seated)}
    return world, seats, slots


def apply(actions: list[Action], world: World, seats: dict[RunId, Seat]) -> tuple[World, dict[RunId, Seat]]:
    """What a trainer does with the actions, as far as the next observation shows it."""
    runs, seats = dict(world.runs), dict(seats)
    for action in actions:
        match action:
            case Release(run, _):
                del seats[run]
            case Enqueue(run, arrival, reason):
                runs[run] = said(runs[run], "queued", arrival, reason)
            case Fail(run, arrival, reason):
                runs[run] = said(runs[run], "failed", arrival, reason)
            case Admit(run, arrival, slot, _):
                digest = runs[run].orch_digest
                assert digest is not None
                seats[run] = Seat(slot, digest, arrival)
                runs[run] = said(runs[run], "active", arrival, None)
    return World(runs), seats


def said(seen: SeenRun, state: str, arrival: int, reason: str | None) -> SeenRun:
    assert seen.orch_digest is not None
    old = seen.status
    admitted = state == "active" or (old is not None and old.orch_digest == seen.orch_digest and old.admitted)
    return replace(
        seen,
        status=Status(str(seen.tree.id), state, seen.orch_digest, arrival, admitted=admitted, reason=reason),  # type: ignore[arg-type]
    )


@given(situations())
def test_slots_are_given_once_and_only_where_free(situation: tuple[World, dict[RunId, Seat], int]) -> None:
    world, seats, slots = situation
    actions = reconcile(world, seats, slots)
    given_slots = [action.slot for action in actions if isinstance(action, Admit)]
    assert len(set(given_slots)) == len(given_slots)
    assert set(given_slots) <= set(range(slots)) - {seat.slot for seat in seats.values()}
    touched = [action.run for action in actions]
    assert len(set(touched)) == len(touched)
    assert all(action.run not in seats for action in actions if not isinstance(action, Release))


@given(situations())
def test_the_same_world_gives_the_same_actions(situation: tuple[World, dict[RunId, Seat], int]) -> None:
    world, seats, slots = situation
    assert reconcile(world, seats, slots) == reconcile(World(dict(reversed(world.runs.items()))), seats, slots)


@given(situations())
def test_it_converges_in_two_passes(situation: tuple[World, dict[RunId, Seat], int]) -> None:
    """After two passes nothing changes any more: what is left are runs that wait, told the same thing again."""
    world, seats, slots = situation
    for _ in range(2):
        world, seats = apply(reconcile(world, seats, slots), world, seats)
    again = apply(reconcile(world, seats, slots), world, seats)
    assert again == (world, seats)


@given(situations())
def test_nobody_starts_over_unasked(situation: tuple[World, dict[RunId, Seat], int]) -> None:
    world, seats, slots = situation
    for action in reconcile(world, seats, slots):
        if isinstance(action, Admit):
            seen = world.runs[action.run]
            assert seen.config is not None and not seen.settled
            if isinstance(action.start, FromTrainer):
                assert not seen.checkpoints and not seen.config.resume and seen.config.init_adapter_path is None
            elif max(seen.checkpoints) > 0:
                assert seen.config.resume or (seen.status is not None and seen.status.admitted)


@given(situations())
def test_a_free_slot_is_not_kept_from_a_run_that_is_ready(situation: tuple[World, dict[RunId, Seat], int]) -> None:
    world, seats, slots = situation
    actions = reconcile(world, seats, slots)
    admitted = sum(isinstance(action, Admit) for action in actions)
    refused_for_room = [a for a in actions if isinstance(a, Enqueue) and a.reason == "no slot is free"]
    if refused_for_room:
        assert admitted == slots - len({seat.slot for seat in seats.values()})
