"""The sequences that are being decoded, as columns: a step over hundreds of them costs a few numpy calls.

Lane i is row i of every column and row i of the KV cache. Live lanes are 0..count-1; when some end, the last live lanes
move into the holes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from graftwork.inference.requests import Choice, FinishReason, GenerationRequest, GenerationResult
from graftwork.inference.sampling import UNIFORM_BLOCK, Uniforms, stream_key
from graftwork.lora.linear import Segment

BASE_SLOT = -1
ANSWER_STEP = 64  # tokens: the answer columns' width is a multiple of this


@dataclass(frozen=True)
class Source:
    """What samples: the bare base (slot -1, digest None) or the adapter in a slot."""

    name: str
    slot: int
    scale: float
    digest: str | None


@dataclass(eq=False)
class Job:
    """One request on its way through the engine. It ends when its future does, whoever ends it."""

    request: GenerationRequest
    source: Source
    future: Future[GenerationResult]
    seed: int
    choices: dict[int, Choice] = field(default_factory=dict)
    """By index p * n + s, as they end."""

    @property
    def is_complete(self) -> bool:
        return len(self.choices) == len(self.request.prompts) * self.request.n

    def succeed(self) -> None:
        """Answer with all choices, unless nobody waits any more."""
        ordered = tuple(self.choices[index] for index in range(len(self.choices)))
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(GenerationResult(self.source.name, self.source.digest, ordered))

    def fail(self, error: BaseException) -> None:
        """Answer with an error, unless it was answered before or nobody waits any more."""
        if not self.future.done():
            refuse(self.future, error)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as one adapter reads it; equal keys, equal keys and values in the cache."""

    source: Source
    token_ids: NDArray[np.int64]
    key: tuple[int, bytes]

    @staticmethod
    def of(source: Source, token_ids: Seq[int]) -> Prompt:
        ids = np.asarray(token_ids, np.int64)
        return Prompt(source, ids, (source.slot, ids.tobytes()))


@dataclass(frozen=True, eq=False)
class Sequence:
    """Sample s of prompt p of a job."""

    job: Job
    prompt: Prompt
    prompt_index: int
    sample_index: int
    stream: NDArray[np.uint64]

    @staticmethod
    def all_of(job: Job) -> list[Sequence]:
        """The sequences of a job, prompt by prompt."""
        sequences = []
        for p, token_ids in enumerate(job.request.prompts):
            prompt = Prompt.of(job.source, token_ids)
            sequences += [Sequence(job, prompt, p, s, stream_key(job.seed, p, s)) for s in range(job.request.n)]
        return sequences

    def finish(self, token_ids: NDArray[np.int32], logprobs: NDArray[np.float32], reason: FinishReason) -> None:
        choice = Choice(self.prompt_index, self.sample_index, token_ids, logprobs, reason)
        self.job.choices[self.prompt_index * self.job.request.n + self.sample_index] = choice


@dataclass(frozen=True)
class RowOrder:
    """The live lanes as rows of a forward pass, sorted by slot: row r is lane order[r] (None: row r is lane r)."""

    order: NDArray[np.int64] | None
    segments: tuple[Segment, ...]

    def rows(self, column: NDArray[np.generic]) -> NDArray[np.generic]:
        return column if self.order is None else column[self.order]


class Lanes:
    """Columns, one entry a lane.

    slot         int64, -1 for the bare base         position     int64, tokens in the KV cache
    scale        float64, of the adapter             answered     int64, tokens sampled so far
    limit        int64, most tokens to sample        last_token   int64, sampled but not yet in the cache
    temperature, top_p   float32                     looks_for_text   bool, has stop strings
    uniforms     [lanes, UNIFORM_BLOCK] float64      tokens, logprobs [lanes, width] int32, float32
    """

    def __init__(self, capacity: int) -> None:
        self.count = 0
        self.sequences: list[Sequence] = []
        self.slot, self.position, self.answered, self.limit, self.last_token = np.zeros((5, capacity), np.int64)
        self.scale = np.zeros(capacity)
        self.temperature, self.top_p = np.zeros((2, capacity), np.float32)
        self.looks_for_text = np.zeros(capacity, np.bool_)
        self.uniforms = np.zeros((capacity, UNIFORM_BLOCK))
        self.tokens = np.zeros((capacity, ANSWER_STEP), np.int32)
        self.logprobs = np.zeros((capacity, ANSWER_STEP), np.float32)
        self._uniforms = Uniforms()
        self._row_order: RowOrder | None = None

    @property
    def capacity(self) -> int:
        return len(self.slot)

    def _columns(self) -> tuple[NDArray[np.generic], ...]:
        return (
            self.slot, self.position, self.answered, self.limit, self.last_token, self.scale, self.temperature,
            self.top_p, self.looks_for_text, self.uniforms, self.tokens, self.logprobs,
        )  # fmt: skip

    def add(self, sequences: Seq[Sequence]) -> None:
        """Give the next free lanes to `sequences`, in order. Their prompts count as in the cache."""
        for lane, sequence in enumerate(sequences, self.count):
            request = sequence.job.request
            self.slot[lane], self.scale[lane] = sequence.job.source.slot, sequence.job.source.scale
            self.position[lane] = len(sequence.prompt.token_ids)
            self.answered[lane], self.limit[lane] = 0, request.max_tokens
            self.temperature[lane], self.top_p[lane] = request.temperature, request.top_p
            self.looks_for_text[lane] = bool(request.stop)
        self.sequences += sequences
        self.count += len(sequences)
        self._row_order = None

    def next_uniforms(self, lanes: NDArray[np.int64]) -> NDArray[np.float64]:
        """The draw that decides the next token of each lane."""
        offsets = self.answered[lanes] % UNIFORM_BLOCK
        for lane in lanes[offsets == 0]:
            block = int(self.answered[lane]) // UNIFORM_BLOCK
            self.uniforms[lane] = self._uniforms.block(self.sequences[lane].stream, block)
        return self.uniforms[lanes, offsets]

    def append(self, lanes: NDArray[np.int64], tokens: NDArray[np.int64], logprobs: NDArray[np.float32]) -> None:
        """One more sampled token for each of `lanes`."""
        answered = self.answered[lanes]
        if answered.max() >= self.tokens.shape[1]:
            self._widen()
        self.tokens[lanes, answered] = tokens
        self.logprobs[lanes, answered] = logprobs
        self.last_token[lanes] = tokens
        self.answered[lanes] = answered + 1

    def _widen(self) -> None:
        self.tokens = np.concatenate([self.tokens, np.zeros_like(self.tokens)], axis=1)
        self.logprobs = np.concatenate([self.logprobs, np.zeros_like(self.logprobs)], axis=1)

    def answer(self, lane: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Copies of the sampled tokens and their log-probs."""
        length = int(self.answered[lane])
        return self.tokens[lane, :length].copy(), self.logprobs[lane, :length].copy()

    def remove(self, gone: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Take lanes out (ascending); the last live lanes move into the holes. Returns (sources, targets) of the moves,
        which the KV cache has to follow."""
        left = self.count - len(gone)
        targets = gone[gone < left]
        is_gone = np.zeros(self.count, np.bool_)
        is_gone[gone] = True
        sources = left + np.flatnonzero(~is_gone[left:])
        for column in self._columns():
            column[targets] = column[sources]
        for source, target in zip(sources, targets, strict=True):
            self.sequences[target] = self.sequences[source]
        del self.sequences[left:]
        self.count = left
        self._row_order = None
        return sources, targets

    def row_order(self) -> RowOrder:
        """Computed when the live lanes have changed, not at every step."""
        if self._row_order is None:
            slots = self.slot[: self.count]
            order = np.argsort(slots, kind="stable")
            is_sorted = bool((slots[1:] >= slots[:-1]).all())
            segments = segments_of(slots[order], self.scale[: self.count][order])
            self._row_order = RowOrder(None if is_sorted else order, segments)
        return self._row_order


def refuse(future: Future[GenerationResult] | Future[None], error: BaseException) -> None:
    """Answer with an error, unless nobody waits any more."""
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


def segments_of(slots: NDArray[np.int64], scales: NDArray[np.float64]) -> tuple[Segment, ...]:
    """The segments of rows that are sorted by slot; rows of the bare base (-1) are in none."""
    starts = [0, *(np.flatnonzero(np.diff(slots)) + 1).tolist(), len(slots)]
    return tuple(
        Segment(int(slots[start]), start, stop, float(scales[start]))
        for start, stop in pairwise(starts)
        if stop > start and slots[start] != BASE_SLOT
    )
