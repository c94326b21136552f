"""Admit, prefill, decode, finish: the generation loop, on one thread, a step at a time.

Everything happens in the order of submission. When nothing is left to do the cache is dropped, so what a request gets
on an idle engine does not depend on what ran before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graftwork.errors import InferenceError
from graftwork.inference.cache import DecodePlan, KvCache, PrefillPlan, Prefix, PromptGroup
from graftwork.inference.lanes import Job, Lanes, Prompt, RowOrder, Sequence, segments_of
from graftwork.inference.requests import FinishReason
from graftwork.inference.sampling import draw
from graftwork.lora.linear import SlotBatch
from graftwork.lora.slots import SlotBank
from graftwork.model.base import BaseModel, Route

PREFILL_TOKENS = 8192  # prompt tokens in one forward pass; a longer single prompt goes alone
ADMIT_SHARE = 16  # admission waits until 1/16 of all lanes is free: prefilling one prompt a step would be slow
STOP_TAIL_TOKENS = 16

Decode = Callable[[Seq[int]], str]
Lane = NDArray[np.int64]  # lane numbers


@dataclass
class Counters:
    """What the engine has done since it started."""

    prefilled_prompts: int = 0
    prefilled_tokens: int = 0
    decode_steps: int = 0
    sampled_tokens: int = 0


class Scheduler:
    """Not thread-safe: the engine's worker owns it."""

    def __init__(
        self, base: BaseModel, bank: SlotBank, *, max_sequences: int, max_model_len: int, eos_token_ids: Seq[int],
        decode: Decode | None,
    ) -> None:  # fmt: skip
        self.base, self.bank, self.decode_text = base, bank, decode
        self.max_sequences = max_sequences
        self.cache = KvCache(max_sequences, max_model_len)
        self.lanes = Lanes(max_sequences)
        self.waiting: deque[Sequence] = deque()
        self.jobs: list[Job] = []
        self.counters = Counters()
        self._prefix: tuple[Prompt, Prefix] | None = None
        self._routed: tuple[RowOrder, Route] | None = None
        self._is_eos = np.zeros(base.vocab_size, np.bool_)
        self._is_eos[[token for token in eos_token_ids if token < base.vocab_size]] = True

    @property
    def busy(self) -> bool:
        return bool(self.jobs)

    def add(self, job: Job) -> None:
        """Queue a job whose request was checked."""
        self.jobs.append(job)
        self.waiting.extend(Sequence.all_of(job))

    def step(self) -> None:
        """Admit what there is room for, or decode one token of every live sequence; answer jobs that are complete."""
        self._drop_ended()
        if self._should_admit():
            self._admit()
        elif self.lanes.count:
            self._decode()
        for job in [job for job in self.jobs if job.is_complete]:
            self.jobs.remove(job)
            job.succeed()
        if not self.jobs:
            self.clear()

    def clear(self) -> None:
        """Forget all sequences and free the cache."""
        self.jobs, self._prefix, self._routed = [], None, None
        self.waiting.clear()
        self.lanes = Lanes(self.max_sequences)
        self.cache.clear()

    def forget(self, slot: int) -> None:
        """Drop what was computed with the adapter in a slot, which no job uses: another may come into it."""
        if self._prefix is not None and self._prefix[0].source.slot == slot:
            self._prefix = None

    # --- admission --------------------------------------------------------------------------------------------------

    def _should_admit(self) -> bool:
        free = self.max_sequences - self.lanes.count
        return bool(self.waiting) and free >= min(len(self.waiting), max(1, self.max_sequences // ADMIT_SHARE))

    def _admit(self) -> None:
        """Give free lanes to waiting sequences in order of submission; prefill each distinct prompt once; sample the
        first tokens. A prompt whose samples did not all fit is kept, for those that follow."""
        first = self.lanes.count
        count = min(self.max_sequences - first, len(self.waiting))
        admitted = [self.waiting.popleft() for _ in range(count)]
        self.lanes.add(admitted)
        longest = int(self.lanes.position[: self.lanes.count].max())
        self.cache.reserve(self.lanes.count, longest)
        self.cache.wipe(slice(first, self.lanes.count))
        lanes_of: dict[tuple[int, bytes], list[int]] = {}
        prompts: dict[tuple[int, bytes], Prompt] = {}
        for lane, sequence in enumerate(admitted, first):
            lanes_of.setdefault(sequence.prompt.key, []).append(lane)
            prompts.setdefault(sequence.prompt.key, sequence.prompt)
        kept, self._prefix = self._prefix, None
        if kept is not None and kept[0].key in prompts:
            self._go_on_from_prefix(kept[1], lanes_of[kept[0].key])
            del prompts[kept[0].key]
        for chunk in chunks(sorted(prompts.values(), key=_by_slot_and_length)):
            self._prefill(chunk, [lanes_of[prompt.key] for prompt in chunk])
        self._finish()

    def _go_on_from_prefix(self, prefix: Prefix, lanes: list[int]) -> None:
        """More samples of a prompt that was prefilled in an earlier round."""
        rows = np.asarray(lanes)
        self.cache.write_prefix(self._tensor(rows), prefix)
        self._keep_if_more_wait(lanes[-1], prefix.logits)
        self._sample(rows, prefix.logits.expand(len(lanes), -1))

    def _prefill(self, prompts: list[Prompt], lanes: list[list[int]]) -> None:
        """One forward pass over distinct prompts, sorted by slot and length; the lanes in `lanes[i]` begin with prompt
        i."""
        lengths = np.array([len(prompt.token_ids) for prompt in prompts])
        slots = np.repeat([prompt.source.slot for prompt in prompts], lengths)
        scales = np.repeat([prompt.source.scale for prompt in prompts], lengths)
        tokens = np.concatenate([prompt.token_ids for prompt in prompts])
        positions = np.concatenate([np.arange(length) for length in lengths])
        plan = PrefillPlan(self.cache, self._groups(lengths, lanes))
        segments = segments_of(slots, scales)
        route = Route(self.bank, segments, SlotBatch.of(segments, self.base.head))
        hidden = self.base.hidden(self._tensor(tokens), self._tensor(positions), plan, route)
        logits = self._logits(hidden[self._tensor(np.cumsum(lengths) - 1)])  # (prompts, V)
        self.counters.prefilled_prompts += len(prompts)
        self.counters.prefilled_tokens += len(tokens)
        for index, prompt_lanes in enumerate(lanes):
            self._keep_if_more_wait(prompt_lanes[-1], logits[index])
        sources = np.repeat(np.arange(len(prompts)), [len(group) for group in lanes])
        self._sample(np.concatenate(lanes), logits.index_select(0, self._tensor(sources)))

    def _groups(self, lengths: NDArray[np.int64], lanes: list[list[int]]) -> list[PromptGroup]:
        """Consecutive prompts of one length share a group."""
        edges = [0, *(np.flatnonzero(np.diff(lengths)) + 1).tolist(), len(lengths)]
        row_ends = np.concatenate([[0], np.cumsum(lengths)])
        groups = []
        for start, stop in pairwise(edges):
            sources = np.repeat(np.arange(stop - start), [len(group) for group in lanes[start:stop]])
            members = self._tensor(np.concatenate(lanes[start:stop]))
            first_row, length = int(row_ends[start]), int(lengths[start])
            groups.append(PromptGroup(first_row, stop - start, length, members, self._tensor(sources)))
        return groups

    def _keep_if_more_wait(self, lane: int, logits: Tensor) -> None:
        """Keep a prompt's keys and values if its next sample is first in line. At most one prompt can be split so."""
        prompt = self.lanes.sequences[lane].prompt
        if self.waiting and self.waiting[0].prompt.key == prompt.key:
            self._prefix = (prompt, self.cache.read_prefix(lane, len(prompt.token_ids), logits))

    # --- decoding ---------------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        lanes, count = self.lanes, self.lanes.count
        rows = lanes.row_order()
        order = np.arange(count) if rows.order is None else rows.order
        longest = int(lanes.position[:count].max()) + 1
        self.cache.reserve(count, longest)
        plan = DecodePlan(
            self.cache, self._tensor(lanes.position[:count]), longest,
            None if rows.order is None else self._tensor(rows.order), self.base.dtype,
        )  # fmt: skip
        tokens, positions = self._tensor(lanes.last_token[order]), self._tensor(lanes.position[order])
        hidden = self.base.hidden(tokens, positions, plan, self._route(rows))
        lanes.position[:count] += 1
        self.counters.decode_steps += 1
        self._sample(order, self._logits(hidden))
        self._finish()

    def _route(self, rows: RowOrder) -> Route:
        """Made when the live lanes have changed, not at every step."""
        if self._routed is None or self._routed[0] is not rows:
            batch = SlotBatch.of(rows.segments, self.base.head)
            self._routed = (rows, Route(self.bank, rows.segments, batch))
        return self._routed[1]

    def _logits(self, hidden: Tensor) -> Tensor:
        return (hidden @ self.base.head.T).float()

    def _sample(self, lanes: Lane, logits: Tensor) -> None:
        """Draw the next token of `lanes` from logits [len(lanes), V]."""
        table = self.lanes
        drawn = draw(logits, table.temperature[lanes], table.top_p[lanes], table.next_uniforms(lanes))
        tokens, logprobs = (column.cpu().numpy() for column in drawn)
        table.append(lanes, tokens, logprobs)
        self.counters.sampled_tokens += len(lanes)

    # --- the end of a sequence --------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Hand over the sequences that have ended, fail those whose log-probs are not finite, close the holes."""
        table, count = self.lanes, self.lanes.count
        last = (np.arange(count), table.answered[:count] - 1)
        broken = ~np.isfinite(table.logprobs[last])
        stopped = self._is_eos[table.last_token[:count]]
        for lane in np.flatnonzero(table.looks_for_text[:count] & ~stopped & ~broken):
            stopped[lane] = self._meets_stop_string(int(lane))
        ended = stopped | (table.answered[:count] >= table.limit[:count])
        for lane in np.flatnonzero(ended & ~broken):
            reason: FinishReason = "stop" if stopped[lane] else "length"
            table.sequences[lane].finish(*table.answer(int(lane)), reason)
        for lane in np.flatnonzero(broken):
            table.sequences[lane].job.fail(self._broken(int(lane)))
        if (gone := np.flatnonzero(ended | broken)).size:
            self._remove(gone)

    def _broken(self, lane: int) -> InferenceError:
        sequence = self.lanes.sequences[lane]
        return InferenceError(
            f"model {sequence.job.source.name}: the probabilities of token {self.lanes.answered[lane] - 1} of sample"
            f" {sequence.sample_index} of prompt {sequence.prompt_index} are not finite: the weights are broken. The"
            " request is given up; load another version"
        )

    def _meets_stop_string(self, lane: int) -> bool:
        """Whether the text of the answer's last tokens holds a stop string: enough tokens that one which the newest
        token completes cannot be missed, at up to 4 tokens (bytes) a character."""
        assert self.decode_text is not None, "requests with stop strings are refused where there is no tokenizer"
        stop = self.lanes.sequences[lane].job.request.stop
        length = int(self.lanes.answered[lane])
        tail = STOP_TAIL_TOKENS + 4 * max(map(len, stop))
        text = self.decode_text(self.lanes.tokens[lane, max(0, length - tail) : length].tolist())
        return any(string in text for string in stop)

    def _remove(self, gone: Lane) -> None:
        longest = int(self.lanes.position[: self.lanes.count].max())
        sources, targets = self.lanes.remove(gone)
        if sources.size:
            self.cache.move(self._tensor(sources), self._tensor(targets), longest)

    def _drop_ended(self) -> None:
        """Take out the sequences of jobs that were answered already: by an error, or because nobody waits any more."""
        if not any(job.future.done() for job in self.jobs):
            return
        self.jobs = [job for job in self.jobs if not job.future.done()]
        live = set(map(id, self.jobs))
        self.waiting = deque(sequence for sequence in self.waiting if id(sequence.job) in live)
        gone = [lane for lane, sequence in enumerate(self.lanes.sequences) if id(sequence.job) not in live]
        if gone:
            self._remove(np.array(gone))

    def _tensor(self, column: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(column)).to(self.base.device)


def chunks(prompts: Seq[Prompt]) -> list[list[Prompt]]:
    """Runs of prompts of at most PREFILL_TOKENS tokens together, at least one prompt each."""
    parts: list[list[Prompt]] = []
    tokens = 0
    for prompt in prompts:
        if not parts or tokens + len(prompt.token_ids) > PREFILL_TOKENS:
            parts.append([])
            tokens = 0
        parts[-1].append(prompt)
        tokens += len(prompt.token_ids)
    return parts


def _by_slot_and_length(prompt: Prompt) -> tuple[int, int]:
    return prompt.source.slot, len(prompt.token_ids)
