"""Supervised batches as a pure function of (seed, step): nothing to save, so a resume sees the same data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from graftwork.config.schema import SftConfig
from graftwork.errors import ConfigError
from graftwork.rollouts.chat import ChatTokenizer
from graftwork.rollouts.environment import HasAnswers, Message, load_environment
from graftwork.training.packer import Example

Conversations = Callable[[int], Sequence[Sequence[Message]]]
"""Step (from 1) -> the conversations that it learns from; their assistant turns carry the loss."""


def conversations(config: SftConfig) -> Conversations:
    """Raises ConfigError when the source is absent, malformed or has no answers."""
    if config.data.path is not None:
        return _from_file(Path(config.data.path), config.seed, config.batch_size)
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


def _from_file(path: Path, seed: int, batch_size: int) -> Conversations:
    rows = _read(path)

    def at(step: int) -> list[list[Message]]:
        indices = range((step - 1) * batch_size, step * batch_size)
        epochs = {i // len(rows) for i in indices}
        order = {epoch: np.random.default_rng([seed, epoch]).permutation(len(rows)) for epoch in epochs}
        return [rows[order[i // len(rows)][i % len(rows)]] for i in indices]

    return at


def _read(path: Path) -> list[list[Message]]:
    """Raises ConfigError, naming file and line."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.path: cannot read {path}: {error}") from None
    rows: list[list[Message]] = []
    for number, line in enumerate(lines, 1):
        try:
            messages = json.loads(line)["messages"]
            rows.append([{"role": str(m["role"]), "content": str(m["content"])} for m in messages])
        except (ValueError, KeyError, TypeError) as error:
            wanted = '{"messages": [{"role": ..., "content": ...}, ...]}'
            raise ConfigError(f"{path}, line {number}: expected {wanted} ({type(error).__name__}: {error})") from None
    if not rows:
        raise ConfigError(f"data.path: {path} holds no conversation")
    return rows


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
