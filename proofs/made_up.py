"""Made-up adapters and batches: for tests and proofs of everything that is not about learning."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from graftwork.adapters.canonical import Adapter, LoraPair
from graftwork.store.layout import RunId
from graftwork.store.queue import Batch, Published, Rollout, SampledVersion

VOCAB = 64


def random_adapter(
    shapes: Mapping[str, tuple[int, ...]], rank: int, *, scale: float = 2.0, seed: int = 0, size: float = 0.1
) -> Adapter:
    """Both factors random: the adapter changes the function."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path in sorted(shapes):
        *experts, out_features, in_features = shapes[path]
        a = torch.randn(*experts, rank, in_features, generator=generator) * size
        b = torch.randn(*experts, out_features, rank, generator=generator) * size
        pairs[path] = LoraPair(a, b, scale)
    return Adapter(pairs)


def random_batch(run: RunId, step: int, published: Published, *, seed: int = 0, rollouts: int = 8) -> Batch:
    """A well-formed batch sampled from `published`, with made-up tokens, log-probs and rewards."""
    rng = np.random.default_rng([seed, step])
    version = SampledVersion(published.version.name, published.version.digest, "engine")
    made = []
    for index in range(rollouts):
        length = int(rng.integers(5, 12))
        mask = np.arange(length) >= 3
        made.append(
            Rollout(
                prompt_index=index // 4,
                sample_index=index % 4,
                token_ids=rng.integers(0, VOCAB, length).astype(np.int32),
                loss_mask=mask,
                logprobs=np.where(mask, -rng.random(length) * 4, 0).astype(np.float32),
                version_index=np.where(mask, 0, -1).astype(np.int32),
                reward=float(rng.random()),
                advantage=float(rng.normal()),
            )
        )
    return Batch(run, step, 1.0, (version,), tuple(made), {"next_step": step + 1})
