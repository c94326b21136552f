"""Supervised batches as a pure function of (seed, step): nothing to save, so a resume sees the same data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from graftwork.config.schema import SftConfig
from graftwork.errors import ConfigError
from graftwork.rollouts.chat import ChatTokenizer
from graftwork.rollouts.environment import HasAnswers, Message, load_environment
from graftwork.rollouts.rows import Row, dataset_rows, jsonl_rows, messages_of
from graftwork.training.packer import Example

Conversations = Callable[[int], Sequence[Sequence[Message]]]
"""Step (from 1) -> the conversations that it learns from; their assistant turns carry the loss."""


def conversations(config: SftConfig) -> Conversations:
    """Raises ConfigError when the source is absent, malformed or has no answers."""
    data = config.data
    if data.path is not None:
        return _from_rows(jsonl_rows(Path(data.path)), config)
    if data.dataset is not None:
        return _from_rows(dataset_rows(data.dataset, data.split, data.revision), config)
    assert config.data.environment is not None
    return _from_environment(config)


def _from_environment(config: SftConfig) -> Conversations:
    assert config.data.environment is not None
    name = config.data.environment.name
    environment = load_environment(name, config.data.environment.options)
    if not isinstance(environment, HasAnswers):
        raise ConfigError(f"environment {name!r} has no `answer`, so there is nothing to learn from; give data.path")

    def at(step: int) -> list[list[Message]]:
        first = (step - 1) * config.batch_size
        tasks = [environment.task(config.seed, first + i, "train") for i in range(config.batch_size)]
        return [[*task.messages, {"role": "assistant", "content": environment.answer(task)}] for task in tasks]

    return at


def _from_rows(rows: Sequence[Row], config: SftConfig) -> Conversations:
    """Every row once an epoch, in an order drawn by (seed, epoch). Raises ConfigError, naming the row."""
    talks, size = [_talk(row, config.data.messages_column) for row in rows], config.batch_size

    def at(step: int) -> list[list[Message]]:
        indices = range((step - 1) * size, step * size)
        epochs = {i // len(talks) for i in indices}
        order = {epoch: np.random.default_rng([config.seed, epoch]).permutation(len(talks)) for epoch in epochs}
        return [talks[order[i // len(talks)][i % len(talks)]] for i in indices]

    return at


def _talk(row: Row, column: str) -> list[Message]:
    messages = messages_of(row, column)
    if not any(message["role"] == "assistant" for message in messages):
        raise ConfigError(f"{row.where}: no message of {column} is the assistant's, so there is nothing to learn")
    return messages


def example_of(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> Example:
    """The conversation as tokens, with loss on the assistant's turns."""
    token_ids, mask = tokenizer.encode_training(messages)
    return Example(np.array(token_ids, np.int32), np.array(mask, bool), np.zeros(len(token_ids), np.float32), 1.0)


def digest_of_examples(examples: Sequence[Example]) -> str:
    """Names a supervised batch, for the cursor's chain."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(example.token_ids.tobytes() + example.loss_mask.tobytes() + b"\n")
    return digest.hexdigest()
