"""Does a server that cannot name what it holds hold this version? It is asked with the probe that came with it.

The trainer's half, and what the numbers are, is in training/probe.py. All comparisons are of log-probs, by the largest
difference over the probe's tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftwork.errors import Damaged, InferenceError, WrongAdapter
from graftwork.store.files import read_json

PROBE_FILE = "probe.json"
PROMPT_TOKENS_MAX = 160
"""Of a probe's prompt: more than a block of vLLM's prefix cache on any device, so that what it wrongly keeps of another
adapter is seen."""
TOLD_APART = 0.2
"""In nats. Tokens that are nearer to one another say nothing about temperatures."""
Outcome = Literal["verified", "undecided"]


@dataclass(frozen=True)
class Probe:
    """probe.json. The lists are of `tokens`; None where the trainer has no numbers to give."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    version: tuple[float, ...] | None
    previous: tuple[float, ...] | None
    base: tuple[float, ...] | None

    @staticmethod
    def read(folder: Path) -> Probe | None:
        """Of a published version; None where its trainer did not publish one yet. Raises Damaged."""
        if not (folder / PROBE_FILE).exists():
            return None
        found = read_json(folder / PROBE_FILE, "probe")
        try:
            prompt, tokens = (tuple(int(i) for i in found[key]) for key in ("prompt", "tokens"))
            lists = [_floats(found[key], len(tokens)) for key in ("version", "previous", "base")]
            if not prompt or not tokens or min(*prompt, *tokens) < 0:
                raise ValueError("prompt and tokens are token ids, one at least")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise Damaged(f"{folder / PROBE_FILE} is not a probe ({type(error).__name__}: {error})") from None
        return Probe(prompt, tokens, *lists)


def _floats(values: Any, count: int) -> tuple[float, ...] | None:
    if values is None:
        return None
    numbers = tuple(float(value) for value in values)
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"expected {count} finite numbers, found {str(values)[:100]}")
    return numbers


@dataclass(frozen=True)
class Finding:
    """What a probe found. Gaps are in nats; those of the version before and of the base are to the version itself, and
    say how far one can be told from another."""

    outcome: Outcome
    gap: float | None
    previous_gap: float | None
    base_gap: float | None
    tolerance: float

    def __str__(self) -> str:
        """`verified: within 0.0021 (tolerance 0.03); the version before is 0.1210 from it, the base 2.5312`"""
        if self.gap is None:
            return f"{self.outcome}: the trainer has no log-probs to compare with"
        said = f"{self.outcome}: within {self.gap:.4f} (tolerance {self.tolerance:g})"
        others = {"the version before": self.previous_gap, "the base": self.base_gap}
        told = [f"{name} is {value:.4f} from it" for name, value in others.items() if value is not None]
        return "; ".join([said, *told])


def judge(probe: Probe, served: Mapping[int, float], tolerance: float) -> Finding:
    """Whether a server whose likeliest next tokens have these log-probs holds the probe's version. Pure.

    verified: it agrees to `tolerance`, and whoever agrees so well with this version cannot agree with another one.
    undecided: it agrees, but others are too much like this version; or the trainer has no numbers. Raises WrongAdapter
    when it does not agree, naming what it agrees with.
    """
    found = [served.get(token) for token in probe.tokens]
    least = min(served.values())
    gap = None if probe.version is None else _served_gap(found, probe.version, least)
    previous, base = (_gap(probe.version, other) for other in (probe.previous, probe.base))
    if gap is None:
        return Finding("undecided", None, previous, base, tolerance)
    if gap > tolerance:
        others = {"the version before does": probe.previous, "the bare base does": probe.base}
        near = [who for who, other in others.items() if other and _served_gap(found, other, least) <= tolerance]
        raise WrongAdapter(
            f"its log-probs after the probe differ from the trainer's by up to {gap:.4f}, probe_tolerance is "
            f"{tolerance:g}; it answers as {near[0] if near else 'neither the version before nor the bare base do'}"
        )
    apart = base is not None and all(other > 2 * tolerance for other in (previous, base) if other is not None)
    return Finding("verified" if apart else "undecided", gap, previous, base, tolerance)


def refuse_raw_logprobs(plain: Mapping[int, float], sharp: Mapping[int, float], temperature: float) -> None:
    """Raises InferenceError for a server whose log-probs leave the temperature out. plain, sharp: what it says of its
    likeliest next tokens at temperature 1 and at `temperature`, where they must lie 1 / temperature as far apart."""
    tokens = plain.keys() & sharp.keys()
    apart, sharply = (max(said[t] for t in tokens) - min(said[t] for t in tokens) for said in (plain, sharp))
    if apart > TOLD_APART and sharply < apart * (1 + 1 / temperature) / 2:
        raise InferenceError(
            "its log-probs are not those of the distribution that it samples from: they do not change with the "
            "temperature. Start vLLM with --logprobs-mode processed_logprobs (docs/vllm.md)"
        )


def _gap(one: Sequence[float] | None, other: Sequence[float] | None) -> float | None:
    if one is None or other is None:
        return None
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _served_gap(found: Sequence[float | None], expected: Sequence[float], least: float) -> float:
    """A token that the server did not name is less likely to it than all that it did name."""
    gaps = [max(0.0, e - least) if f is None else abs(f - e) for f, e in zip(found, expected, strict=True)]
    return max(gaps)
