"""Draw the next token of every sequence, and say how likely it was.

The randomness of a sequence is a stream of its own: Philox, a counter-based generator (Salmon et al., SC 2011), keyed
by a hash of (seed, prompt index, sample index). Token t uses the t-th uniform of its stream through the inverse of the
cumulative distribution, so a draw never depends on which other sequences are in the batch.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UNIFORM_BLOCK = 64  # draws that are made at a time
COUNTS_A_BLOCK = UNIFORM_BLOCK // 4  # one count of Philox makes four numbers


def stream_key(seed: int, prompt_index: int, sample_index: int) -> NDArray[np.uint64]:
    """[2] uint64: names a sequence's stream. seed: signed 64 bits."""
    name = struct.pack("<qQQ", seed, prompt_index, sample_index)
    digest = hashlib.blake2b(name, digest_size=16, person=b"graftwork-sample").digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


class Uniforms:
    """Any block of any stream. One generator is set to where it should count on from: making one takes five times as
    long, and there is one a sequence."""

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)

    def block(self, key: NDArray[np.uint64], index: int) -> NDArray[np.float64]:
        """Draws index * UNIFORM_BLOCK up to (index + 1) * UNIFORM_BLOCK of the stream, in [0, 1)."""
        counter = np.array([index * COUNTS_A_BLOCK, 0, 0, 0], np.uint64)
        self._bits.state = {
            "bit_generator": "Philox", "state": {"counter": counter, "key": key}, "buffer": np.zeros(4, np.uint64),
            "buffer_pos": 4, "has_uint32": 0, "uinteger": 0,
        }  # fmt: skip
        return self._generator.random(UNIFORM_BLOCK)


def draw(
    logits: Tensor, temperatures: NDArray[np.float32], top_ps: NDArray[np.float32], uniforms: NDArray[np.float64]
) -> tuple[Tensor, Tensor]:
    """(tokens [N] int64, log-probs [N] float32) for logits [N, V] float32, one row a sequence.

    Log-probs are those of the distribution that was sampled from: after the temperature, renormalised over the nucleus.
    At temperature 0 the token is the likeliest one, and its log-prob that at temperature 1 over the whole vocabulary
    (the distribution sampled from would be a point, whose log-prob 0 tells nothing). The tokens of a row that holds
    NaN mean nothing; its log-prob is not finite.
    """
    greedy = temperatures == 0
    divisors = np.where(greedy, np.float32(1), temperatures)
    if (divisors != 1).any():
        logits = logits / torch.from_numpy(divisors).to(logits.device)[:, None]
    logprobs = logits.log_softmax(-1)
    if (cut := np.flatnonzero((top_ps < 1) & ~greedy)).size:
        rows = torch.from_numpy(cut).to(logits.device)
        kept = torch.from_numpy(top_ps[cut]).to(logits.device)
        logprobs[rows] = keep_nucleus(logprobs[rows], kept)
    # float64: in float32 the sum over a large vocabulary is off by more than an unlikely token's probability
    cumulative = logprobs.exp().to(torch.float64).cumsum(-1)
    targets = torch.from_numpy(uniforms).to(logits.device) * cumulative[:, -1]
    # right: the first token whose cumulative probability is above the target, so never one of probability 0
    tokens = torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0].clamp_(max=logits.shape[1] - 1)
    if greedy.any():
        rows = torch.from_numpy(np.flatnonzero(greedy)).to(logits.device)
        tokens[rows] = logits[rows].argmax(-1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


def keep_nucleus(logprobs: Tensor, top_ps: Tensor) -> Tensor:
    """Log-probs [N, V] of the smallest set of likeliest tokens whose probabilities sum to at least top_ps [N],
    renormalised; -inf outside. The likeliest token is always in. Source: nucleus sampling (arXiv 1904.09751)."""
    ordered, indices = logprobs.sort(stable=True, dim=-1, descending=True)
    probabilities = ordered.exp()
    before = probabilities.cumsum(-1) - probabilities  # of all likelier tokens
    outside = before >= top_ps[:, None]
    outside[:, 0] = False
    ordered = ordered.masked_fill(outside, -torch.inf).log_softmax(-1)
    return torch.empty_like(logprobs).scatter_(1, indices, ordered)
