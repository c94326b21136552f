"""slot_experts against plain autograd on whole weights, pair by pair, and against transformers' own experts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from graftwork.lora import experts
from graftwork.lora.experts import ExpertWeights, slot_experts
from graftwork.lora.linear import Factors, Segment

TOKENS, HIDDEN, MIDDLE, EXPERTS, CHOSEN, SLOTS, RANK = 10, 6, 5, 12, 3, 12, 2
PARTS = ("gate_proj", "up_proj", "down_proj")
SEGMENTS = (Segment(1, 0, 4, 2.0), Segment(10, 6, 10, 0.5))  # tokens 4 and 5 see the bare base
ANCHOR = torch.zeros((), requires_grad=True)


class Case:
    """One layer of experts, factors in 12 slots, and tokens with their routes. float64."""

    def __init__(self, seed: int = 1, tokens: int = TOKENS, parts: Sequence[str] = PARTS) -> None:
        torch.manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
        self.base = ExpertWeights(
            draw(EXPERTS, 2 * MIDDLE, HIDDEN), draw(EXPERTS, HIDDEN, MIDDLE), torch.nn.functional.silu
        )
        self.x = draw(tokens, HIDDEN)
        self.experts_of = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(tokens)])
        self.weights_of = torch.rand(tokens, CHOSEN, dtype=torch.float64)
        sizes = {"gate_proj": (MIDDLE, HIDDEN), "up_proj": (MIDDLE, HIDDEN), "down_proj": (HIDDEN, MIDDLE)}
        self.a = {part: draw(SLOTS, EXPERTS, RANK, sizes[part][1]) for part in parts}
        self.b = {part: draw(SLOTS, EXPERTS, sizes[part][0], RANK) for part in parts}
        self.upstream = draw(tokens, HIDDEN)

    def factors(self) -> dict[str, Factors]:
        """With fresh gradient buffers."""
        return {
            part: Factors(self.a[part], self.b[part], torch.zeros_like(self.a[part]), torch.zeros_like(self.b[part]))
            for part in self.a
        }

    def run(self, x: Tensor, factors: dict[str, Factors], segments: Sequence[Segment] = SEGMENTS) -> Tensor:
        return slot_experts(x, self.experts_of, self.weights_of, self.base, factors, segments, ANCHOR)

    def formula(
        self, x: Tensor, a: dict[str, Tensor], b: dict[str, Tensor], segments: Sequence[Segment] = SEGMENTS
    ) -> Tensor:
        """One token and one expert at a time, W + scale B A as a whole matrix."""
        rows = []
        for token, row in enumerate(x):
            found = [segment for segment in segments if segment.start <= token < segment.stop]
            total = torch.zeros_like(row)
            for k, expert in enumerate(self.experts_of[token].tolist()):
                weight = {
                    "gate_proj": self.base.gate_up[expert, :MIDDLE], "up_proj": self.base.gate_up[expert, MIDDLE:],
                    "down_proj": self.base.down[expert],
                }  # fmt: skip
                for segment in found:
                    for part in a:
                        weight[part] = (
                            weight[part] + segment.scale * b[part][segment.slot, expert] @ a[part][segment.slot, expert]
                        )
                hidden = self.base.activation(weight["gate_proj"] @ row) * (weight["up_proj"] @ row)
                total = total + self.weights_of[token, k] * (weight["down_proj"] @ hidden)
            rows.append(total)
        return torch.stack(rows)


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}


@pytest.mark.parametrize("parts", [PARTS, ("gate_proj",), ("up_proj", "down_proj"), ()])
@pytest.mark.parametrize("segments", [SEGMENTS, (Segment(10, 0, TOKENS, 0.5),), ()])
def test_forward_and_gradients_equal_the_formula(parts: Sequence[str], segments: Sequence[Segment]) -> None:
    case = Case(parts=parts)
    x1, a, b = case.x.clone().requires_grad_(), leaves(case.a), leaves(case.b)
    expected = case.formula(x1, a, b, segments)
    expected.backward(case.upstream)
    x2, factors = case.x.clone().requires_grad_(), case.factors()
    y = case.run(x2, factors, segments)
    y.backward(case.upstream)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x2.grad, x1.grad)
    for part in parts:
        zero = torch.zeros_like(case.a[part]), torch.zeros_like(case.b[part])
        torch.testing.assert_close(factors[part].grad_a, a[part].grad if a[part].grad is not None else zero[0])
        torch.testing.assert_close(factors[part].grad_b, b[part].grad if b[part].grad is not None else zero[1])
    with torch.no_grad():
        torch.testing.assert_close(case.run(case.x, factors, segments), expected)


def test_without_factors_it_is_transformers_own_experts() -> None:
    case = Case(parts=())
    config = Qwen3MoeConfig(num_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=MIDDLE)
    config._experts_implementation = "eager"
    theirs = Qwen3MoeExperts(config).double()
    with torch.no_grad():
        theirs.gate_up_proj.copy_(case.base.gate_up)
        theirs.down_proj.copy_(case.base.down)
        torch.testing.assert_close(case.run(case.x, {}), theirs(case.x, case.experts_of, case.weights_of))


def test_gradients_add_up_and_an_input_without_gradient_still_fills_the_buffers() -> None:
    case, factors = Case(), None
    factors = case.factors()
    case.run(case.x, factors).backward(case.upstream)
    once = {part: factor.grad_a.clone() for part, factor in factors.items() if factor.grad_a is not None}
    case.run(case.x, factors).backward(case.upstream)
    for part in PARTS:
        assert once[part].abs().sum() > 0
        torch.testing.assert_close(factors[part].grad_a, 2 * once[part])


def test_only_the_slots_of_the_segments_and_the_chosen_experts_get_gradients() -> None:
    case = Case(tokens=TOKENS)
    case.experts_of[:] = torch.tensor([1, 10, 11])
    factors = case.factors()
    case.run(case.x, factors).backward(case.upstream)
    for factor in factors.values():
        assert factor.grad_b is not None
        touched = factor.grad_b.flatten(2).abs().sum(2)  # (slots, experts)
        assert set(touched.sum(1).nonzero().flatten().tolist()) == {1, 10}
        assert set(touched.sum(0).nonzero().flatten().tolist()) == {1, 10, 11}


def test_a_nan_in_one_segment_stays_in_it() -> None:
    case = Case()
    case.x[7] = float("nan")
    factors = case.factors()
    y = case.run(case.x, factors)
    y.backward(case.upstream)
    assert torch.isfinite(y[:6]).all() and torch.isfinite(y[8:]).all() and torch.isnan(y[7]).all()
    for factor in factors.values():
        assert factor.grad_a is not None
        assert torch.isfinite(factor.grad_a[1]).all() and torch.isnan(factor.grad_a[10]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_grouped_product_and_the_loop_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where the loop is used, torch's grouped product is there too: sizes are multiples of 16 bytes."""
    torch.manual_seed(0)
    tokens, hidden, middle, rank = 24, 32, 16, 8
    base = ExpertWeights(
        torch.randn(EXPERTS, 2 * middle, hidden).to(dtype), torch.randn(EXPERTS, hidden, middle).to(dtype),
        torch.nn.functional.silu,
    )  # fmt: skip
    sizes = {"gate_proj": (middle, hidden), "up_proj": (middle, hidden), "down_proj": (hidden, middle)}
    pairs = {
        part: (torch.randn(2, EXPERTS, rank, i).to(dtype) * 0.1, torch.randn(2, EXPERTS, o, rank).to(dtype) * 0.1)
        for part, (o, i) in sizes.items()
    }
    experts_of = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(tokens)])
    weights_of, upstream = torch.rand(tokens, CHOSEN).to(dtype), torch.randn(tokens, hidden).to(dtype)
    x = torch.randn(tokens, hidden).to(dtype)
    found = []
    for grouped in (False, True):
        monkeypatch.setattr(experts, "can_group", lambda *_, grouped=grouped: grouped)
        factors = {p: Factors(a, b, torch.zeros(a.shape), torch.zeros(b.shape)) for p, (a, b) in pairs.items()}
        leaf = x.clone().requires_grad_()
        segments = (Segment(0, 0, 10, 2.0), Segment(1, 10, tokens, 0.5))
        y = slot_experts(leaf, experts_of, weights_of, base, factors, segments, ANCHOR)
        y.backward(upstream)
        found.append([y, leaf.grad, *(g for f in factors.values() for g in (f.grad_a, f.grad_b))])
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for loop, group in zip(*found, strict=True):
        assert loop is not None and group is not None
        largest = float(loop.detach().abs().max())
        assert largest > 0 and float((loop - group).abs().max()) <= tolerance * largest


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), tokens=st.integers(1, 9), cuts=st.lists(st.integers(0, 9), max_size=4))
def test_any_cut_into_segments_equals_the_formula(seed: int, tokens: int, cuts: list[int]) -> None:
    case = Case(seed, tokens)
    edges = sorted({min(cut, tokens) for cut in cuts})
    segments = [Segment(i, start, stop, 1.5) for i, (start, stop) in enumerate(pairwise(edges))]
    torch.testing.assert_close(
        case.run(case.x, case.factors(), segments), case.formula(case.x, case.a, case.b, segments)
    )


def test_the_same_rows_give_the_same_bits() -> None:
    case = Case()
    runs = []
    for _ in range(3):
        x, factors = case.x.clone().requires_grad_(), case.factors()
        y = case.run(x, factors)
        y.backward(case.upstream)
        runs.append([y, x.grad, *(g for f in factors.values() for g in (f.grad_a, f.grad_b))])
    for again in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], again, strict=True))
