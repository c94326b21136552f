"""A trace of the package verifiers as training sequences. The package itself is not needed, only its traces' shape.

A trace is a graph of messages; a branch is a way from its root to a leaf, and a node of it has

    token_ids  [T] what the message adds to the tokens that the model reads
    mask       [T] True where the model sampled the token
    logprobs   one for each True of mask
    message    with role, content and, of an assistant, perhaps tool_calls

A conversation has several branches when its history was rewritten: by the environment (another agent, a summary in
place of old turns), or because the chat template does not write a sampled answer back as it was sampled.

Every branch is a sequence of its own, with the reward and the advantage of the whole. **A sampled token is trained on
once.** One that lies in a part that an earlier branch has too is trained on there, and is only read in the later one. A
branch with nothing of its own is left out, and so is one that the trace calls not trainable.

An answer that was cut at the length limit is trained on like any other, with the reward that the environment gave:
its tokens were sampled, and leaving bad endings out would hide them from the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from graftwork.rollouts.environment import Answer, Message
from graftwork.store.queue import Rollout


class NoRollout(Exception):
    """A trace that nothing can be learnt from: the rollout has failed, with this as the reason."""


class Node(Protocol):
    token_ids: list[int]
    mask: list[bool]
    logprobs: list[float]
    message: Any
    sampled: bool


class Branch(Protocol):
    nodes: list[Any]
    trainable: bool


@dataclass(frozen=True)
class Learnt:
    """token_ids [T] int32; trained [T] bool: sampled, and trained on in no earlier branch; logprobs [T] float32, 0
    elsewhere."""

    token_ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    logprobs: NDArray[np.float32]


@dataclass(frozen=True)
class TracedTalk:
    """Satisfies `collect.Talk`. messages and answers are those of the last branch."""

    prompt_index: int
    sample_index: int
    messages: tuple[Message, ...] = ()
    answers: tuple[Answer, ...] = ()
    sequences: tuple[Learnt, ...] = ()

    def rollouts(self, reward: float, advantage: float) -> tuple[Rollout, ...]:
        return tuple(
            Rollout(
                prompt_index=self.prompt_index,
                sample_index=self.sample_index,
                token_ids=one.token_ids,
                loss_mask=one.trained,
                logprobs=one.logprobs,
                version_index=np.where(one.trained, 0, -1).astype(np.int32),
                reward=reward,
                advantage=advantage,
            )
            for one in self.sequences
        )


def read_talk(trace: Any, prompt_index: int, sample_index: int, max_branches: int) -> TracedTalk:
    """Raises NoRollout for a trace in which nothing was sampled, that contradicts itself, or that has more than
    `max_branches` sequences."""
    branches: list[Branch] = [branch for branch in trace.branches if branch.trainable]
    sequences = sequences_of(branches)
    if not sequences:
        raise NoRollout("the environment asked nothing")
    if len(sequences) > max_branches:
        raise NoRollout(f"the conversation has {len(sequences)} branches, environment.max_branches is {max_branches}")
    nodes = branches[-1].nodes
    reasons = {id(trace.nodes[call.node]): call.finish_reason for call in trace.calls if call.node is not None}
    return TracedTalk(
        prompt_index,
        sample_index,
        tuple(_message(node) for node in nodes),
        tuple(_answer(node, reasons.get(id(node))) for node in nodes if node.sampled),
        tuple(sequences),
    )


def sequences_of(branches: Sequence[Branch]) -> list[Learnt]:
    """See the module's docstring. Raises NoRollout, naming the branch, for nodes that contradict themselves."""
    trained: set[int] = set()
    found = []
    for number, branch in enumerate(branches):
        parts = [_part(node, number, fresh=id(node) not in trained) for node in branch.nodes]
        trained |= {id(node) for node in branch.nodes}
        if not any(part.trained.any() for part in parts):
            continue
        whole = Learnt(
            np.concatenate([part.token_ids for part in parts]),
            np.concatenate([part.trained for part in parts]),
            np.concatenate([part.logprobs for part in parts]),
        )
        if whole.trained[0]:
            raise NoRollout(f"branch {number} begins with a sampled token, which nothing predicts")
        found.append(whole)
    return found


def _part(node: Node, branch: int, *, fresh: bool) -> Learnt:
    """What a node adds to a branch. fresh: no earlier branch has it."""
    sampled = np.array(node.mask, np.bool_)
    if len(sampled) != len(node.token_ids) or len(node.logprobs) != sampled.sum():
        raise NoRollout(
            f"branch {branch}: a message has {len(node.token_ids)} tokens, a mask of {len(sampled)} of which"
            f" {int(sampled.sum())} were sampled, and {len(node.logprobs)} log-probs"
        )
    logprobs = np.zeros(len(sampled), np.float32)
    if fresh:
        logprobs[sampled] = node.logprobs
    return Learnt(np.array(node.token_ids, np.int32), sampled & fresh, logprobs)


def _answer(node: Node, finish_reason: str | None) -> Answer:
    sampled = tuple(token for token, mine in zip(node.token_ids, node.mask, strict=True) if mine)
    return Answer(_text(node.message), sampled, finish_reason or "stop")


def _message(node: Node) -> Message:
    return {"role": str(node.message.role), "content": _text(node.message)}


def _text(message: Any) -> str:
    """The text of a message, and a line for each tool that it calls."""
    content = message.content
    if isinstance(content, list):
        content = "\n".join(str(getattr(part, "text", f"({part.type})")) for part in content)
    lines = [content or ""] + [f"{call.name}({call.arguments})" for call in getattr(message, "tool_calls", None) or ()]
    return "\n".join(line for line in lines if line)
