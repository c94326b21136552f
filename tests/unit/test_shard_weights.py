"""Which tensor of a base's files fills which of the model's, the trunk's one call, and the fingerprint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import random_adapter
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3Config, Gemma3TextConfig, Qwen3Config

from graftwork.adapters.prepare import PreparedInitAdapter
from graftwork.errors import ModelError
from graftwork.lora.linear import Segment
from graftwork.model.attention import Group, PackedPlan
from graftwork.model.base import Ask, BaseModel, Route
from graftwork.model.fingerprint import ARCHITECTURE
from graftwork.model.layers import decoder_layers
from graftwork.model.logprobs import token_logprobs
from graftwork.model.shard import refuse_unusual
from graftwork.model.trunk import Trunk
from graftwork.model.weights import Reader, Source, assign, find_files, stored_tensors
from proofs.adapter_models import SHAPE

FUSED = {"l.mlp.experts.gate_up_proj": (2, 6, 4), "l.mlp.experts.down_proj": (2, 4, 3)}
SINGLE = {
    f"l.mlp.experts.{expert}.{part}.weight": shape
    for expert in range(2)
    for part, shape in (("gate_proj", (3, 4)), ("up_proj", (3, 4)), ("down_proj", (4, 3)))
}


def saved(file: Path, shapes: dict[str, tuple[int, ...]], **changes: Any) -> Path:
    generator = torch.Generator().manual_seed(len(shapes))
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, **changes}, file)
    return file


def refused(call: Any, *arguments: Any) -> str:
    with pytest.raises(ModelError) as caught:
        call(*arguments)
    return str(caught.value)


# --- which fills which ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [FUSED, SINGLE], ids=["fused", "single"])
def test_experts_are_read_one_by_one_or_fused(tmp_path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    stored = stored_tensors([saved(tmp_path / "model.safetensors", shapes)])
    sources = assign(FUSED, {}, stored)
    with Reader(stored) as reader:
        for name, source in sources.items():
            found = torch.full(FUSED[name], torch.nan)
            assert reader.fill(found, source) is None
            if shapes is FUSED:
                assert torch.equal(found, reader.slices(name)[:])
                continue
            for expert in range(2):
                parts = ("gate_proj", "up_proj") if "gate" in name else ("down_proj",)
                each = [reader.slices(f"l.mlp.experts.{expert}.{part}.weight")[:] for part in parts]
                assert torch.equal(found[expert], torch.cat(each))


def test_numbers_come_in_the_dtype_of_the_base(tmp_path: Path) -> None:
    exact = torch.randn(5, 3)
    stored = stored_tensors([saved(tmp_path / "model.safetensors", {}, a=exact)])
    found = torch.empty(5, 3, dtype=torch.bfloat16)
    with Reader(stored) as reader:
        reader.fill(found, Source(("a",)))
    assert torch.equal(found, exact.bfloat16())


def test_tied_weights_are_in_the_files_under_either_name(tmp_path: Path) -> None:
    wanted, aliases = {"embed": (7, 2)}, {"embed": ["head"]}
    for names in (["embed"], ["head"], ["embed", "head"]):
        tensors = {name: torch.ones(7, 2) for name in names}
        stored = stored_tensors([saved(tmp_path / "-".join(names) / "model.safetensors", {}, **tensors)])
        source = assign(wanted, aliases, stored)["embed"]
        assert source == Source(tuple(names))
        with Reader(stored) as reader:
            assert reader.fill(torch.empty(7, 2), source) is None
    other = saved(tmp_path / "model.safetensors", {}, embed=torch.ones(7, 2), head=torch.zeros(7, 2))
    stored = stored_tensors([other])
    with Reader(stored) as reader:
        assert reader.fill(torch.empty(7, 2), assign(wanted, aliases, stored)["embed"]) == "head"


@pytest.mark.parametrize(
    ("drop", "add", "expected"),
    [
        ("a", {}, r"a \[2, 3\] is missing \(the first of 1\)$"),
        ("", {"b": (1,)}, r"b is no tensor of this model \(the first of 1\); base_placement"),
        ("a", {"b": (1,)}, r"a \[2, 3\] is missing .* and b is no tensor of this model .*; base_placement"),
        ("", {"a": (3, 2)}, r"a has shape \[3, 2\], expected \[2, 3\]"),
        ("l.mlp.experts.1.up_proj.weight", {}, r"1\.up_proj\.weight is missing, a part of l\.mlp\.experts\.gate_up_pr"),
        ("", {"l.mlp.experts.2.up_proj.weight": (3, 4)}, r"experts\.2\.up_proj\.weight is no tensor of this model"),
        ("", {"l.mlp.experts.0.down_proj.weight": (3, 4)}, r"0\.down_proj\.weight has shape \[3, 4\], expected \[4, 3"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, drop: str, add: dict[str, tuple[int, ...]], expected: str
) -> None:
    shapes = {**SINGLE, "a": (2, 3), "old.rotary_emb.inv_freq": (4,), **add}
    shapes.pop(drop, None)
    stored = stored_tensors([saved(tmp_path / "model.safetensors", shapes)])
    with pytest.raises(ModelError, match=rf"model\.safetensors: {expected}|model\.safetensors: .*{expected}"):
        assign({**FUSED, "a": (2, 3)}, {}, stored, [r"rotary_emb\.inv_freq"])


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    assert "found neither" in refused(find_files, str(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    assert "weight_map" in refused(find_files, str(tmp_path))
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    saved(tmp_path / "one.safetensors", {"a": (2,)})
    assert refused(find_files, str(tmp_path)) == f"{index} names two.safetensors, which is not there"
    saved(tmp_path / "two.safetensors", {"a": (2,)})
    files = find_files(str(tmp_path))
    assert [file.name for file in files] == ["one.safetensors", "two.safetensors"]
    assert "a is in one.safetensors too" in refused(stored_tensors, files)
    (tmp_path / "two.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert "two.safetensors: " in refused(stored_tensors, files)
    saved(tmp_path / "one.safetensors", {}, a=torch.zeros(2, dtype=torch.int32))
    assert "a is I32, expected one of" in refused(assign, {"a": (2,)}, {}, stored_tensors(files[:1]))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            DeepseekV3Config(**SHAPE, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=0),
            "e_score_correction_bias is kept in flo",
        ),
        (Gemma3TextConfig(**SHAPE), r"buffer model\.embed_tokens\.embed_scale, which no file has"),
        (Qwen3Config(**SHAPE, quantization_config={"quant_method": "fp8"}), "a quantized base cannot be cut"),
        (Qwen3Config(**SHAPE), None),
    ],
    ids=["kept", "buffer", "quantized", "fine"],
)
def test_bases_that_would_not_be_filled_are_refused_before_anything_is_read(config: Any, expected: str | None) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    trunk = Trunk(model.base_model, model.get_output_embeddings())
    if expected is None:
        refuse_unusual(model, trunk, "base")
        model.extra = torch.nn.Linear(2, 2)
        expected = "extra.weight is outside the decoder"
    with pytest.raises(ModelError, match=expected):
        refuse_unusual(model, trunk, "base")


# --- the trunk --------------------------------------------------------------------------------------------------------


def layout(base: BaseModel) -> tuple[tuple[Tensor, Tensor, PackedPlan, Route], Any]:
    """A call of 20 rows of two slots, and its bank."""
    bank = base.new_bank(2, gradients=True)
    for slot in range(2):
        adapter = random_adapter(base.spec.shapes, 4, seed=slot, scale=1.0)
        bank.write(slot, PreparedInitAdapter(adapter, 4, 4.0, "", {}))
    tokens = torch.randint(base.vocab_size, (20,), generator=torch.Generator().manual_seed(0))
    segments = [Segment(0, 0, 10, 1.0), Segment(1, 10, 20, 2.0)]
    return (tokens, torch.arange(10).repeat(2), PackedPlan([Group(0, 2, 10)]), Route(bank, segments)), bank


def test_asks_are_answered_from_the_last_hidden_states(tiny: BaseModel) -> None:
    call, bank = layout(tiny)
    tokens = call[0]
    asks = [
        Ask(torch.arange(0, 9), tokens[1:10], 1.0),
        Ask(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), 1.0),
        Ask(torch.tensor([12, 18]), tokens[[13, 19]], 0.5),
    ]
    found = tiny.logprobs(*call, asks, 4)
    torch.autograd.backward([logprobs.sum() for logprobs, _ in found])
    gradients = bank.gradients.clone()
    bank.gradients.zero_()
    hidden = tiny.hidden(*call)
    expected = [
        token_logprobs(hidden[ask.rows], tiny.head, ask.targets, temperature=ask.temperature, chunk=4) for ask in asks
    ]
    torch.autograd.backward([logprobs.sum() for logprobs, _ in expected])
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine[0], its[0]) and torch.equal(mine[1], its[1])
        assert len(mine[0]) == len(mine[1])
    assert gradients.any() and torch.equal(gradients, bank.gradients)


@pytest.mark.parametrize("with_segments", [False, True])
def test_an_ask_of_no_tokens_goes_backwards_through_all_layers(moe: BaseModel, with_segments: bool) -> None:
    """With or without a slot; and no slot's gradient changes by a bit."""
    (tokens, positions, plan, route), bank = layout(moe)
    bank.gradients.fill_(-0.5)
    segments = route.segments if with_segments else []
    none = torch.empty(0, dtype=torch.int64)
    seen: list[int] = []

    def watch(index: int) -> Any:
        def after_forward(_: Any, __: Any, output: Tensor) -> None:
            output.register_hook(lambda gradient: seen.append(index))

        return after_forward

    hooks = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(decoder_layers(moe.body))]
    [(logprobs, entropies)] = moe.logprobs(tokens, positions, plan, Route(bank, segments), [Ask(none, none, 1.0)], 4)
    logprobs.sum().backward()
    for hook in hooks:
        hook.remove()
    assert (len(logprobs), len(entropies)) == (0, 0)
    assert seen == [1, 0]
    assert (bank.gradients == -0.5).all()


# --- the fingerprint --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny", "moe"])
def test_the_fingerprint_is_that_of_evenly_spaced_elements(name: str, request: pytest.FixtureRequest) -> None:
    """As it has been since the first checkpoint that records one."""
    base: BaseModel = request.getfixturevalue(name)
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(f"{name}_path"), dtype=torch.bfloat16)
    digest = hashlib.sha256(json.dumps({key: getattr(model.config, key, None) for key in ARCHITECTURE}).encode())
    for path, tensor in sorted(model.state_dict().items()):
        sample = tensor.reshape(-1)[:: max(1, tensor.numel() // 4096)].contiguous()
        digest.update(f"{path} {list(tensor.shape)}\n".encode() + sample.view(torch.int16).numpy().tobytes())
    assert base.fingerprint == digest.hexdigest()
