"""What the engine is asked for, what it answers, and how it says no."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from graftwork.errors import InferenceError, Refused

SEED_BITS = 63
STOP_STRINGS_MAX = 16
SEQUENCES_MAX = 65536  # in one request
TEMPERATURE_MIN = 1e-4  # below it logits overflow; 0 is greedy

FinishReason = Literal["stop", "length"]


class BadRequest(Refused):
    """The request cannot be served as it is (HTTP 400). `param` names the field at fault, where there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModel(Refused):
    """The request names a model or adapter that is not loaded (HTTP 404)."""


class WrongDigest(Refused):
    """The request wants another adapter than the one that its name stands for here (HTTP 412)."""


class EngineFault(InferenceError):
    """The engine failed, or is closed; the request was not at fault (HTTP 500)."""


@dataclass(frozen=True)
class GenerationRequest:
    """n samples of each prompt, from one model.

    model         a loaded adapter's name, or the base's
    prompts       token ids, at least one prompt, each of at least one token
    temperature   0 is greedy: the likeliest token, log-probs of the distribution at temperature 1
    top_p         nucleus, (0, 1]
    seed          None: a fresh random one. The draws of sample s of prompt p are a function of (seed, p, s) alone
    stop          strings that end an answer; its tokens are kept as they were sampled
    """

    model: str
    prompts: Sequence[Sequence[int]]
    n: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()

    @property
    def settled_seed(self) -> int:
        return secrets.randbits(SEED_BITS) if self.seed is None else self.seed


@dataclass(frozen=True)
class Choice:
    """One answer. token_ids [L] int32 with the end-of-sequence token when there was one, logprobs [L] float32."""

    prompt_index: int
    sample_index: int
    token_ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    finish_reason: FinishReason


@dataclass(frozen=True)
class GenerationResult:
    """`choices[p * n + s]` is sample s of prompt p. version and digest name the adapter that the engine itself used;
    for the bare base its name, and None."""

    version: str
    digest: str | None
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Limits:
    """vocab_size and max_model_len (prompt and answer together, in tokens) bound every request."""

    vocab_size: int
    max_model_len: int
    can_decode: bool

    def check(self, request: GenerationRequest) -> None:
        """Raises BadRequest, naming the field."""
        if not request.prompts:
            raise BadRequest("prompt: there is none; send at least one", "prompt")
        if request.n < 1:
            raise BadRequest(f"n: {request.n}, expected at least 1", "n")
        if request.max_tokens < 1:
            raise BadRequest(f"max_tokens: {request.max_tokens}, expected at least 1", "max_tokens")
        if len(request.prompts) * request.n > SEQUENCES_MAX:
            raise BadRequest(f"n: {len(request.prompts)} prompts x {request.n} is over {SEQUENCES_MAX} answers", "n")
        if request.temperature != 0 and not TEMPERATURE_MIN <= request.temperature < float("inf"):
            raise BadRequest(
                f"temperature: {request.temperature}, expected 0 (greedy) or a finite number from {TEMPERATURE_MIN} up",
                "temperature",
            )
        if not 0 < request.top_p <= 1:
            raise BadRequest(f"top_p: {request.top_p}, expected above 0 and at most 1", "top_p")
        if request.seed is not None and not -(2**63) <= request.seed < 2**63:
            raise BadRequest(f"seed: {request.seed} does not fit in 64 bits", "seed")
        self._check_stop(request)
        for index, prompt in enumerate(request.prompts):
            self._check_prompt(index, prompt, request.max_tokens)

    def _check_stop(self, request: GenerationRequest) -> None:
        if len(request.stop) > STOP_STRINGS_MAX or any(not text for text in request.stop):
            raise BadRequest(f"stop: at most {STOP_STRINGS_MAX} strings, none of them empty", "stop")
        if request.stop and not self.can_decode:
            raise BadRequest("stop: this engine has no tokenizer, so it cannot look for strings", "stop")

    def _check_prompt(self, index: int, prompt: Sequence[int], max_tokens: int) -> None:
        if len(prompt) == 0:
            raise BadRequest(f"prompt {index} is empty; the model needs at least one token to go on from", "prompt")
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            bad = next(token for token in prompt if not 0 <= token < self.vocab_size)
            raise BadRequest(
                f"prompt {index}: token id {bad} is not in the vocabulary (0 to {self.vocab_size - 1})", "prompt"
            )
        if len(prompt) + max_tokens > self.max_model_len:
            raise BadRequest(
                f"prompt {index} has {len(prompt)} tokens and max_tokens is {max_tokens}; together they may be at most "
                f"{self.max_model_len} (max_model_len). Shorten the prompt or ask for fewer tokens",
                "max_tokens",
            )
