"""The engine as a `Sampler`, in the same process: what the HTTP client is to a server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from graftwork.config.run import SamplingConfig
from graftwork.inference.engine import Engine
from graftwork.inference.requests import GenerationRequest
from graftwork.rollouts.sampling import Completion


class LocalSampler:
    """Satisfies `rollouts.sampling.Sampler`. The engine is the caller's to start and to close."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def complete(
        self, model: str, prompts: Sequence[Sequence[int]], n: int, sampling: SamplingConfig, seed: int
    ) -> list[Completion]:
        """See `Sampler.complete`. Raises BadRequest, UnknownModel, EngineFault."""
        request = GenerationRequest(
            model, prompts, n=n, max_tokens=sampling.max_tokens, temperature=sampling.temperature,
            top_p=sampling.top_p, seed=seed,
        )  # fmt: skip
        result = await asyncio.wrap_future(self._engine.submit(request))
        return [
            Completion(
                token_ids=tuple(choice.token_ids.tolist()),
                logprobs=tuple(choice.logprobs.tolist()),
                finish_reason=choice.finish_reason,
                version_name=result.version,
                digest=result.digest,
            )
            for choice in result.choices
        ]
