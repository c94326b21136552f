"""Names of tensors, there and back, for every module of dense and of mixture-of-experts bases."""

from __future__ import annotations

from pathlib import Path

import pytest

from graftwork.adapters.names import TensorName, is_expert_stack, key_of, match_paths, numbered_name, peft_name
from graftwork.config.section import LoraConfig
from graftwork.model.base import slot_spec
from proofs.adapter_models import CONFIGS, make_base

PREFIXES = ("base_model.model.", "base_model.model.base_model.model.", "", "language_model.", "model.language_model.")


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def paths(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, ...]]:
    """Every module of a base that can carry a slot, with its shape."""
    base: Path = make_base(request.param, tmp_path_factory.mktemp("names"))
    return dict(slot_spec(str(base), LoraConfig()).shapes)


def parsed(name: str) -> TensorName:
    found = TensorName.parse(name)
    assert found is not None, name
    return found


def test_every_module_goes_out_and_comes_back(paths: dict[str, tuple[int, ...]]) -> None:
    assert len(paths) >= 8
    for path, shape in paths.items():
        experts = range(shape[0]) if is_expert_stack(path) else (None,)
        assert is_expert_stack(path) == (len(shape) == 3)
        for side in ("A", "B"):
            for expert in experts:
                name = parsed(peft_name(path, side, expert))  # type: ignore[arg-type]
                assert (name.path, name.side, name.expert, name.adapter) == (path, side, expert, None)
            name = parsed(numbered_name(path, side))  # type: ignore[arg-type]
            assert (name.path, name.side, name.layout) == (path, side, "stacked" if len(shape) == 3 else "dense")


def test_names_of_different_modules_and_experts_differ(paths: dict[str, tuple[int, ...]]) -> None:
    names = [
        peft_name(path, side, expert)  # type: ignore[arg-type]
        for path, shape in paths.items()
        for side in ("A", "B")
        for expert in (range(shape[0]) if len(shape) == 3 else (None,))
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("adapter", ["", ".default", ".policy_2"])
def test_every_prefix_and_adapter_name_means_the_same(
    paths: dict[str, tuple[int, ...]], prefix: str, adapter: str
) -> None:
    for path in paths:
        bare = path.removeprefix("model.") if prefix == "model.language_model." else path
        name = parsed(f"{prefix}{bare}.lora_A{adapter}.weight")
        assert (name.path, name.adapter) == (path, adapter.removeprefix(".") or None)


def test_a_path_without_model_in_front_finds_its_module(paths: dict[str, tuple[int, ...]]) -> None:
    short = [path.removeprefix("model.") for path in paths]
    assert match_paths(short, paths) == dict(zip(short, paths, strict=True))


def test_two_modules_with_one_key_are_matched_by_their_whole_names_only() -> None:
    known = ["model.layers.0.q_proj", "layers.0.q_proj"]
    assert key_of(known[0]) == key_of(known[1])
    assert match_paths([*known, "language_model.model.layers.0.q_proj"], known) == dict(zip(known, known, strict=True))


@pytest.mark.parametrize(
    ("name", "path", "layout", "expert"),
    [
        ("x.mlp.experts.10.up_proj.lora_B.weight", "x.mlp.experts.up_proj", "expert", 10),
        ("x.mlp.experts.1.w3.lora_B.weight", "x.mlp.experts.up_proj", "expert", 1),
        ("x.mlp.experts.w2_lora_A", "x.mlp.experts.down_proj", "stacked", None),
        ("x.mlp.experts.gate_up_proj.lora_A", "x.mlp.experts.gate_up_proj", "stacked", None),
        ("x.mlp.experts.base_layer.lora_A.weight", "x.mlp.experts", "flat inner", None),
        ("x.mlp.experts.lora_A.default.weight", "x.mlp.experts", "flat outer", None),
        ("x.mlp.shared_expert.up_proj.lora_A.weight", "x.mlp.shared_expert.up_proj", "dense", None),
    ],
)
def test_layouts_of_experts(name: str, path: str, layout: str, expert: int | None) -> None:
    found = parsed(name)
    assert (found.path, found.layout, found.expert) == (path, layout, expert)


@pytest.mark.parametrize(
    "name",
    ["lm_head.weight", "x.q_proj.lora_B.bias", "x.q_proj.base_layer.lora_A.weight", "x..y.lora_A.weight",
     "lora_A.weight", "x/y.lora_A.weight", "x.lora_embedding_A", "x.lora_magnitude_vector", ""],
)  # fmt: skip
def test_what_is_no_factor_of_a_module_has_no_name_here(name: str) -> None:
    assert TensorName.parse(name) is None
