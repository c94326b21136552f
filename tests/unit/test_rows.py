"""Conversations and prompts from JSONL and from `datasets`, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from graftwork.config.load import build
from graftwork.config.schema import SftConfig
from graftwork.errors import ConfigError
from graftwork.rollouts.rows import dataset_rows, jsonl_rows, messages_of
from graftwork.training.sft_data import conversations

TALKS = [
    [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "A"},
    ],
    [{"role": "user", "content": "b"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "c"}],
    [{"role": "user", "content": "d\u2028e"}, {"role": "assistant", "content": "D"}],
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def saved(tmp_path: Path, kind: str, column: str = "messages") -> dict[str, str]:
    """The settings that name TALKS, stored in this way."""
    rows = [{column: talk} for talk in TALKS]
    made = datasets.Dataset.from_list(rows)
    place = tmp_path / kind
    if kind == "path":
        return {"path": str(write_jsonl(place / "talks.jsonl", rows))}
    if kind == "file":
        return {"dataset": str(write_jsonl(place / "talks.jsonl", rows))}
    if kind == "parquet folder":
        place.mkdir()
        made.to_parquet(place / "train.parquet")
    elif kind == "saved":
        made.save_to_disk(place)
    else:
        datasets.DatasetDict({"train": made, "other": made.select([1])}).save_to_disk(place)
    return {"dataset": str(place)}


def sft(**data: object) -> SftConfig:
    return build(SftConfig, {"model": {"path": "m"}, "batch_size": 3, "data": data}, source="x.toml")


@pytest.mark.parametrize("kind", ["path", "file", "parquet folder", "saved", "saved with splits"])
def test_every_kind_of_source_holds_the_same_conversations(tmp_path: Path, kind: str) -> None:
    expected = conversations(sft(**saved(tmp_path / "first", "path")))
    found = conversations(sft(messages_column="talk", **saved(tmp_path, kind, "talk")))
    for step in range(1, 7):
        assert found(step) == expected(step)
        assert sorted(map(str, found(step))) == sorted(map(str, TALKS)), "three rows, three a step: an epoch"
    assert len({str(found(step)) for step in range(1, 7)}) > 1, "epochs have orders of their own"


def test_a_split_is_taken_and_a_missing_one_named(tmp_path: Path) -> None:
    name = saved(tmp_path, "saved with splits")["dataset"]
    assert [row.columns["messages"] for row in dataset_rows(name, "other")] == [TALKS[1]]
    with pytest.raises(ConfigError, match=r"split 'test': cannot be read .*its splits are train, other"):
        dataset_rows(name, "test")
    with pytest.raises(ConfigError, match="was saved without splits"):
        dataset_rows(saved(tmp_path, "saved")["dataset"], "test")
    with pytest.raises(ConfigError, match="split 'test': cannot be read"):
        dataset_rows(saved(tmp_path, "file")["dataset"], "test")


def test_null_fields_that_tables_add_do_not_reach_the_template(tmp_path: Path) -> None:
    talks = [[{"role": "user", "content": "a", "name": "Ann"}], [{"role": "user", "content": "b"}]]
    datasets.Dataset.from_list([{"messages": talk} for talk in talks]).save_to_disk(tmp_path / "set")
    assert [messages_of(row, "messages") for row in dataset_rows(str(tmp_path / "set"), "train")] == talks


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", r"x\.jsonl, line 2: expected a JSON object"),
        ("[]", r"x\.jsonl, line 2: expected a JSON object, found a list"),
        ("{}", r"x\.jsonl, line 2: expected messages ="),
        ('{"messages": []}', "line 2: expected messages ="),
        ('{"messages": [{"role": "assistant"}]}', "line 2: expected messages ="),
        ('{"messages": [{"role": "assistant", "content": 3}]}', "line 2: expected messages ="),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2: no message of messages is the assistant's"),
    ],
)
def test_a_row_that_is_no_conversation_is_refused_by_its_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": TALKS[0]}) + "\n" + text + "\n")
    with pytest.raises(ConfigError, match=says):
        conversations(sft(path=str(path)))


def test_sources_that_are_not_there_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        jsonl_rows(tmp_path / "x.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="holds no row"):
        jsonl_rows(tmp_path / "empty.jsonl")
    (tmp_path / "x.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"expected a file of \.jsonl"):
        dataset_rows(str(tmp_path / "x.txt"), "train")
    with pytest.raises(ConfigError, match="revision belongs to a dataset of the hub"):
        dataset_rows(str(tmp_path / "x.txt"), "train", "main")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'graftwork\[datasets\]'"):
        dataset_rows("x", "train")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"path": "a", "dataset": "b"}, "give one of"),
        ({"dataset": "b", "environment": {"name": "reverse_text"}}, "give one of"),
        ({"environment": None}, "give one of"),
        ({"path": "a", "split": "test"}, "belong to data.dataset"),
    ],
)
def test_settings_that_name_two_sources_or_none_are_refused(data: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        sft(**data)


def test_reading_a_dataset_loads_no_torch(tmp_path: Path) -> None:
    """The orchestrator reads prompts, and is torch-free."""
    name = saved(tmp_path, "saved")["dataset"]
    code = f"import sys; from graftwork.rollouts.rows import dataset_rows; dataset_rows({name!r}, 'train')"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=True)
