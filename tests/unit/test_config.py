"""Typed TOML: what is read back, what is refused, and in which words."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from graftwork.config.load import build, dump, load, parse_toml
from graftwork.config.run import RunConfig, SubmitConfig
from graftwork.config.schema import RlConfig, ServeConfig, SftConfig, shares_gpu
from graftwork.errors import ConfigError

MODEL = {"model": {"path": "base"}}


def refusal(values: dict, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        build(RunConfig, {**MODEL, **values}, overrides, source="orch.toml")
    return str(caught.value)


def test_what_is_dumped_loads_to_an_equal_section() -> None:
    values = {**MODEL, "run": {"id": "a", "optimizer": {"schedule": "cosine", "decay_steps": 9}}}
    config = build(RlConfig, values, ("--run.seed", "3", "--lora.target_modules", '["q_proj"]'), source="x")
    assert (config.run.seed, config.lora.target_modules) == (3, ("q_proj",))
    assert build(RlConfig, parse_toml(dump(config).decode(), "x"), source="x") == config


def test_every_mistake_is_named_at_once_with_the_nearest_key() -> None:
    said = refusal({"optimizr": {}, "loss": {"ratio_mx": 1.0}, "max_steps": 0, "seed": "x"})
    for part in (
        "optimizr: no such key; did you mean optimizer?",
        "did you mean loss.ratio_max?",
        "max_steps:",
        "seed:",
    ):
        assert part in said
    assert said.startswith("orch.toml: ")


@pytest.mark.parametrize(
    "values",
    [
        {"loss": {"ratio_max": 1e39}},
        {"optimizer": {"learning_rate": 1e38}},
        {"optimizer": {"weight_decay": 1e300}},
        {"optimizer": {"learning_rate": float("nan")}},
        {"loss": {"kl_coefficient": float("inf")}},
        {"sampling": {"temperature": 1e-30}},
        {"adapter": {"alpha": 1e39}},
    ],
)
def test_numbers_that_fp32_cannot_work_with_are_refused(values: dict) -> None:
    assert "the configuration was refused" in refusal(values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"resume_step": 3}, "resume_step needs resume = true"),
        ({"lag_steps": 9}, "lag_steps is above max_staleness_steps"),
        ({"optimizer": {"schedule": "linear"}}, "decay_steps belongs to"),
        ({"loss": {"normaliser": "constant"}}, "constant_tokens belongs to"),
        ({"sampling": {"max_rounds": 2, "skip_equal_groups": False}}, "skip_equal_groups = true"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(values: dict, says: str) -> None:
    assert says in refusal(values)


FILE = {**MODEL, "environment": {"name": "reverse_text", "options": {"min_length": 3}}}


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (("--environment.options", '{"path": "q.jsonl"}'), {"path": "q.jsonl"}),
        (('--environment.options={"path": "q.jsonl"}',), {"path": "q.jsonl"}),
        (("--environment.options", "null", "--seed", "3"), {}),
        (("--environment", '{"name": "reverse_text", "options": {"path": "q.jsonl"}}'), {"path": "q.jsonl"}),
        ((), {"min_length": 3}),
    ],
)
def test_options_on_the_command_line_take_the_place_of_the_files(given: tuple[str, ...], options: dict) -> None:
    config = build(RunConfig, FILE, given, source="x")
    assert (config.environment.name, config.environment.options) == ("reverse_text", options)
    assert FILE["environment"]["options"] == {"min_length": 3}


@pytest.mark.parametrize(
    "given", ["{ path = 1 }", "[1]", "3", "", '{"path": null}', '{"a": NaN}', '{"a": [{"b": null}]}']
)
def test_options_that_are_no_json_object_are_refused(given: str) -> None:
    assert "--environment.options takes a JSON object" in refusal({}, ("--environment.options", given))


def test_one_option_alone_is_refused_with_the_way_to_write_it() -> None:
    said = refusal({}, ("--environment.options.scorer", "exact"))
    assert "options are given together: --environment.options '{\"scorer\": ...}'" in said


def test_a_dash_is_as_good_as_an_underscore() -> None:
    config = build(RunConfig, MODEL, ("--max-steps", "7", "--optimizer.learning-rate=1e-3"), source="x")
    assert (config.max_steps, config.optimizer.learning_rate) == (7, 1e-3)
    assert "--max-stepz is no setting; did you mean max_steps?" in refusal({}, ("--max-stepz", "3"))


def test_a_rank_above_the_slots_is_refused() -> None:
    values = {**MODEL, "lora": {"max_rank": 8}, "run": {"id": "a", "adapter": {"rank": 16}}}
    with pytest.raises(ConfigError, match=r"run\.adapter\.rank is 16, and lora\.max_rank 8"):
        build(RlConfig, values, source="x")


@pytest.mark.parametrize("text", ["seed = ", f"seed = {'9' * 5000}", "seed = 1\nseed = 2"])
def test_what_is_no_toml_is_a_config_error(text: str) -> None:
    with pytest.raises(ConfigError, match=r"x\.toml is not TOML"):
        parse_toml(text, "x.toml")


def undescribed(section: type[BaseModel]) -> list[str]:
    """Keys without help text; tables inside are looked into."""
    found = []
    for name, field in section.model_fields.items():
        inner = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        tables = [t for t in inner if issubclass(t, BaseModel)]
        if not tables and not field.description:
            found.append(f"{section.__name__}.{name}")
        found += [key for table in tables for key in undescribed(table)]
    return found


@pytest.mark.parametrize("section", [RlConfig, SftConfig, RunConfig])
def test_every_key_has_a_help_text(section: type[BaseModel]) -> None:
    assert undescribed(section) == []


# --- what examples/ has -----------------------------------------------------------------------------------------------

KINDS = {
    "sft": SftConfig, "serve": ServeConfig, "many_tenants": ServeConfig, "run": SubmitConfig, "tenant": SubmitConfig
}  # fmt: skip
EXAMPLES = sorted(Path("examples").glob("*/*.toml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=str)
def test_every_example_is_a_configuration(path: Path) -> None:
    load(KINDS.get(path.stem.rpartition(".")[2], RlConfig), path)


def test_there_are_examples_for_one_gpu_two_gpus_and_many_tenants() -> None:
    gpu = {
        path.stem: load(KINDS.get(path.stem.rpartition(".")[2], RlConfig), path)
        for path in EXAMPLES
        if path.parent.name == "gpu"
    }
    tenant, server = gpu.pop("tenant"), gpu["many_tenants"]
    assert tenant.adapter.rank <= server.lora.max_rank
    assert set(gpu) == {"one_gpu", "two_gpus", "many_tenants"}
    assert {name: shares_gpu(config.model, config.inference) for name, config in gpu.items()} == {
        "one_gpu": True, "two_gpus": False, "many_tenants": False
    }  # fmt: skip
