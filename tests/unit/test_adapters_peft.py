"""The PEFT reader and writer. The oracle is PEFT itself: same base, same tokens, compare logits."""

from __future__ import annotations

import copy
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from support import VOCAB, random_adapter
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from graftwork.adapters.canonical import Adapter, LoraPair, alpha_for
from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.source import AdapterFacts
from graftwork.errors import UnsupportedAdapter

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(24).reshape(2, 12) % VOCAB


def base_at(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def put(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def merged(base: PreTrainedModel, adapter: Adapter) -> Tensor:
    """Logits of the base with  W + scale B A  in place of W: the definition, written out."""
    model = copy.deepcopy(base)
    for path, pair in adapter.pairs.items():
        weight = model.get_submodule(path).weight
        weight.data += pair.scale * (pair.b.float() @ pair.a.float())
    return logits(model)


def trained_by_peft(base: PreTrainedModel, **settings: Any) -> PeftModel:
    """A PEFT model whose B is not zero any more."""
    torch.manual_seed(1)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ALL},
        {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "use_rslora": True},
        {"r": 8, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
        {"r": 2, "lora_alpha": 7, "target_modules": ["down_proj"], "layers_to_transform": [1]},
        {"r": 2, "lora_alpha": 2, "target_modules": r".*layers\.0\..*_proj", "init_lora_weights": "gaussian"},
        {"r": 2, "lora_alpha": 6, "target_modules": ["o_proj"], "init_lora_weights": "orthogonal"},
    ],
    ids=["all", "rslora", "attention", "one layer", "regex", "orthogonal"],
)
def test_what_peft_saved_computes_the_same_function(tiny_path: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    base = base_at(tiny_path)
    model = trained_by_peft(base, **settings)
    model.save_pretrained(tmp_path / "saved")
    found = read_peft(tmp_path / "saved")
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 0.05
    torch.testing.assert_close(merged(base, found.adapter), expected, atol=2e-4, rtol=1e-4)
    assert found.facts.base_model == str(tiny_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rank", "alpha", "paths"),
    [
        (4, 8.0, [f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ("q_proj", "v_proj")]),
        (3, 32.1, ["model.layers.1.mlp.down_proj"]),
        (1, 1.0, ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]),
    ],
    ids=["both layers", "one module", "mixed"],
)
def test_what_we_write_is_loaded_by_peft_whole_and_computes_the_same_function(
    tiny_path: Path, tmp_path: Path, dtype: torch.dtype, rank: int, alpha: float, paths: list[str]
) -> None:
    base = base_at(tiny_path)
    shapes = {path: tuple(base.get_submodule(path).weight.shape) for path in paths}
    adapter = random_adapter(shapes, rank, scale=alpha / rank, size=0.3)
    cast = {k: LoraPair(p.a.to(dtype), p.b.to(dtype), p.scale) for k, p in adapter.pairs.items()}
    folder = put(tmp_path / "ours", write_peft(Adapter(cast), AdapterFacts(str(tiny_path))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    loaded = model.load_adapter(folder, "again")
    assert not loaded.missing_keys and not loaded.unexpected_keys
    wrapped = {n.rsplit(".lora_A", 1)[0] for n, _ in model.named_parameters() if ".lora_A.default" in n}
    assert wrapped == {f"base_model.model.{path}" for path in paths}
    torch.testing.assert_close(logits(model), merged(base, Adapter(cast)), atol=2e-4, rtol=1e-4)


def test_peft_and_back_gives_the_same_digest(tiny_path: Path, tmp_path: Path) -> None:
    base = base_at(tiny_path)
    adapter = random_adapter({"model.layers.0.mlp.up_proj": (48, 32)}, 4, scale=32.1 / 4)
    folder = put(tmp_path / "ours", write_peft(adapter, AdapterFacts(str(tiny_path))))
    PeftModel.from_pretrained(base, folder).save_pretrained(tmp_path / "theirs")
    assert read_peft(tmp_path / "theirs").adapter.digest() == adapter.digest()


def test_the_named_adapter_of_an_older_file_is_read(tmp_path: Path) -> None:
    adapter = random_adapter({"x.q_proj": (6, 8)}, 2)
    files = write_peft(adapter, AdapterFacts())
    tensors = load_safetensors(files["adapter_model.safetensors"])
    for name in ("default", "policy"):
        renamed = {key.replace(".weight", f".{name}.weight"): tensor for key, tensor in tensors.items()}
        files["adapter_model.safetensors"] = save_safetensors(renamed)
        assert read_peft(put(tmp_path / name, files)).adapter.digest() == adapter.digest()


def test_the_bytes_are_a_function_of_the_adapter_and_its_facts() -> None:
    adapter = random_adapter({f"layer.{i}.q_proj": (6, 8) for i in range(12)}, 2)
    shuffled = Adapter(dict(reversed(adapter.pairs.items())))
    facts = AdapterFacts("base", "ab" * 32)
    assert write_peft(adapter, facts) == write_peft(shuffled, facts)
    assert write_peft(adapter, facts) != write_peft(adapter, AdapterFacts("other", "ab" * 32))


def test_the_safetensors_library_reads_our_file() -> None:
    adapter = random_adapter({"x.q_proj": (6, 8)}, 3)
    pair = adapter.pairs["x.q_proj"]
    mixed = Adapter({"x.q_proj": LoraPair(pair.a.to(torch.bfloat16), pair.b, pair.scale)})
    tensors = load_safetensors(write_peft(mixed, AdapterFacts())["adapter_model.safetensors"])
    assert torch.equal(tensors["base_model.model.x.q_proj.lora_A.weight"], pair.a.to(torch.bfloat16))
    assert torch.equal(tensors["base_model.model.x.q_proj.lora_B.weight"], pair.b)


def test_the_configuration_is_what_vllm_expects() -> None:
    adapter = random_adapter({"b.q_proj": (6, 8), "a.k_proj": (6, 8)}, 2, scale=8.0)
    config = json.loads(write_peft(adapter, AdapterFacts("base"))["adapter_config.json"])
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("LORA", "CAUSAL_LM", True)
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 16, "base")
    assert isinstance(config["lora_alpha"], int)
    assert config["target_modules"] == ["a.k_proj", "b.q_proj"]


@pytest.mark.parametrize(("rank", "scale"), [(3, 1.0), (2, 3.0), (5, 7 / math.sqrt(5))])
def test_pairs_of_another_rank_or_scale_are_written_as_patterns(tmp_path: Path, rank: int, scale: float) -> None:
    one = random_adapter({"x.q_proj": (6, 8), "y.q_proj": (6, 8)}, 2, scale=1.0)
    other = random_adapter({"x.v_proj": (6, 8)}, rank, scale=scale)
    adapter = Adapter({**one.pairs, **other.pairs})
    assert (
        read_peft(put(tmp_path / "adapter", write_peft(adapter, AdapterFacts()))).adapter.digest() == adapter.digest()
    )


def test_single_experts_of_another_rank_and_scale_are_brought_to_one(tmp_path: Path) -> None:
    """PEFT fuses them by r and lora_alpha alone: the file has no patterns for them, and the function stays."""
    gate = random_adapter({"x.experts.gate_proj": (12, 6, 8)}, 2, scale=8.0)
    up = random_adapter({"x.experts.up_proj": (12, 6, 8), "x.experts.down_proj": (12, 8, 6)}, 3, scale=0.5)
    attention = random_adapter({"x.q_proj": (6, 8)}, 4, scale=3.0)
    adapter = Adapter({**gate.pairs, **up.pairs, **attention.pairs})
    folder = put(tmp_path / "adapter", write_peft(adapter, AdapterFacts()))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert list(config["rank_pattern"]) == list(config["alpha_pattern"]) == ["x.q_proj"]
    found = read_peft(folder).adapter.pairs
    for path, pair in adapter.pairs.items():
        assert found[path].rank == (4 if path == "x.q_proj" else 3)
        expected = pair.scale * pair.b.double() @ pair.a.double()
        torch.testing.assert_close(found[path].scale * found[path].b.double() @ found[path].a.double(), expected)


@pytest.mark.parametrize("key", ["q.proj", "self.attn.q_proj"])
def test_a_dot_of_alpha_pattern_that_peft_takes_for_any_character_is_refused(tmp_path: Path, key: str) -> None:
    files = write_peft(random_adapter({"x.self_attn.q_proj": (6, 8)}, 2), AdapterFacts())
    for pattern, refused in (({key: 64}, True), ({"k_proj": 64, "other.q_proj": 3}, False)):
        config = {**json.loads(files["adapter_config.json"]), "alpha_pattern": pattern}
        folder = put(tmp_path / str(refused), {**files, "adapter_config.json": json.dumps(config).encode()})
        if refused:
            with pytest.raises(UnsupportedAdapter, match="a dot stands for any character"):
                read_peft(folder)
        else:
            assert "alpha_pattern names 'k_proj', 'other.q_proj'" in "".join(read_peft(folder).notes)


def test_facts_and_notes_are_read_back(tmp_path: Path) -> None:
    files = write_peft(random_adapter({"x.q_proj": (6, 8)}, 2), AdapterFacts("base", "cd" * 32))
    config = {**json.loads(files["adapter_config.json"]), "lora_dropout": 0.1, "use_rslora": True}
    files["adapter_config.json"] = json.dumps(config).encode()
    found = read_peft(put(tmp_path / "adapter", {**files, "chat_template.jinja": b"x"}))
    assert found.facts == AdapterFacts("base", "cd" * 32)
    assert len(found.notes) == 2
    assert [pair.scale for pair in found.adapter.pairs.values()] == [4 / math.sqrt(2)]


def test_alpha_for_gives_back_the_alpha_that_a_person_wrote() -> None:
    for alpha in (32.1, 16.0, 0.3, 7.0, 1e-3, 27.7128129211):
        for rank in (1, 3, 7, 8, 12, 100):
            assert alpha_for(alpha / rank, rank) == alpha


def test_alpha_for_says_so_when_no_float_does() -> None:
    """Just below 1 the quotients by 3 of neighbouring floats lie further apart than floats do."""
    scales = [1.0 - k * 2**-53 for k in range(1, 20)]
    found = [alpha_for(scale, 3) for scale in scales]
    assert None in found
    assert all(alpha is None or alpha / 3 == scale for alpha, scale in zip(found, scales, strict=True))
