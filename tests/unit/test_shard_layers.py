"""Layers that are computed again, or compiled, give the same numbers; and compiling happens once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import VOCAB, random_adapter
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from transformers import Qwen3Config, Qwen3ForCausalLM

import graftwork.model.base as base_module
from graftwork.adapters.prepare import PreparedInitAdapter
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.errors import ModelError
from graftwork.lora.linear import Segment
from graftwork.lora.slots import SlotBank
from graftwork.model.attention import Group, PackedPlan
from graftwork.model.base import Ask, BaseModel, Placement, Route, load_base
from graftwork.model.layers import compile_layers, decoder_layers
from proofs.adapter_models import SHAPE, make_base

LORA = LoraConfig(max_rank=4)


@pytest.fixture(scope="module", params=["qwen3", "moe"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    path = make_base(request.param, tmp_path_factory.mktemp("bases"))
    return ModelConfig(path=str(path), dtype="float32", device="cpu")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> CompileCounter:
    """Counts what `load_base` has compiled. It runs what was traced with torch's own kernels, in the same order."""
    counter = CompileCounter()
    monkeypatch.setattr(base_module, "compile_layers", partial(compile_layers, backend=counter))
    return counter


# --- micro-batches ----------------------------------------------------------------------------------------------------


def bank_of(base: BaseModel) -> SlotBank:
    """Three slots, of ranks 2 to 4."""
    bank = base.new_bank(3, gradients=True)
    for slot in range(3):
        add(bank, base, slot)
    return bank


def add(bank: SlotBank, base: BaseModel, slot: int) -> None:
    adapter = random_adapter(base.spec.shapes, slot + 2, seed=slot, scale=1.0)
    bank.write(slot, PreparedInitAdapter(adapter, slot + 2, float(slot + 2), "", {}))


def lay_out(lengths: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, PackedPlan]:
    """Tokens, positions and plan of groups (count, length)."""
    groups, start = [], 0
    for count, length in lengths:
        groups.append(Group(start, count, length))
        start += count * length
    tokens = torch.randint(VOCAB, (start,), generator=torch.Generator().manual_seed(start))
    positions = torch.cat([torch.arange(length).repeat(count) for count, length in lengths])
    return tokens, positions, PackedPlan(groups)


def learn(base: BaseModel, bank: SlotBank, lengths: Sequence[tuple[int, int]], segments: Sequence[Segment]) -> Tensor:
    """Log-probs of every second row [N]; gradients are added to the bank's."""
    tokens, positions, plan = lay_out(lengths)
    rows = torch.arange(0, len(tokens) - 1, 2)
    ask = Ask(rows, tokens[rows + 1], 1.0)
    logprobs, _ = base.logprobs(tokens, positions, plan, Route(bank, segments), [ask], 4)[0]
    if torch.is_grad_enabled():
        logprobs.sum().backward()
    return logprobs.detach()


TWO = [Segment(2, 0, 12, 1.5), Segment(0, 12, 23, 0.5)]
STEPS: list[tuple[Sequence[tuple[int, int]], Sequence[Segment]]] = [
    ([(2, 9)], [Segment(0, 0, 18, 1.0)]),
    ([(2, 6), (1, 11)], TWO),
    ([(3, 2), (1, 5), (4, 10)], [Segment(1, 6, 11, 0.25)]),
    ([(1, 7)], []),
]


def all_steps(base: BaseModel) -> tuple[list[Tensor], Tensor]:
    """Log-probs a step, and the gradients of all together."""
    bank = bank_of(base)
    found = [learn(base, bank, *step) for step in STEPS]
    assert bank.gradients is not None and base.routing.current is None
    return found, bank.gradients


# --- computing again --------------------------------------------------------------------------------------------------


def test_layers_that_are_computed_again_give_the_same_bits(config: ModelConfig) -> None:
    expected, gradients = all_steps(load_base(config, LORA))
    found, again = all_steps(load_base(config, LORA, Placement(activation_checkpointing=True)))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert gradients.any() and torch.equal(again, gradients)


def test_each_layer_is_computed_again_once_and_only_for_a_backward_pass(config: ModelConfig) -> None:
    base = load_base(config, LORA, Placement(activation_checkpointing=True))
    calls: list[str] = []
    for index, layer in enumerate(decoder_layers(base.body)):
        layer.get_submodule("self_attn").register_forward_pre_hook(lambda *_, index=index: calls.append(str(index)))
    bank = bank_of(base)
    with torch.no_grad():
        learn(base, bank, *STEPS[0])
    assert calls == ["0", "1"]
    calls.clear()
    learn(base, bank, *STEPS[0])
    assert calls == ["0", "1", "1", "0"]


def test_a_layer_is_computed_again_with_the_route_of_its_own_call(config: ModelConfig) -> None:
    """Two forward passes with different slots, then their backward passes, in either order."""
    whole = load_base(config, LORA)
    again = load_base(config, LORA, Placement(activation_checkpointing=True))
    gradients = []
    for base in (whole, again):
        bank = bank_of(base)
        tokens, positions, plan = lay_out([(2, 6)])
        ask = Ask(torch.arange(11), tokens[1:], 1.0)
        losses = []
        for slot in (0, 1):
            route = Route(bank, [Segment(slot, 0, 12, 1.0 + slot)])
            losses.append(base.logprobs(tokens, positions, plan, route, [ask], 8)[0][0].sum())
        for loss in losses:
            loss.backward()
        gradients.append(bank.gradients)
    assert torch.equal(*gradients)


def test_fewer_numbers_are_kept_for_the_backward_pass(config: ModelConfig) -> None:
    kept = []
    for placement in (Placement(), Placement(activation_checkpointing=True)):
        base = load_base(config, LORA, placement)
        bank, sizes = bank_of(base), []
        tokens, positions, plan = lay_out([(4, 20)])

        def note(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            base.hidden(tokens, positions, plan, Route(bank, [Segment(0, 0, 80, 1.0)]))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 3


# --- compiling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "again"), [("qwen3", True), ("moe", False)], indirect=["config"])
def test_another_run_and_another_length_compile_nothing(
    config: ModelConfig, counter: CompileCounter, again: bool
) -> None:
    """Nor do other ranks, scales, segments and groups, and a run that is admitted in between; and all numbers are those
    of layers that are not compiled."""
    base = load_base(config, LORA, Placement(compile_layers=True, activation_checkpointing=again))
    bank = base.new_bank(3, gradients=True)
    add(bank, base, 0)
    learn(base, bank, *STEPS[0])
    compiled = counter.frame_count
    assert compiled > 5
    with torch.compiler.set_stance("fail_on_recompile"):
        add(bank, base, 2)
        learn(base, bank, *STEPS[1])
        found, gradients = all_steps(base)
    assert counter.frame_count == compiled
    with torch.no_grad():
        learn(base, bank, *STEPS[0])
        compiled = counter.frame_count
        for step in STEPS:
            learn(base, bank, *step)
    assert counter.frame_count == compiled
    expected, plain = all_steps(load_base(config, LORA))
    assert all(torch.equal(*pair) for pair in (*zip(found, expected, strict=True), (gradients, plain)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_layers_compiled_backwards_too_give_the_same_numbers(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """To rounding: what is fused may round otherwise."""
    counter = CompileCounterWithBackend(backend)
    monkeypatch.setattr(base_module, "compile_layers", partial(compile_layers, backend=counter))
    expected, gradients = all_steps(load_base(config, LORA))
    base = load_base(config, LORA, Placement(compile_layers=True, activation_checkpointing=True))
    found, compiled = all_steps(base)
    frames = counter.frame_count
    assert frames > 5
    for pair in (*zip(found, expected, strict=True), (compiled, gradients)):
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        again, _ = all_steps(base)
    assert all(torch.equal(*pair) for pair in zip(again, found, strict=True))


def test_layers_of_a_kind_are_compiled_together(tmp_path: Path, counter: CompileCounter) -> None:
    """Ten more layers cost nothing: nothing in what is compiled is one layer's own."""
    counts = []
    for layers in (2, 12):
        path = tmp_path / str(layers)
        Qwen3ForCausalLM(Qwen3Config(**{**SHAPE, "num_hidden_layers": layers}, head_dim=16)).save_pretrained(path)
        config = ModelConfig(path=str(path), dtype="float32", device="cpu")
        base = load_base(config, LORA, Placement(compile_layers=True))
        learn(base, bank_of(base), *STEPS[0])
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


def test_an_architecture_without_a_list_of_layers_is_refused() -> None:
    steps: Sequence[Callable[[Any], Any]] = (decoder_layers, compile_layers)
    for step in steps:
        with pytest.raises(ModelError, match="Linear has no list of decoder layers"):
            step(nn.Linear(2, 2))
