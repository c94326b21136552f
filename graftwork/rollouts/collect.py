"""Play a batch of tasks: environment + tokenizer + sampler in, rollouts and readable rows out.

    P = prompts, G = samples a prompt; rollout (p, s) is sample s of prompt p; T = tokens of one rollout

What a rollout holds: the tokens of the first prompt, then for every turn the sampled tokens, as sampled, then the
template's tokens up to the next answer (`ChatTokenizer.continuation`). Sampled tokens have loss_mask 1, a log-prob and
version_index 0 (a batch comes from one version); all others have 0, 0.0 and -1.

A rollout whose environment raises (or earns a reward that is no finite number, or asks nothing, or takes longer than
`timeout_seconds`) has failed. It is data: it has a row with its error, a reward of null and an advantage of 0; it is
not among the rollouts that are trained on, and the others of its group are centred on their own mean. A fault of the
sampler or of the configuration is none of its doing and ends the batch: any GraftworkError is raised.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import numpy as np

from graftwork.config.run import SamplingConfig
from graftwork.errors import GraftworkError, InferenceError, RunError
from graftwork.rollouts.advantages import group_advantages
from graftwork.rollouts.chat import ChatTokenizer
from graftwork.rollouts.environment import Answer, Environment, Message, Split
from graftwork.rollouts.sampling import Completion, Sampler
from graftwork.rollouts.wave import Call, Waves
from graftwork.store.queue import REWARD_MAX, DigestSource, Rollout

ERROR_CHARACTERS = 500
"""What a row keeps of a failed rollout's error."""


@dataclass(frozen=True)
class Source:
    """The adapter that must do the sampling: its name, and its digest where it is known."""

    model: str
    digest: str | None = None


@dataclass(frozen=True)
class Request:
    """Which tasks to play. Task p is task first_index + p of the split. round: of the batch, see rollouts/rounds.py."""

    run: str
    seed: int
    step: int
    split: Split
    prompts: int
    samples: int
    first_index: int
    sampling: SamplingConfig
    round: int = 0
    timeout_seconds: float | None = None
    """Longest time that a rollout may take beside the model's answers."""

    @staticmethod
    def of_batch(
        run: str, seed: int, step: int, sampling: SamplingConfig, *, round: int = 0, prompts: int | None = None,
        timeout_seconds: float | None = None,
    ) -> Request:  # fmt: skip
        """The first `prompts` (not given: all) of a round of the training batch of `step` (from 1): every step, and
        every round of it, has tasks of its own."""
        first = ((step - 1) * sampling.max_rounds + round) * sampling.prompts_per_step
        prompts = sampling.prompts_per_step if prompts is None else prompts
        samples = sampling.samples_per_prompt
        return Request(run, seed, step, "train", prompts, samples, first, sampling, round, timeout_seconds)

    @property
    def key(self) -> str:
        """What the seeds of its sampling are made from."""
        return f"{self.seed} {self.split} {self.step}" + (f" round {self.round}" if self.round else "")


@dataclass(frozen=True)
class Collected:
    rollouts: tuple[Rollout, ...]
    """The sequences of those that did not fail, in order of (prompt, sample): one each, or more where it branched."""
    rows: list[dict[str, Any]]
    """One a rollout, failed ones too: a line of samples.jsonl (docs/design.md)."""
    digest_source: DigestSource
    """Whether the engine vouched for the digest."""
    waves: int

    @property
    def failed(self) -> int:
        return sum("error" in row for row in self.rows)


@dataclass
class Conversation:
    """One rollout in the making; the `Policy` that its environment sees."""

    tokenizer: ChatTokenizer
    waves: Waves
    prompt_index: int
    sample_index: int
    messages: list[Message] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    """[T]; None for tokens that were not sampled."""
    completions: list[Completion] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    openings: dict[int, tuple[list[Message], list[int]]] = field(default_factory=dict)
    """By prompt: what its samples were first asked, as messages and tokens: most are asked the same."""
    clock: asyncio.Timeout | None = None
    """Runs while the environment is at work; stopped while it waits for the model, whose waves wait for all."""
    _asking: bool = False

    async def ask(self, messages: Sequence[Message]) -> Answer:
        """Add `messages`, let the model answer. Raises ValueError for no messages or two questions at a time."""
        if self._asking or not messages:
            raise ValueError("ask the policy one question at a time, with at least one new message")
        self._asking = True
        left = self._stop_clock()
        try:
            prompt_tokens = self._prompt_tokens(messages)
            read = (*self.token_ids, *prompt_tokens)
            completion = await self.waves.ask(Call(self.prompt_index, self.sample_index, read))
        finally:
            self._asking = False
            if left is not None and self.clock is not None and not self.clock.expired():
                self.clock.reschedule(asyncio.get_running_loop().time() + left)
        return self._hold(messages, prompt_tokens, completion)

    def _stop_clock(self) -> float | None:
        """The seconds that the environment has left; None where it may take any time."""
        if self.clock is None or self.clock.expired() or (ends := self.clock.when()) is None:
            return None
        self.clock.reschedule(None)
        return ends - asyncio.get_running_loop().time()

    def _prompt_tokens(self, messages: Sequence[Message]) -> list[int]:
        """What the template writes between what is held and the next answer."""
        if not self.answers:
            return self._opening(messages)
        ended = self.token_ids[-1] in self.tokenizer.eos_token_ids
        return self.tokenizer.continuation(self.messages[:-1], messages, ended)

    def _opening(self, messages: Sequence[Message]) -> list[int]:
        asked, tokens = self.openings.get(self.prompt_index, (None, []))
        if asked != list(messages):
            tokens = self.tokenizer.encode_chat(messages, add_generation_prompt=True)
            self.openings[self.prompt_index] = copy.deepcopy(list(messages)), tokens
        return tokens

    def _hold(self, messages: Sequence[Message], prompt_tokens: list[int], completion: Completion) -> Answer:
        self.token_ids += [*prompt_tokens, *completion.token_ids]
        self.logprobs += [*([None] * len(prompt_tokens)), *completion.logprobs]
        answer = Answer(self.tokenizer.decode(completion.token_ids), completion.token_ids, completion.finish_reason)
        self.messages += [*messages, {"role": "assistant", "content": answer.text}]
        self.completions.append(completion)
        self.answers.append(answer)
        return answer

    def rollouts(self, reward: float, advantage: float) -> tuple[Rollout, ...]:
        sampled = np.array([p is not None for p in self.logprobs], np.bool_)
        rollout = Rollout(
            prompt_index=self.prompt_index,
            sample_index=self.sample_index,
            token_ids=np.array(self.token_ids, np.int32),
            loss_mask=sampled,
            logprobs=np.array([p or 0.0 for p in self.logprobs], np.float32),
            version_index=np.where(sampled, 0, -1).astype(np.int32),
            reward=reward,
            advantage=advantage,
        )
        return (rollout,)


class Talk(Protocol):
    """What was said in a rollout that has ended."""

    @property
    def prompt_index(self) -> int: ...
    @property
    def sample_index(self) -> int: ...
    @property
    def messages(self) -> Sequence[Message]: ...
    @property
    def answers(self) -> Sequence[Answer]: ...

    def rollouts(self, reward: float, advantage: float) -> tuple[Rollout, ...]:
        """Its sequences, each with the reward and the advantage of the whole."""
        ...


@dataclass(frozen=True)
class Played:
    """A rollout that has ended, well (`error` is None) or not."""

    talk: Talk
    reward: float
    error: str | None


@runtime_checkable
class PlaysBatches(Protocol):
    """An environment that samples by itself, at the server, instead of asking a `Policy`."""

    async def play(
        self, tokenizer: ChatTokenizer, sampler: Sampler, source: Source, request: Request
    ) -> tuple[list[Played], DigestSource]:
        """All P * G rollouts, in order of (prompt, sample), and who vouches that `source` was the sampler. Raises as
        `collect`."""
        ...


async def collect(
    environment: Environment | PlaysBatches,
    tokenizer: ChatTokenizer,
    sampler: Sampler,
    source: Source,
    request: Request,
) -> Collected:
    """Play the batch, in lockstep waves where the environment asks a `Policy`: the same arguments then give the same
    rollouts if the sampler is deterministic.

    Raises what the sampler raises; ConfigError for a template that refuses the messages; InferenceError if any answer
    came from another adapter than `source`; RunError if every rollout failed (of a later round, all may).
    """
    waves = 0
    if isinstance(environment, PlaysBatches):
        played, digest_source = await environment.play(tokenizer, sampler, source, request)
    else:
        played, digest_source, waves = await _play_waves(environment, tokenizer, sampler, source, request)
    if request.round == 0 and all(one.error is not None for one in played):
        raise RunError(
            f"run {request.run}: all {len(played)} rollouts of step {request.step} failed; the first:"
            f" {played[0].error}; mend the environment and start again"
        )
    advantages = _advantages(played, request.run)
    return Collected(
        rollouts=tuple(
            rollout
            for one, advantage in zip(played, advantages, strict=True)
            if one.error is None
            for rollout in one.talk.rollouts(one.reward, advantage)
        ),
        rows=[_row(one, a, request, source, digest_source) for one, a in zip(played, advantages, strict=True)],
        digest_source=digest_source,
        waves=waves,
    )


async def _play_waves(
    environment: Environment, tokenizer: ChatTokenizer, sampler: Sampler, source: Source, request: Request
) -> tuple[list[Played], DigestSource, int]:
    """(what became of every rollout, who vouches for the source, waves sent)"""
    live = request.prompts * request.samples
    waves = Waves(sampler, source.model, request.sampling, request.samples, request.key, live)
    prompts, samples, openings = (
        range(request.prompts),
        range(request.samples),
        dict[int, tuple[list[Message], list[int]]](),
    )
    talks = [Conversation(tokenizer, waves, p, s, openings=openings) for p in prompts for s in samples]
    tasks = [asyncio.create_task(_play(environment, request, talk)) for talk in talks]
    try:
        await asyncio.wait(tasks)
    finally:
        waves.close()
        for task in tasks:
            task.cancel()
    errors = [None if task.cancelled() else task.exception() for task in tasks]
    if waves.failure is not None:
        raise waves.failure
    if (fault := next((error for error in errors if isinstance(error, GraftworkError)), None)) is not None:
        raise fault
    played = [_outcome(talk, task) for talk, task in zip(talks, tasks, strict=True)]
    return played, check_source((c for talk in talks for c in talk.completions), source), waves.count


async def _play(environment: Environment, request: Request, talk: Conversation) -> float:
    try:
        async with asyncio.timeout(request.timeout_seconds) as talk.clock:
            task = environment.task(request.seed, request.first_index + talk.prompt_index, request.split)
            return await environment.run(task, talk)
    finally:
        talk.waves.leave()


def _outcome(talk: Conversation, task: asyncio.Task[float]) -> Played:
    """What became of a rollout that has ended."""
    if task.cancelled():
        return Played(talk, math.nan, "the environment cancelled itself")
    if (error := task.exception()) is not None:
        if isinstance(error, TimeoutError) and talk.clock is not None and talk.clock.expired():
            return Played(talk, math.nan, "it took longer than environment.timeout_seconds allows")
        return Played(talk, math.nan, f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS])
    return outcome(talk, task.result())


def outcome(talk: Talk, reward: float | None) -> Played:
    """What became of a rollout that ended with a reward: it may be none."""
    if not isinstance(reward, (int, float, np.floating)) or not abs(reward) <= REWARD_MAX:
        return Played(talk, math.nan, f"the reward {reward!r} is not a finite number")
    if not talk.answers:
        return Played(talk, math.nan, "the environment asked nothing")
    return Played(talk, float(reward), None)


def _advantages(played: list[Played], run: str) -> list[float]:
    """[P*G]; centred within the rollouts of a prompt that did not fail, 0 for those that did."""
    advantages: list[float] = []
    for _, members in groupby(played, key=lambda one: one.talk.prompt_index):
        group = list(members)
        rewards = [one.reward for one in group if one.error is None]
        centred = iter(group_advantages(rewards, len(rewards), run=run).tolist() if rewards else [])
        advantages += [next(centred) if one.error is None else 0.0 for one in group]
    return advantages


def check_source(completions: Any, source: Source) -> DigestSource:
    """Prove that every answer came from `source`: nothing may be sampled from the bare base or another version.

    Returns "engine" when the engine named the digest of each, else "claimed" (only the name was checked). Raises
    InferenceError, naming expected and found.
    """
    vouched = True
    for completion in completions:
        if completion.version_name != source.model:
            raise InferenceError(
                f"asked {source.model} and was answered by {completion.version_name}; nothing of this batch is used"
            )
        if completion.digest is None:
            vouched = False
        elif source.digest is not None and completion.digest != source.digest:
            raise InferenceError(
                f"the engine's {source.model} has digest {completion.digest}, published was {source.digest};"
                " nothing of this batch is used. Restart the inference server"
            )
    return "engine" if vouched else "claimed"


def _row(
    one: Played, advantage: float, request: Request, source: Source, digest_source: DigestSource
) -> dict[str, Any]:
    """A line of samples.jsonl. Conversations of several turns add `turns`, failed rollouts `error`."""
    talk = one.talk
    opening = talk.messages[: next((i for i, m in enumerate(talk.messages) if m["role"] == "assistant"), None)]
    row: dict[str, Any] = {
        "step": request.step,
        "prompt_index": talk.prompt_index,
        "sample_index": talk.sample_index,
        "prompt": "\n".join(str(message.get("content")) for message in opening),
        "answer": talk.answers[-1].text if talk.answers else "",
        "reward": one.reward if one.error is None else None,
        "advantage": advantage,
        "finish_reason": talk.answers[-1].finish_reason if talk.answers else None,
        "version": source.model,
        "digest": source.digest,
        "digest_source": digest_source,
    }
    if len(talk.answers) > 1:
        row["turns"] = [{"role": m["role"], "content": m.get("content")} for m in talk.messages]
    return row | ({"error": one.error} if one.error is not None else {})


@dataclass(frozen=True)
class Evaluation:
    mean_reward: float
    """Failed rollouts count as 0: a model cannot look better by breaking the environment."""
    failed: int
    rows: list[dict[str, Any]]
    """As in samples.jsonl."""


async def evaluate(
    environment: Environment | PlaysBatches,
    tokenizer: ChatTokenizer,
    sampler: Sampler,
    source: Source,
    *,
    n_prompts: int,
    seed: int,
    sampling: SamplingConfig,
    step: int = 0,
    timeout_seconds: float | None = None,
) -> Evaluation:
    """The mean reward of one answer to each of the first `n_prompts` held-out tasks. Raises as `collect`."""
    request = Request("evaluation", seed, step, "heldout", n_prompts, 1, 0, sampling, timeout_seconds=timeout_seconds)
    collected = await collect(environment, tokenizer, sampler, source, request)
    mean = math.fsum(row["reward"] for row in collected.rows if "error" not in row) / n_prompts
    return Evaluation(mean, collected.failed, collected.rows)
