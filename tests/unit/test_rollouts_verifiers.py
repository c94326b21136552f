"""The bridge to verifiers without the package: which tasks, whose faults, what is refused. See tests/with_verifiers."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import pytest

from graftwork.config.run import EnvironmentConfig, SamplingConfig
from graftwork.errors import ConfigError, InferenceError, Refused, RunError, ServerGone
from graftwork.rollouts.environment import load_environment
from graftwork.rollouts.reverse_text import ReverseText
from graftwork.rollouts.traces import NoRollout
from graftwork.rollouts.verifiers import (
    Numbering,
    Tasks,
    environment_of,
    learnt_trace,
    leave_out_of_proxies,
    refuse_server_faults,
    sampling_of,
)


class Taskset(list[Any]):
    bounded = True


class Endless:
    bounded, reads = False, 0

    def __iter__(self) -> Any:
        self.reads += 1
        return iter(range(1000))


# --- which tasks ------------------------------------------------------------------------------------------------------


def test_training_tasks_are_shuffled_and_none_comes_twice_before_all_came_once() -> None:
    numbering = Numbering(total=10, heldout=3)
    one = [n for first in range(0, 14, 2) for n in numbering.numbers(5, "train", first, 2)]
    assert sorted(one[:7]) == sorted(one[7:]) == list(range(7)), "the held-out tasks are the last three"
    assert one[:7] != one[7:] and one == numbering.numbers(5, "train", 0, 14)
    assert one != numbering.numbers(6, "train", 0, 14)


def test_held_out_tasks_come_in_their_order() -> None:
    assert Numbering(10, 3).numbers(5, "heldout", 0, 5) == [7, 8, 9, 7, 8]
    assert Numbering(None, 3).numbers(5, "heldout", 0, 3) == [0, 1, 2]
    assert Numbering(None, 3).numbers(5, "train", 4, 2) == [7, 8]
    with pytest.raises(ConfigError, match="heldout_tasks is 0"):
        Numbering(10, 0).numbers(5, "heldout", 0, 1)


def test_tasks_by_number() -> None:
    tasks = Tasks(Taskset("abcdefghijk"), None, "verifiers:x")
    assert tasks.split == Numbering(11, 2)
    assert tasks.get([3, 0, 3]) == ["d", "a", "d"]
    with pytest.raises(ConfigError, match="has 2 tasks and 2 are held out: none is left to train on"):
        Tasks(Taskset("ab"), 2, "verifiers:x")


def test_an_endless_taskset_is_read_on_and_only_begun_again_to_go_back() -> None:
    source = Endless()
    tasks = Tasks(source, 5, "verifiers:x")
    assert tasks.split == Numbering(None, 5)
    assert (tasks.get([5, 6]), tasks.get([9, 7, 9]), source.reads) == ([5, 6], [9, 7, 9], 1)
    assert (tasks.get([0, 1]), source.reads) == ([0, 1], 2)
    with pytest.raises(RunError, match="ended before task 1000"):
        tasks.get([1000])


# --- whose faults -----------------------------------------------------------------------------------------------------

MODEL, SAMPLING = "run@3-abababab", {"temperature": 1.0}


def trace(**changes: Any) -> Any:
    agent = SimpleNamespace(
        name="player", trainable=changes.pop("trainable", True), config=SimpleNamespace(model=MODEL, sampling=SAMPLING)
    )
    given = {"agent": agent, "ok": True, "errors": [], "last_error": None, "calls": [call()]}
    return SimpleNamespace(**{**given, **changes})


def call(status: int | None = None, model: str = MODEL) -> Any:
    error = None if status is None else SimpleNamespace(status_code=status, message="why")
    return SimpleNamespace(model=model, error=error)


def episode(*traces: Any, errors: Any = ()) -> Any:
    return SimpleNamespace(traces=list(traces), errors=list(errors))


@pytest.mark.parametrize(
    ("status", "kind"), [(503, ServerGone), (502, ServerGone), (404, Refused), (412, Refused), (500, InferenceError)]
)
def test_a_call_that_the_server_failed_ends_the_batch(status: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=rf"run@3-abababab ended with {status}: why"):
        refuse_server_faults(episode(trace(calls=[call(), call(status)])))


def test_other_calls_end_nothing() -> None:
    """The request's own fault; asked again and answered; a judge's."""
    for calls in ([call(400)], [call(503), call()], []):
        refuse_server_faults(episode(trace(calls=calls)))
    refuse_server_faults(episode(trace(calls=[call(503)], trainable=False)))


def test_the_one_trace_that_is_learnt_from() -> None:
    player = trace()
    assert learnt_trace(episode(player, trace(trainable=False)), MODEL, SAMPLING, True) is player


def test_an_episode_that_failed_says_why() -> None:
    error = SimpleNamespace(type="TaskError", message="no such file")
    with pytest.raises(NoRollout, match="TaskError: no such file"):
        learnt_trace(episode(trace(ok=False, errors=[error])), MODEL, SAMPLING, False)
    with pytest.raises(NoRollout, match="did not complete"):
        learnt_trace(episode(), MODEL, SAMPLING, False)
    with pytest.raises(NoRollout, match="agent 'player' failed: no such file"):
        learnt_trace(episode(trace(ok=False, last_error=error)), MODEL, SAMPLING, True)


def test_an_episode_that_cannot_be_learnt_from_ends_the_run() -> None:
    with pytest.raises(RunError, match=r"2 rollouts of agents that train \(player, player\)"):
        learnt_trace(episode(trace(), trace()), MODEL, SAMPLING, True)
    with pytest.raises(RunError, match="leave model and sampling of the agent that trains to the run"):
        learnt_trace(episode(trace()), MODEL, {"temperature": 0.5}, True)
    with pytest.raises(InferenceError, match="agent 'player' asked base for tokens, the run is run@3"):
        learnt_trace(episode(trace(calls=[call(), call(model="base")])), MODEL, SAMPLING, True)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_sampling_settings_are_the_runs_own() -> None:
    given = SamplingConfig(max_tokens=7, temperature=0.5, top_p=0.9)
    assert sampling_of(given, None) == {"temperature": 0.5, "top_p": 0.9, "max_tokens": 7}
    assert sampling_of(given, 3)["seed"] == 3


def test_only_a_verifiers_environment_makes_several_sequences_of_a_rollout() -> None:
    assert EnvironmentConfig(max_branches=5).sequences_max == 1
    assert EnvironmentConfig(name="verifiers:x", max_branches=5).sequences_max == 5
    assert isinstance(environment_of(EnvironmentConfig()), ReverseText)


def test_no_proxy_stands_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "example.org")
    leave_out_of_proxies("http://10.0.0.7:8000")
    leave_out_of_proxies("http://10.0.0.7:8000")
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "example.org,127.0.0.1,localhost,10.0.0.7"


def test_a_verifiers_environment_is_no_source_of_answers() -> None:
    with pytest.raises(ConfigError, match=r"'verifiers:x' is one of the package verifiers.*data\.path"):
        load_environment("verifiers:x", {})


@pytest.mark.skipif(importlib.util.find_spec("verifiers") is not None, reason="the package is here")
def test_the_extra_is_named_where_the_package_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"needs the package verifiers.*pip install 'graftwork\[verifiers\]'"):
        environment_of(EnvironmentConfig(name="verifiers:x"))
