"""Prompts with answers from a file or a dataset, one question each.

A row has `messages` (what the model is asked) and `answer` (what the scorer compares with). Where the last message is
the assistant's it is no part of the question; in a row without `answer` it is the answer. So what `graftwork sft`
learns from can be asked here.

Held out is a row whose messages hash to 0: `sha256(messages as compact JSON with sorted keys)`, its first four bytes
as a big-endian number, modulo `heldout_one_in`. So a question is on one side for good, however the rows are ordered or
added to. With `heldout_path` or `heldout_split` that file's (split's) rows are held out instead, and a row of the other
one that asks the same is not trained on.

Tasks are the rows in an order drawn by (seed, split, epoch); after the last one the next epoch begins.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from graftwork.errors import ConfigError
from graftwork.rollouts.environment import Answer, Message, SingleTurn, Split, Task, named
from graftwork.rollouts.rows import Row, dataset_rows, jsonl_rows, messages_of

log = logging.getLogger(__name__)


class Prompts(SingleTurn):
    """Options: path (JSONL) or dataset, and with the latter split and revision; heldout_path or heldout_split;
    messages_column, answer_column; scorer ("exact", or module:function); heldout_one_in."""

    def __init__(
        self,
        path: str | None = None,
        dataset: str | None = None,
        split: str | None = None,
        revision: str | None = None,
        heldout_path: str | None = None,
        heldout_split: str | None = None,
        messages_column: str = "messages",
        answer_column: str = "answer",
        scorer: str = "exact",
        heldout_one_in: int = 5,
    ) -> None:
        """Raises ConfigError, naming the option, or the file and the row."""
        if (path is None) == (dataset is None):
            raise ConfigError("environment prompts: give one of path (a JSONL file) and dataset")
        if path is not None and (split, revision) != (None, None):
            raise ConfigError("environment prompts: split and revision belong to a dataset, and path is a file")
        if heldout_path is not None and heldout_split is not None:
            raise ConfigError("environment prompts: give heldout_path or heldout_split, not both")
        if heldout_split is not None and dataset is None:
            raise ConfigError(
                "environment prompts: heldout_split is a split of a dataset; for a file give heldout_path"
            )
        if not isinstance(heldout_one_in, int) or heldout_one_in < 2:
            raise ConfigError(f"environment prompts: heldout_one_in = {heldout_one_in!r} is no whole number above 1")
        self.scorer = exact if scorer == "exact" else named("scorer", scorer)
        columns = (messages_column, answer_column)
        rows = jsonl_rows(Path(path)) if path is not None else dataset_rows(str(dataset), split or "train", revision)
        tasks = [_task(row, *columns) for row in rows]
        if heldout_path is None and heldout_split is None:
            heldout = [task for task in tasks if hash_of(task.messages) % heldout_one_in == 0]
        else:
            rows = (
                jsonl_rows(Path(heldout_path)) if heldout_path is not None
                else dataset_rows(str(dataset), str(heldout_split), revision)
            )  # fmt: skip
            heldout = [_task(row, *columns) for row in rows]
        asked = {hash_of(task.messages) for task in heldout}
        self.tasks: dict[Split, list[Task]] = {
            "train": [task for task in tasks if hash_of(task.messages) not in asked],
            "heldout": heldout,
        }
        for name, found in self.tasks.items():
            if not found:
                raise ConfigError(
                    f"environment prompts: none of {len(tasks)} rows of {path or dataset} is for {name!r}"
                )
        log.info("prompts: %d to train on, %d held out", len(self.tasks["train"]), len(heldout))

    def task(self, seed: int, index: int, split: Split) -> Task:
        tasks = self.tasks[split]
        epoch, place = divmod(index, len(tasks))
        return tasks[_order(seed, split, epoch, len(tasks))[place]]

    def score(self, task: Task, answer: Answer) -> float:
        return self.scorer(task, answer)

    def answer(self, task: Task) -> str:
        return str(task.data["answer"])


def exact(task: Task, answer: Answer) -> float:
    """1 for the answer's text, white space around it aside; else 0."""
    return float(answer.text.strip() == str(task.data["answer"]).strip())


def hash_of(messages: Sequence[Message]) -> int:
    """32 bits that name a question."""
    text = json.dumps(list(messages), sort_keys=True, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


@lru_cache(maxsize=8)
def _order(seed: int, split: Split, epoch: int, count: int) -> Any:
    return np.random.default_rng([seed, split == "heldout", epoch]).permutation(count)


def _task(row: Row, messages_column: str, answer_column: str) -> Task:
    """Raises ConfigError, naming the row."""
    messages = messages_of(row, messages_column)
    answer = row.columns.get(answer_column)
    if messages[-1]["role"] == "assistant":
        answer = messages[-1]["content"] if answer is None else answer
        messages = messages[:-1]
    if answer is None or not messages:
        raise ConfigError(
            f"{row.where}: expected a question in {messages_column}, and {answer_column} or its answer there"
        )
    data = {key: value for key, value in row.columns.items() if key != messages_column}
    return Task(tuple(messages), data | {"answer": answer})
