"""token_logprobs against torch's own log_softmax."""

import pytest
import torch

from graftwork.model.logprobs import token_logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_values_and_gradients_equal_log_softmax(temperature: float, chunk: int) -> None:
    torch.manual_seed(0)
    weight, targets = torch.randn(20, 8), torch.randint(0, 20, (11,))
    ours = torch.randn(11, 8, requires_grad=True)
    plain = ours.detach().clone().requires_grad_()
    upstream = torch.randn(11)
    logprobs, entropies = token_logprobs(ours, weight, targets, temperature=temperature, chunk=chunk)
    logprobs.backward(upstream)
    expected = torch.log_softmax(plain @ weight.T / temperature, -1)
    expected.gather(1, targets[:, None])[:, 0].backward(upstream)
    torch.testing.assert_close(logprobs, expected.gather(1, targets[:, None])[:, 0])
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=expected).entropy())
    torch.testing.assert_close(ours.grad, plain.grad)


def test_without_a_gradient_the_numbers_are_the_same() -> None:
    torch.manual_seed(0)
    weight, targets, hidden = torch.randn(20, 8), torch.randint(0, 20, (11,)), torch.randn(11, 8)
    with_gradient = token_logprobs(hidden.clone().requires_grad_(), weight, targets, temperature=0.7, chunk=4)
    for ours, plain in zip(
        with_gradient, token_logprobs(hidden, weight, targets, temperature=0.7, chunk=4), strict=True
    ):
        torch.testing.assert_close(ours, plain)


def test_no_positions_is_no_error() -> None:
    hidden = torch.zeros(0, 8, requires_grad=True)
    logprobs, _ = token_logprobs(
        hidden, torch.randn(20, 8), torch.zeros(0, dtype=torch.int64), temperature=1.0, chunk=4
    )
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
