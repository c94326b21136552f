"""What a sampler is: the one thing that rollouts ask of an engine, over HTTP or in the same process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from graftwork.config.run import SamplingConfig


@dataclass(frozen=True)
class Completion:
    """One sampled answer, with the name of what sampled it."""

    token_ids: tuple[int, ...]
    """The sampled tokens, the end token included when there is one; at least one."""
    logprobs: tuple[float, ...]
    """Natural-log probability of each under the distribution that it was drawn from."""
    finish_reason: str
    """"stop" or "length"."""
    version_name: str
    """What the engine says it used."""
    digest: str | None
    """sha256 of the adapter's tensors as the engine itself holds them; None where the engine cannot tell (vLLM)."""


class Sampler(Protocol):
    """An engine. The client of a server satisfies this, and so can an engine in the same process."""

    async def complete(
        self, model: str, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingConfig, seed: int
    ) -> list[Completion]:
        """`n` answers of adapter `model` to each prompt (token ids): completion p * n + s is answer s to prompt p.

        The randomness of answer (p, s) is a function of (seed, p, s) alone, where the engine can promise that.
        """
        ...
