"""What tells a version from others: `probe.json`, published with it for engines that cannot name what they hold.

A fixed prompt, and the log-probs of the tokens that this version finds likeliest to come next: under this version,
under the last one that differed from it, and under the bare base. An engine that is asked for the same must agree with
the first list and not with the others (rollouts/probe.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graftwork.lora.linear import Segment
from graftwork.lora.slots import SlotBank
from graftwork.model.attention import Group, PackedPlan
from graftwork.model.base import Ask, BaseModel, Route
from graftwork.rollouts.probe import PROMPT_TOKENS_MAX

PROMPT_IDS = 1024
"""The prompt is drawn from the ids below this: in most vocabularies letters and short, frequent tokens."""
CANDIDATES = 8
"""Tokens whose log-probs are given."""

Distribution = NDArray[np.float32]
"""[V] log-probs of the token that comes after the prompt."""


def probe_prompt(vocab_size: int, max_positions: int) -> list[int]:
    """Token ids [up to PROMPT_TOKENS_MAX], the same for all versions of all runs of a base."""
    count = max(1, min(PROMPT_TOKENS_MAX, max_positions - 1))
    drawn = np.random.Generator(np.random.PCG64(0)).integers(0, min(vocab_size, PROMPT_IDS), count)
    return [int(token) for token in drawn]


class Prober:
    """The prompt, and what the bare base says after it. All ranks take part in making and in using one."""

    def __init__(self, base: BaseModel, bank: SlotBank) -> None:
        self.base, self.bank = base, bank
        self.prompt = probe_prompt(base.vocab_size, base.max_positions)
        self.bare = self._ask([])

    def of_slot(self, slot: int) -> Distribution:
        """What the adapter in this slot says now."""
        return self._ask([Segment(slot, 0, len(self.prompt), self.bank.holding(slot).scale)])

    def _ask(self, segments: list[Segment]) -> Distribution:
        count, device = len(self.prompt), self.base.device
        tokens, positions = torch.tensor(self.prompt, device=device), torch.arange(count, device=device)
        ask = Ask(positions[-1:], None, 1.0)
        route, plan = Route(self.bank, segments), PackedPlan([Group(0, 1, count)])
        with torch.no_grad():
            [(logprobs, _)] = self.base.logprobs(tokens, positions, plan, route, [ask], chunk=1)
        return logprobs[0].cpu().numpy()


@dataclass
class Probes:
    """A run's: remembers what its versions said. The one before is the last whose digest is another; none after a
    resume, until a step has changed the adapter."""

    prompt: list[int]
    bare: Distribution
    digest: str | None = None
    now: Distribution | None = None
    before: Distribution | None = None

    def of(self, digest: str, said: Distribution) -> dict[str, Any]:
        """The content of probe.json for the version of this digest. Where a number is not finite there is no list."""
        if digest != self.digest:
            self.digest, self.before, self.now = digest, self.now, said
        tokens = np.argsort(-said, kind="stable")[:CANDIDATES]

        def of_tokens(said: Distribution | None) -> list[float] | None:
            values = None if said is None else said[tokens]
            return values.tolist() if values is not None and np.isfinite(values).all() else None

        return {
            "prompt": self.prompt,
            "tokens": tokens.tolist(),
            "version": of_tokens(said),
            "previous": of_tokens(self.before),
            "base": of_tokens(self.bare),
        }
