"""Which modules of a base carry slots, and what is said of those that cannot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM, Phi3Config, Phi3ForCausalLM

from graftwork.adapters.names import siblings
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.errors import ModelError
from graftwork.lora.linear import Frozen, slot_linears
from graftwork.model.attention import Group, PackedPlan
from graftwork.model.base import load_base, pick_device, slot_spec
from graftwork.model.inject import Route, Routing, inject
from graftwork.model.layers import compile_layers
from proofs.adapter_models import CONFIGS, EXPERTS, HIDDEN, MIDDLE, SHAPE, make_base


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_base(name, folder) for name in CONFIGS}


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("qwen3", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        ("llama", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
        ("phi3", "down_proj gate_up_proj o_proj qkv_proj"),
        ("moe", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"),
    ],
)
def test_all_linear_is_every_linear_layer_but_the_head(bases: dict[str, Path], name: str, leaves: str) -> None:
    spec = slot_spec(str(bases[name]), LoraConfig())
    assert " ".join(sorted({path.rpartition(".")[2] for path in spec.shapes})) == leaves
    assert len(spec.shapes) == 2 * len(leaves.split())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_slots_are_known_from_the_configuration_alone(bases: dict[str, Path], name: str) -> None:
    for targets in (("all-linear",), ("down_proj",)):
        lora = LoraConfig(max_rank=3, target_modules=targets)
        loaded = load_base(ModelConfig(path=str(bases[name]), dtype="float32", device="cpu"), lora)
        assert slot_spec(str(bases[name]), lora) == loaded.spec


def test_experts_are_targets_by_the_names_of_a_dense_mlp(bases: dict[str, Path]) -> None:
    shapes = slot_spec(str(bases["moe"]), LoraConfig(target_modules=("q_proj", "up_proj"))).shapes
    assert shapes["model.layers.0.mlp.experts.up_proj"] == (EXPERTS, MIDDLE, HIDDEN)
    assert {path.rpartition(".")[2] for path in shapes} == {"q_proj", "up_proj"}


def test_a_name_that_no_module_has_is_refused_with_those_that_there_are(bases: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match=r"no linear layer named qkv_proj that can.* it has .*gate_proj.*q_proj"):
        slot_spec(str(bases["moe"]), LoraConfig(target_modules=("qkv_proj", "q_proj")))


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "down_proj")])
def test_experts_of_another_kind_are_refused_by_name_when_they_are_targets(targets: tuple[str, ...]) -> None:
    """gpt-oss: transposed, interleaved, with biases, another gate."""
    config = GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, head_dim=16)
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts \(GptOssExperts\).*target_modules"):
        inject(model, targets, Routing())
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    assert len(inject(model, ("q_proj",), Routing())) == 2


def test_other_models_with_experts_of_this_kind_carry_them() -> None:
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2))
    assert inject(model, ("down_proj",), Routing())["model.layers.1.mlp.experts.down_proj"] == (4, HIDDEN, 48)


def test_experts_that_are_modules_of_their_own_are_refused_by_name() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(
                torch.nn.ModuleDict({"up_proj": torch.nn.Linear(4, 4)}) for _ in range(2)
            )

        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(ModelError, match=r"experts\.0\.up_proj: .*module of its own"):
        inject(Layer(), ("all-linear",), Routing())


def test_sequences_stay_within_what_a_plain_causal_pass_computes(tmp_path: Path) -> None:
    """A sliding window and rescaled positions change nothing for sequences that are short enough."""
    for name, changes in {
        "window": {"sliding_window": 40},
        "long": {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            },
        },
    }.items():  # fmt: skip
        model = Phi3ForCausalLM(Phi3Config(**SHAPE, **changes, pad_token_id=0, bos_token_id=1, eos_token_id=2))
        model.save_pretrained(tmp_path / name)
        base = load_base(ModelConfig(path=str(tmp_path / name), dtype="float32", device="cpu"), LoraConfig())
        assert base.max_positions == {"window": 40, "long": 64}[name]


# --- layers with the same input ---------------------------------------------------------------------------------------


def test_siblings_are_found_by_name_and_input() -> None:
    shapes = {
        "a.q_proj": (8, 4), "a.k_proj": (2, 4), "a.v_proj": (2, 4), "a.o_proj": (4, 8), "b.gate_proj": (6, 4),
        "b.up_proj": (6, 5), "c.k_proj": (2, 4), "d.experts.gate_proj": (3, 6, 4), "d.experts.up_proj": (3, 6, 4),
    }  # fmt: skip
    assert siblings(shapes) == [
        ("a.q_proj", "a.k_proj", "a.v_proj"), ("a.o_proj",), ("b.gate_proj",), ("b.up_proj",), ("c.k_proj",)
    ]  # fmt: skip


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_layers_with_the_same_input_are_computed_once(
    tiny_model_config: ModelConfig, monkeypatch: pytest.MonkeyPatch, backend: str | None
) -> None:
    """A layer of Qwen3 has four of them: q, k, v; o; gate, up; down. Also where what is between them is compiled."""
    calls: list[int] = []

    def counting(x: torch.Tensor, layers: Sequence[Frozen], *rest: Any) -> tuple[torch.Tensor, ...]:
        calls.append(len(layers))
        return slot_linears(x, layers, *rest)

    base = load_base(tiny_model_config, LoraConfig(max_rank=4))
    if backend is not None:
        compile_layers(base.trunk.body, backend)
    monkeypatch.setattr("graftwork.model.inject.slot_linears", counting)
    tokens, bank = torch.arange(6), base.new_bank(1, gradients=False)
    base.hidden(tokens, tokens, PackedPlan([Group(0, 1, 6)]), Route(bank, ()))
    assert calls == [3, 1, 2, 1] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_in_a_line() -> None:
    with pytest.raises(ModelError, match=r'model\.device = "cuda:0": torch .* sees no GPU here'):
        pick_device("cuda:0")
