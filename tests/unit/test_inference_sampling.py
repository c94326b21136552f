"""The sampler draws from the distribution that it says it draws from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from graftwork.inference.sampling import UNIFORM_BLOCK, Uniforms, draw, keep_nucleus, stream_key

SAMPLES = 40_000


def sample(logits: torch.Tensor, temperature: float, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and log-probs of SAMPLES draws from one row of logits."""
    rng = np.random.default_rng(0)
    column = np.ones(SAMPLES, np.float32)
    rows = logits.expand(SAMPLES, -1)
    tokens, logprobs = draw(rows, column * np.float32(temperature), column * np.float32(top_p), rng.random(SAMPLES))
    return tokens.numpy(), logprobs.numpy()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (1.6, 0.5), (1.0, 1e-6)])
def test_frequencies_are_the_probabilities_that_are_reported(temperature: float, top_p: float) -> None:
    torch.manual_seed(1)
    logits = torch.randn(1, 12) * 1.5
    expected = (logits[0].double() / temperature).softmax(-1).numpy()
    order = np.argsort(-expected)
    before = np.cumsum(expected[order]) - expected[order]
    expected[order[before >= top_p]] = 0
    expected /= expected.sum()
    tokens, logprobs = sample(logits, temperature, top_p)
    counts = np.bincount(tokens, minlength=12)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_square = ((counts - SAMPLES * expected)[kept] ** 2 / (SAMPLES * expected[kept])).sum()
    assert chi_square < 35  # 11 degrees of freedom: above this one time in 4000
    np.testing.assert_allclose(np.exp(logprobs), expected[tokens], rtol=2e-6)


def test_greedy_rows_take_the_likeliest_token_whatever_the_others_do() -> None:
    torch.manual_seed(2)
    logits = torch.randn(4, 30)
    temperatures = np.array([0, 1, 0, 0.5], np.float32)
    top_ps = np.array([1, 0.9, 0.3, 1], np.float32)
    tokens, logprobs = draw(logits, temperatures, top_ps, np.full(4, 0.999))
    for row in (0, 2):
        assert tokens[row] == logits[row].argmax()
        assert logprobs[row] == logits[row].log_softmax(-1).max()


def test_a_draw_does_not_depend_on_the_other_rows() -> None:
    torch.manual_seed(3)
    logits = torch.randn(64, 50)
    temperatures = np.where(np.arange(64) % 2, 1, 0.8).astype(np.float32)
    top_ps = np.where(np.arange(64) % 3, 1, 0.7).astype(np.float32)
    uniforms = np.random.default_rng(4).random(64)
    together = draw(logits, temperatures, top_ps, uniforms)
    for row in range(64):
        one = slice(row, row + 1)
        alone = draw(logits[one], temperatures[one], top_ps[one], uniforms[one])
        assert alone[0] == together[0][row]
        assert abs(alone[1] - together[1][row]) < 1e-6


def test_tokens_without_probability_are_never_drawn() -> None:
    logits = torch.full((3, 5), -torch.inf)
    logits[:, 2] = 0.0
    tokens, logprobs = draw(logits, np.ones(3, np.float32), np.ones(3, np.float32), np.array([0.0, 0.5, 1 - 2**-53]))
    assert tokens.tolist() == [2, 2, 2]
    assert logprobs.tolist() == [0, 0, 0]


def test_nucleus_keeps_the_smallest_set_that_reaches_top_p() -> None:
    logprobs = torch.tensor([[0.5, 0.2, 0.2, 0.1]]).log().expand(3, 4)
    kept = keep_nucleus(logprobs, torch.tensor([0.4, 0.6, 0.95])).exp()
    expected = torch.tensor([[1, 0, 0, 0], [5 / 7, 2 / 7, 0, 0], [0.5, 0.2, 0.2, 0.1]])
    torch.testing.assert_close(kept, expected)


def test_streams_are_named_by_all_three_numbers_and_blocks_continue_them() -> None:
    keys = {tuple(stream_key(*name)) for name in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (-1, 0, 0)]}
    assert len(keys) == 5
    uniforms, key = Uniforms(), stream_key(7, 8, 9)
    second_first = uniforms.block(key, 1)
    whole = np.random.Generator(np.random.Philox(key=key)).random(2 * UNIFORM_BLOCK)
    np.testing.assert_array_equal(np.concatenate([uniforms.block(key, 0), second_first]), whole)
