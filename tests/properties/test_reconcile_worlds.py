"""reconcile over made-up worlds, and the whole of observe and reconcile in a model of a trainer over real folders."""

from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from graftwork.config.run import RunConfig
from graftwork.config.section import ModelConfig
from graftwork.store.layout import RunId, RunTree
from graftwork.store.status import TERMINAL, State, Status
from graftwork.training.runs import (
    ABSENT,
    NO_SLOT,
    Action,
    Admit,
    End,
    Enqueue,
    FromTrainer,
    Memory,
    Release,
    Seat,
    SeenRun,
    World,
    reconcile,
)
from proofs.reconcile_machine import run_sequences

MODEL = ModelConfig(path="base")
NAMES = ["a", "b", "c", "d", "e"]
DIGESTS = st.sampled_from(["d1", "d2"])
STEPS = st.sampled_from([(), (0,), (0, 10), (0, 10, 20)])
FOLDERS = st.sampled_from([(0, 1), (0, 1), (0, 1), (0, 2)])

Situation = tuple[World, Memory]


@st.composite
def statuses(draw: st.DrawFn, name: str) -> Status | None:
    if draw(st.booleans()):
        return None
    state: State = draw(st.sampled_from(["queued", "active", *sorted(TERMINAL)]))
    admitted = state == "active" or draw(st.booleans())
    run = draw(st.sampled_from([name, name, "other"]))
    return Status(run, state, draw(DIGESTS), draw(st.integers(1, 9)), admitted=admitted)


@st.composite
def seen_runs(draw: st.DrawFn, name: str) -> SeenRun:
    return replace(draw(contents(name)), folder_id=draw(FOLDERS))


@st.composite
def contents(draw: st.DrawFn, name: str) -> SeenRun:
    tree = RunTree.at(Path(f"/x/run_{name}"))
    digest = draw(st.one_of(st.none(), DIGESTS))
    if digest is None:
        how = draw(st.sampled_from([ABSENT, "is not TOML"]))
        return SeenRun(tree, None, None, None, (), None, how)
    status = draw(statuses(name))
    if draw(st.integers(0, 9)) == 0:
        return SeenRun(tree, digest, None, "refused", draw(STEPS), status)
    init, stop = draw(st.sampled_from([None, "/adapter"])), draw(st.integers(0, 4)) == 0
    config = RunConfig(model=MODEL, resume=draw(st.booleans()), init_adapter_path=init, stop=stop)
    return SeenRun(tree, digest, config, None, draw(STEPS), status)


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    names = draw(st.lists(st.sampled_from(NAMES), unique=True))
    world = World({RunId(name): draw(seen_runs(name)) for name in names})
    slots = draw(st.integers(1, 4))
    seated = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=slots))
    places = draw(st.permutations(range(slots)))
    seats = {
        RunId(name): Seat(place, draw(DIGESTS), draw(st.integers(1, 9)), draw(st.booleans()), draw(FOLDERS))
        for name, place in zip(seated, places, strict=False)
    }
    left_alone = draw(st.lists(st.sampled_from(NAMES), unique=True, max_size=1))
    unwritten = {RunId(name): draw(DIGESTS) for name in left_alone if RunId(name) not in seats}
    return world, Memory(slots, seats, unwritten)


def apply(actions: list[Action], world: World, memory: Memory) -> Situation:
    """What a trainer does with the actions, as far as the next observation shows it."""
    runs = dict(world.runs)
    seats = {
        run: replace(seat, doubted=run in runs and runs[run].orch_digest is None) for run, seat in memory.seats.items()
    }
    for action in actions:
        match action:
            case Release(run, why):
                if why == "stopped":
                    runs[run] = said(runs[run], "stopped", seats[run].arrival, None)
                del seats[run]
            case Enqueue(run, arrival, reason, place):
                runs[run] = said(runs[run], "queued", arrival, reason, place)
            case End(run, arrival, state, reason):
                runs[run] = said(runs[run], state, arrival, reason)
            case Admit(run, arrival, slot, _):
                digest = runs[run].orch_digest
                assert digest is not None
                seats[run] = Seat(slot, digest, arrival, folder_id=runs[run].folder_id)
                runs[run] = said(runs[run], "active", arrival, None)
    return World(runs), replace(memory, seats=seats)


def said(seen: SeenRun, state: State, arrival: int, reason: str | None, place: int | None = None) -> SeenRun:
    assert seen.orch_digest is not None
    old = seen.status
    admitted = state == "active" or (old is not None and old.is_of(seen.tree.id, seen.orch_digest) and old.admitted)
    return replace(
        seen,
        status=Status(
            str(seen.tree.id), state, seen.orch_digest, arrival, admitted=admitted, reason=reason, place=place
        ),
    )


def begins_to_doubt(world: World, memory: Memory) -> bool:
    """Whether a seated run's orch.toml cannot be read for the first time: it is given one pass more."""
    return any(
        run in world.runs and world.runs[run].orch_digest is None and not seat.doubted
        for run, seat in memory.seats.items()
    )


@given(situations())
def test_slots_are_given_once_and_only_where_free(situation: Situation) -> None:
    world, memory = situation
    actions = reconcile(world, memory)
    given_slots = [action.slot for action in actions if isinstance(action, Admit)]
    assert len(set(given_slots)) == len(given_slots)
    assert set(given_slots) <= set(memory.free_slots)
    touched = [action.run for action in actions]
    assert len(set(touched)) == len(touched)
    assert all((action.run in memory.seats) == isinstance(action, Release) for action in actions)


@given(situations())
def test_the_same_world_gives_the_same_actions(situation: Situation) -> None:
    world, memory = situation
    turned = World(dict(reversed(world.runs.items())))
    assert reconcile(world, memory) == reconcile(world, memory) == reconcile(turned, memory)


@given(situations())
def test_it_converges_in_two_passes(situation: Situation) -> None:
    """After two passes nothing changes any more: what is left are runs that wait, told the same thing again."""
    for _ in range(3 if begins_to_doubt(*situation) else 2):
        situation = apply(reconcile(*situation), *situation)
    assert apply(reconcile(*situation), *situation) == situation


@given(situations())
def test_a_run_that_ended_or_vanished_has_no_seat_in_the_next_pass(situation: Situation) -> None:
    world, memory = situation
    released = {action.run: action.why for action in reconcile(world, memory) if isinstance(action, Release)}
    for run, seat in memory.seats.items():
        seen = world.runs.get(run)
        if seen is None or seen.folder_id != seat.folder_id:
            assert released[run] == "removed"
        elif seen.orch_digest is None:
            assert (run in released) == seat.doubted
        else:
            assert (run in released) == (seen.orch_digest != seat.orch_digest)


@given(situations())
def test_nobody_starts_over_unasked(situation: Situation) -> None:
    world, memory = situation
    for action in reconcile(world, memory):
        if isinstance(action, Admit):
            seen = world.runs[action.run]
            assert seen.config is not None and not seen.settled and not seen.config.stop
            if isinstance(action.start, FromTrainer):
                assert not seen.checkpoints and not seen.config.resume and seen.config.init_adapter_path is None
            elif max(seen.checkpoints) > 0:
                assert seen.config.resume or (seen.status is not None and seen.status.admitted)


@given(situations())
def test_a_free_slot_is_not_kept_from_a_run_that_is_ready(situation: Situation) -> None:
    world, memory = situation
    actions = reconcile(world, memory)
    admitted = sum(isinstance(action, Admit) for action in actions)
    if any(isinstance(action, Enqueue) and action.reason == NO_SLOT for action in actions):
        assert admitted == len(memory.free_slots)


@given(situations())
def test_the_line_has_places_from_one_without_holes(situation: Situation) -> None:
    actions = [action for action in reconcile(*situation) if isinstance(action, Enqueue)]
    line = [action.place for action in actions if action.reason == NO_SLOT]
    assert line == list(range(1, len(line) + 1))
    assert all(action.place is None for action in actions if action.reason != NO_SLOT)


@given(situations())
def test_a_run_whose_status_cannot_be_written_is_left_alone(situation: Situation) -> None:
    world, memory = situation
    for action in reconcile(world, memory):
        if not isinstance(action, Release):
            assert memory.unwritten.get(action.run) != world.runs[action.run].orch_digest


def test_sequences_over_real_folders() -> None:
    """Observer and reconcile with users, crashes and full disks about them: see the machine."""
    assert run_sequences(150, seed=0)["sequences"] >= 150
