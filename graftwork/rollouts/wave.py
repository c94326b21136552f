"""The lockstep wave: all rollouts of a batch ask the model together.

Rollouts are asyncio tasks. A wave collects their calls until every rollout that has not ended is waiting for the
model, sorts them by (prompt, sample), and sends them. The order in which tasks happened to run is gone by then: the
engine sees the same requests in the same order every time, in conversations of several turns too.

All samples of one prompt ask the same first question. It is sent once, with n = samples, so the engine reads the
prompt once; calls that differ go as prompts of their own with n = 1. A wave is therefore one request, or two when it
holds calls of both kinds (`group` first, then `single`), each with a seed of its own (`request_seed`).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from graftwork.config.run import SamplingConfig
from graftwork.rollouts.sampling import Completion, Sampler

Kind = Literal["group", "single"]


@dataclass(frozen=True)
class Call:
    """A rollout that waits for the model: `token_ids` is all that the model is to read."""

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """Calls that go to the engine together: `prompts` distinct prompts, `n` calls each, in order."""

    kind: Kind
    n: int
    calls: tuple[Call, ...]

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        return [call.token_ids for call in self.calls[:: self.n]]


def request_seed(key: str, wave: int, kind: Kind) -> int:
    """63 bits, stable across machines and versions. `key` names the batch: run seed, step, split."""
    return int.from_bytes(hashlib.sha256(f"{key} wave {wave} {kind}".encode()).digest()[:8]) >> 1


def plan(calls: Sequence[Call], group_size: int) -> list[Request]:
    """The requests of a wave: whole groups that ask the same thing, then all else."""
    grouped: list[Call] = []
    single: list[Call] = []
    ordered = sorted(calls, key=lambda call: (call.prompt_index, call.sample_index))
    for _, members in groupby(ordered, key=lambda call: call.prompt_index):
        group = list(members)
        together = len(group) == group_size and all(call.token_ids == group[0].token_ids for call in group)
        (grouped if together else single).extend(group)
    requests = [Request("group", group_size, tuple(grouped)), Request("single", 1, tuple(single))]
    return [request for request in requests if request.calls]


@dataclass
class Waves:
    """The waves of one batch. `live` rollouts take part; each calls `ask` any number of times and `leave` once."""

    sampler: Sampler
    model: str
    sampling: SamplingConfig
    group_size: int
    key: str
    """Names the batch, for seeds."""
    live: int
    count: int = 0
    """Waves sent so far."""
    failure: BaseException | None = None
    """What ended the sampling, if anything did; every later call raises it."""
    _waiting: dict[Call, asyncio.Future[Completion]] = field(default_factory=dict)
    _sending: asyncio.Task[dict[Call, Completion]] | None = None

    async def ask(self, call: Call) -> Completion:
        """The model's answer. Raises what the sampler raised, to all that wait."""
        if self.failure is not None:
            raise self.failure
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting[call] = future
        self._send_if_complete()
        try:
            return await future
        finally:  # a rollout that gave up waiting does not hold up, or count in, the next wave
            self._waiting.pop(call, None)

    def leave(self) -> None:
        """A rollout has ended: nobody waits for its next call."""
        self.live -= 1
        self._send_if_complete()

    def close(self) -> None:
        """Give up what is under way."""
        if self._sending is not None:
            self._sending.cancel()

    def _send_if_complete(self) -> None:
        if self._waiting and len(self._waiting) == self.live and self.failure is None:
            waiting, self._waiting = self._waiting, {}
            self._sending = asyncio.create_task(self._send(list(waiting), self.count))
            self._sending.add_done_callback(lambda task: self._hand_out(task, waiting))
            self.count += 1

    async def _send(self, calls: list[Call], wave: int) -> dict[Call, Completion]:
        answers: dict[Call, Completion] = {}
        for request in plan(calls, self.group_size):
            seed = request_seed(self.key, wave, request.kind)
            completions = await self.sampler.complete(self.model, request.prompts, request.n, self.sampling, seed)
            answers.update(zip(request.calls, completions, strict=True))
        return answers

    def _hand_out(
        self, task: asyncio.Task[dict[Call, Completion]], waiting: dict[Call, asyncio.Future[Completion]]
    ) -> None:
        """Wake the rollouts of a wave, in order, with their answers or with what went wrong."""
        if not task.cancelled() and task.exception() is not None:
            self.failure = task.exception()
        for call in sorted(waiting, key=lambda call: (call.prompt_index, call.sample_index)):
            future = waiting[call]
            if future.done():
                continue
            if task.cancelled():
                future.cancel()
            elif self.failure is not None:
                future.set_exception(self.failure)
            else:
                future.set_result(task.result()[call])
