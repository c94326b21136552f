"""The environment `prompts`: rows with answers, splits that share nothing, scorers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from graftwork.errors import ConfigError
from graftwork.rollouts.environment import Answer, Environment, HasAnswers, Task, load_environment
from graftwork.rollouts.prompts import Prompts, hash_of

ROWS = [{"messages": [{"role": "user", "content": f"{i} + 1 ="}], "answer": str(i + 1), "level": i} for i in range(40)]


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return jsonl(tmp_path / "rows.jsonl", ROWS)


def half(task: Task, answer: Answer) -> float:
    return 0.5 * (answer.text in task.data["answer"]) + task.data["level"]


def questions(environment: Environment, split: Any, count: int, first: int = 0, seed: int = 0) -> list[str]:
    return [environment.task(seed, first + i, split).messages[-1]["content"] for i in range(count)]


def test_each_row_is_on_one_side_by_its_hash_and_comes_once_an_epoch(path: str) -> None:
    environment = load_environment("prompts", {"path": path, "heldout_one_in": 4})
    assert isinstance(environment, HasAnswers) and isinstance(environment, Prompts)
    heldout = {row["messages"][0]["content"] for row in ROWS if hash_of(row["messages"]) % 4 == 0}
    train = {row["messages"][0]["content"] for row in ROWS} - heldout
    assert 3 < len(heldout) < 20
    for split, expected in (("train", train), ("heldout", heldout)):
        first, second = (questions(environment, split, len(expected), i * len(expected)) for i in range(2))
        assert set(first) == set(second) == expected and first != second
        assert questions(environment, split, len(expected), seed=1) != first
    again = load_environment("prompts", {"path": path, "heldout_one_in": 4})
    assert questions(again, "train", 60) == questions(environment, "train", 60)


def test_a_question_stays_on_its_side_whatever_else_is_in_the_file(path: str, tmp_path: Path) -> None:
    """The rule is what files written today are judged by tomorrow: pinned."""
    fewer = jsonl(tmp_path / "fewer.jsonl", ROWS[::-2])
    one, two = Prompts(path=path), Prompts(path=fewer)
    assert {str(task) for task in two.tasks["heldout"]} < {str(task) for task in one.tasks["heldout"]}
    for message in ({"content": "é", "role": "user"}, {"role": "user", "content": "é"}):
        assert hash_of([message]) == 2380214381


def test_a_held_out_file_keeps_its_questions_out_of_training(path: str, tmp_path: Path) -> None:
    other = jsonl(tmp_path / "other.jsonl", [ROWS[3], {**ROWS[0], "messages": [{"role": "user", "content": "new"}]}])
    environment = Prompts(path=path, heldout_path=other)
    assert Counter(questions(environment, "heldout", 2)) == Counter(["3 + 1 =", "new"])
    assert len(environment.tasks["train"]) == 39 and "3 + 1 =" not in questions(environment, "train", 39)


def test_rows_of_a_dataset_and_its_held_out_split(tmp_path: Path) -> None:
    sets = {"train": datasets.Dataset.from_list(ROWS[:30]), "test": datasets.Dataset.from_list(ROWS[30:])}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "set")
    environment = load_environment("prompts", {"dataset": str(tmp_path / "set"), "heldout_split": "test"})
    assert sorted(questions(environment, "heldout", 10)) == sorted(row["messages"][0]["content"] for row in ROWS[30:])
    assert isinstance(environment, Prompts) and len(environment.tasks["train"]) == 30


def test_a_conversation_asks_up_to_its_last_answer(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "b"}]
    rows = [{"messages": [*talk, {"role": "assistant", "content": f"B{i}"}]} for i in range(2)]
    path = jsonl(tmp_path / "talks.jsonl", rows[:1])
    environment = Prompts(path=path, heldout_path=jsonl(tmp_path / "rows.jsonl", ROWS[:1]))
    task = environment.task(0, 0, "train")
    assert list(task.messages) == talk and environment.answer(task) == "B0"
    given = jsonl(tmp_path / "given.jsonl", [rows[1] | {"answer": "C"}])
    environment = Prompts(path=given, heldout_path=jsonl(tmp_path / "rows.jsonl", ROWS[:1]))
    assert environment.answer(environment.task(0, 0, "train")) == "C"


def test_scorers(path: str) -> None:
    exact = Prompts(path=path)
    task = exact.task(0, 0, "train")
    right = exact.answer(task)
    for text, reward in ((right, 1.0), (f" {right}\n", 1.0), (right + "0", 0.0), ("", 0.0)):
        assert exact.score(task, Answer(text, (1,), "stop")) == reward
    own = Prompts(path=path, scorer="test_prompts:half")
    task = own.task(0, 0, "train")
    assert own.score(task, Answer(task.data["answer"], (1,), "stop")) == 0.5 + task.data["level"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"path": None}, "give one of path"),
        ({"dataset": "x"}, "give one of path"),
        ({"heldout_path": "x", "heldout_split": "y"}, "not both"),
        ({"heldout_split": "test"}, "heldout_split is a split of a dataset"),
        ({"heldout_one_in": 1}, "no whole number above 1"),
        ({"heldout_one_in": 10**9}, "none of 40 rows of .* is for 'heldout'"),
        ({"scorer": "f1"}, "scorer 'f1': expected module:function"),
        ({"scorer": "test_prompts:halve"}, "scorer .*no function or class 'halve'; did you mean 'half'"),
        ({"messages_column": "chat"}, r"rows\.jsonl, line 1: expected chat ="),
        ({"answer_column": "right"}, r"rows\.jsonl, line 1: expected a question in messages, and right"),
        ({"heldout": "x"}, "no option 'heldout'"),
    ],
)
def test_what_is_wrong_is_named(path: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_environment("prompts", {"path": path, **options})
