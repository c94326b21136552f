"""Traces of verifiers, made up in the shape of the real ones, as training sequences. The package is not needed."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from graftwork.rollouts.traces import NoRollout, read_talk, sequences_of


@dataclass
class Node:
    message: Any
    token_ids: list[int]
    mask: list[bool]
    logprobs: list[float] = field(default_factory=list)

    @property
    def sampled(self) -> bool:
        return any(self.mask)


def says(role: str, content: Any, *token_ids: int, calls: Any = None) -> Node:
    """A message that was read: nothing of it was sampled."""
    message = SimpleNamespace(role=role, content=content, tool_calls=calls)
    return Node(message, list(token_ids), [False] * len(token_ids))


def answers(content: Any, *token_ids: int, scaffold: int = 1, calls: Any = None) -> Node:
    """An answer: `scaffold` tokens of the template's, then sampled ones, each with its own id / -100 as log-prob."""
    node = says("assistant", content, *token_ids, calls=calls)
    node.mask = [i >= scaffold for i in range(len(token_ids))]
    node.logprobs = [-token / 100 for token in token_ids[scaffold:]]
    return node


def trace_of(*branches: list[Node], reasons: dict[int, str] | None = None, untrainable: tuple[int, ...] = ()) -> Any:
    nodes = list({id(node): node for branch in branches for node in branch}.values())
    calls = [
        SimpleNamespace(node=i, finish_reason=(reasons or {}).get(i, "stop"))
        for i, node in enumerate(nodes)
        if node.sampled
    ]
    views = [SimpleNamespace(nodes=branch, trainable=i not in untrainable) for i, branch in enumerate(branches)]
    return SimpleNamespace(branches=views, nodes=nodes, calls=calls)


ASK, HINT = says("user", "reverse: ab", 10, 11), says("user", "1 right: ab", 12)
ONE, TWO = answers("b", 1, 20, 2), answers("ba", 1, 21, 22)


def test_loss_lies_on_sampled_tokens_alone() -> None:
    (one,) = sequences_of(trace_of([ASK, ONE, HINT, TWO]).branches)
    assert one.token_ids.tolist() == [10, 11, 1, 20, 2, 12, 1, 21, 22]
    assert one.trained.tolist() == [False, False, False, True, True, False, False, True, True]
    np.testing.assert_allclose(one.logprobs, [0, 0, 0, -0.2, -0.02, 0, 0, -0.21, -0.22], rtol=1e-6)


def test_results_of_tools_and_answers_that_were_not_sampled_are_only_read() -> None:
    call = SimpleNamespace(name="look", arguments='{"at": 1}')
    asks, result = answers(None, 1, 30, calls=[call]), says("tool", "it is b", 40, 41)
    given = says("assistant", "hello", 1, 50, 2)  # put there by the environment
    talk = read_talk(trace_of([ASK, given, HINT, asks, result, TWO]), 3, 5, 1)
    (rollout,) = talk.rollouts(0.5, -0.25)
    assert rollout.token_ids[rollout.loss_mask].tolist() == [30, 21, 22]
    assert (rollout.prompt_index, rollout.sample_index, rollout.reward, rollout.advantage) == (3, 5, 0.5, -0.25)
    assert rollout.version_index.tolist() == np.where(rollout.loss_mask, 0, -1).tolist()
    assert [message["content"] for message in talk.messages] == [
        "reverse: ab", "hello", "1 right: ab", 'look({"at": 1})', "it is b", "ba",
    ]  # fmt: skip
    assert [(answer.text, answer.token_ids) for answer in talk.answers] == [
        ('look({"at": 1})', (30,)),
        ("ba", (21, 22)),
    ]


def test_every_branch_is_a_sequence_and_a_sampled_token_is_trained_on_once() -> None:
    other = answers("no", 1, 60, 61)
    talk = read_talk(trace_of([ASK, ONE, HINT, TWO], [ASK, ONE, other]), 0, 0, 2)
    first, second = talk.rollouts(1.0, 0.5)
    assert first.token_ids[first.loss_mask].tolist() == [20, 2, 21, 22]
    assert second.token_ids.tolist() == [10, 11, 1, 20, 2, 1, 60, 61]
    assert second.token_ids[second.loss_mask].tolist() == [60, 61], "the first answer is trained on in the first branch"
    assert not second.logprobs[~second.loss_mask].any()
    assert {rollout.advantage for rollout in (first, second)} == {0.5}
    assert [message["content"] for message in talk.messages] == ["reverse: ab", "b", "no"], "of the last branch"


def test_what_is_not_trainable_or_has_nothing_of_its_own_is_left_out() -> None:
    tail = says("user", "bye", 13)
    other = answers("no", 1, 60, 61)
    assert len(sequences_of(trace_of([ASK, ONE, HINT, TWO], [ASK, ONE, tail]).branches)) == 1
    talk = read_talk(trace_of([ASK, ONE], [ASK, other], untrainable=(0,)), 0, 0, 8)
    (rollout,) = talk.rollouts(1.0, 0.5)
    assert rollout.token_ids[rollout.loss_mask].tolist() == [60, 61]


def test_an_answer_that_was_cut_is_trained_on_and_says_so() -> None:
    talk = read_talk(trace_of([ASK, ONE, HINT, TWO], reasons={3: "length"}), 0, 0, 8)
    assert [answer.finish_reason for answer in talk.answers] == ["stop", "length"]
    (rollout,) = talk.rollouts(0.0, 0.0)
    assert rollout.token_ids[rollout.loss_mask].tolist() == [20, 2, 21, 22]


def test_texts_of_parts() -> None:
    parts = [SimpleNamespace(type="text", text="look"), SimpleNamespace(type="image_url", image_url="...")]
    talk = read_talk(trace_of([says("user", parts, 10), ONE]), 0, 0, 8)
    assert talk.messages[0]["content"] == "look\n(image_url)"


@pytest.mark.parametrize(
    ("branches", "words"),
    [
        ([[ASK]], "asked nothing"),
        ([[Node(ASK.message, [10, 11], [False])]], "2 tokens, a mask of 1"),
        ([[ASK, Node(ONE.message, [1, 20], [False, True], [])]], "1 were sampled, and 0 log-probs"),
        ([[answers("b", 20, scaffold=0)]], "begins with a sampled token"),
        ([[ASK, answers("no", 1, 60 + i)] for i in range(3)], "3 branches, environment.max_branches is 2"),
    ],
)
def test_a_trace_that_nothing_can_be_learnt_from_says_why(branches: list[list[Node]], words: str) -> None:
    with pytest.raises(NoRollout, match=words):
        read_talk(trace_of(*branches), 0, 0, 2)
