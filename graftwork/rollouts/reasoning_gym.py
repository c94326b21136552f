"""Every task of the package reasoning-gym as an environment: `reasoning_gym:spell_backward` and its like.

    user       the task's question, an empty line, `instruction`
    assistant  the answer, by itself or between tags
    reward     what the task's own verifier gives, from 0 to 1; some give parts of it to answers that are nearly right

The package makes tasks from a seed and a position. Here they come in chunks: one dataset of the package for every
CHUNK tasks of (seed, split), because some read a word list when they are made, and some take no larger size. Task i of
a chunk is the first of its candidates, TRIES positions that no other task of the chunk has, whose question belongs to
the split. A question belongs to one split for good, by a hash of its text, so nothing held out can be trained on,
whatever the seed.

Verifiers are the package's own. Those that run what the model writes as code are refused unless `allow_eval` is set.

The package is imported when such an environment is asked for, not before.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import os
import random
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from types import ModuleType
from typing import Any

import numpy as np

from graftwork.errors import ConfigError
from graftwork.rollouts.environment import Answer, Message, SingleTurn, Split, Task, nearest
from graftwork.rollouts.reverse_text import split_of

CHUNK = 128
TRIES = 128
"""With one question in five held out, a task without a candidate is one in 10^12, unless there are few questions."""
SEEDS = 2**31
"""Some generators take no larger ones."""
CHUNKS_KEPT = 4
TASKS_KEPT = 1024
"""The samples of a group ask for the same task, and every evaluation for the same held-out ones."""
OURS = ("instruction", "extract", "system", "allow_eval")
RESERVED = ("seed", "size")
"""Fields of every task's configuration that are not the user's to set: tasks are numbered, without an end."""
EVALUATED = {
    "binary_matrix": "Python's eval",
    "countdown": "sympy's parse_expr",
    "intermediate_integration": "sympy's parse_expr",
    "n_queens": "Python's eval",
    "polynomial_multiplication": "sympy's parse_expr",
    "puzzle24": "sympy's parse_expr",
    "simple_integration": "sympy's parse_expr",
    "spiral_matrix": "Python's eval",
    "string_insertion": "Python's eval",
}
"""Tasks whose verifier runs the answer as code, and by what. A test holds this against the package's source."""
HASH_SEEDED = frozenset(
    ("isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
)
"""Tasks that iterate over sets of texts, whose order differs between processes; found by trying, at 0.1.25."""
REFUSALS = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What the package raises for options that it does not like, and verifiers for answers they cannot read."""


class ReasoningGym(SingleTurn):
    """Options: those in OURS (docs/environments.md explains them), and those of the task's own configuration."""

    def __init__(
        self,
        task: str,
        /,
        *,
        instruction: str | None = None,
        extract: str | None = None,
        system: str | None = None,
        allow_eval: bool = False,
        **options: Any,
    ) -> None:
        """Raises ConfigError: no package, no such task or option, a value that the task refuses, a task that would
        run answers as code, or be another one in another process."""
        self.name = f"reasoning_gym:{task}"
        _check_ours(self.name, instruction, extract, system, allow_eval)
        datasets = _package("reasoning_gym.factory").DATASETS
        if task not in datasets:
            hint = nearest(task, datasets) or f"; it has {', '.join(sorted(datasets))}"
            raise ConfigError(f"environment {self.name}: reasoning-gym has no task {task!r}{hint}")
        self._dataset_class, self._config_class = datasets[task]
        self._extract_answer = _package("reasoning_gym.utils").extract_answer
        self.tag, self.system = extract, system
        self.instruction = _instruction(extract) if instruction is None else instruction
        self._options = _options(self.name, self._config_class, options)
        tasks = {spec.name for spec in self._options.get("datasets", ())} if task == "composite" else {task}
        if not allow_eval:
            _check_evaluated(self.name, tasks)
        _check_hash_seed(self.name, tasks)
        self._verifier = self._try_options()
        self._chunk = functools.lru_cache(CHUNKS_KEPT)(self._make_chunk)
        self._task = functools.lru_cache(TASKS_KEPT)(self._make_task)

    def task(self, seed: int, index: int, split: Split) -> Task:
        """`data` holds {"entry": what the package made}. Raises ConfigError when the split has too few questions."""
        return self._task(seed, index, split)

    def score(self, task: Task, answer: Answer) -> float:
        """An answer on which the verifier breaks down is a wrong one: 0."""
        said = self._extract_answer(answer.text, self.tag) if self.tag else answer.text.strip()
        entry = copy.deepcopy(task.data["entry"])  # tasks are kept, and the verifiers are others' code
        try:
            return float(self._verifier.score_answer(said, entry))
        except REFUSALS:
            return 0.0

    def answer(self, task: Task) -> str:
        """Raises ConfigError for a task that has a verifier only."""
        answer = task.data["entry"]["answer"]
        if answer is None:
            raise ConfigError(
                f"environment {self.name}: its tasks come without a right answer, so there is nothing to learn from;"
                " it is for reinforcement learning only. For supervised fine-tuning give data.path"
            )
        return f"<{self.tag}>{answer}</{self.tag}>" if self.tag else str(answer)

    def _make_task(self, seed: int, index: int, split: Split) -> Task:
        number, place = divmod(index, CHUNK)
        key, dataset = self._chunk(seed, number, split)
        for position in range(place, CHUNK * TRIES, CHUNK):
            try:
                with _pinned(key + position):
                    entry = dataset[position]
            except REFUSALS:
                self._chunk.cache_clear()  # a dataset that broke may stay broken, and no other task may depend on that
                raise
            if split_of(entry["question"]) == split:
                return Task(self._messages(entry["question"]), {"entry": entry})
        raise ConfigError(
            f"environment {self.name}: none of {TRIES} questions belongs to the split {split!r};"
            f" with the options {self._options} there are too few different ones. Widen them"
        )

    def _messages(self, question: str) -> tuple[Message, ...]:
        user = f"{question}\n\n{self.instruction}" if self.instruction else question
        opening: list[Message] = [{"role": "system", "content": self.system}] if self.system is not None else []
        return (*opening, {"role": "user", "content": user})

    def _make_chunk(self, seed: int, number: int, split: Split) -> tuple[int, Any]:
        """(the dataset's seed, the dataset)."""
        digest = hashlib.sha256(f"{self.name} {seed} {split} {number}".encode()).digest()
        key = int.from_bytes(digest[:8], "big") % SEEDS
        return key, self._dataset(key, CHUNK * TRIES)

    def _dataset(self, seed: int, size: int) -> Any:
        config = self._config_class(seed=seed, size=size, **copy.deepcopy(self._options))
        if hasattr(config, "validate"):
            config.validate()
        with _pinned(seed):
            return self._dataset_class(config=config)

    def _try_options(self) -> Any:
        """A dataset to score with, after it has made a task: some options show their faults only then."""
        try:
            dataset = self._dataset(0, 1)
            with _pinned(0):
                dataset[0]
        except REFUSALS as error:
            raise ConfigError(
                f"environment {self.name} refused its options {self._options}: {error or type(error).__name__}"
            ) from error
        return dataset


def _package(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"reasoning_gym environments need the package reasoning-gym, which cannot be imported ({error});"
            " pip install 'graftwork[reasoning-gym]'"
        ) from error


def _check_ours(name: str, instruction: str | None, extract: str | None, system: str | None, allow_eval: bool) -> None:
    for key, value in (("instruction", instruction), ("extract", extract), ("system", system)):
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"environment {name}: {key} = {value!r} is not a text")
    if extract is not None and not re.fullmatch(r"[A-Za-z][\w-]*", extract):
        raise ConfigError(f"environment {name}: extract = {extract!r} is not a tag's name, such as 'answer'")
    if not isinstance(allow_eval, bool):
        raise ConfigError(f"environment {name}: allow_eval = {allow_eval!r} is not true or false")


def _instruction(tag: str | None) -> str:
    return f"Write the answer between <{tag}> and </{tag}>." if tag else "Reply with the answer only."


def _options(name: str, config: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` as the task's configuration takes them. Raises ConfigError: no such option, or not its type."""
    hints = typing.get_type_hints(config)
    known = [field.name for field in fields(config) if field.name not in RESERVED]
    fitted: dict[str, Any] = {}
    for key, value in given.items():
        if key in RESERVED:
            raise ConfigError(
                f"environment {name}: {key} is not an option here; tasks are numbered without an end, and the seed is"
                " the run's own"
            )
        if key not in known:
            every = [*known, *OURS]
            raise ConfigError(
                f"environment {name} has no option {key!r}{nearest(key, every)}; its options are {', '.join(every)}"
            )
        try:
            fitted[key] = _fit(hints[key], value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"environment {name}: {key} = {value!r} does not fit: {error}") from error
    return fitted


def _fit(hint: Any, value: Any) -> Any:
    """A value of a TOML file as the type that a field is annotated with. Raises TypeError or ValueError."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if isinstance(value, list) and kind in (list, tuple, Sequence):
        items = [_fit(inner[0], item) for item in value] if inner else value
        return items if kind is list else tuple(items)
    if not isinstance(kind, type) or kind is Sequence:  # Optional, Literal: the task's own validation sees to these
        return value
    if is_dataclass(kind) and isinstance(value, dict):
        return kind(**value)
    if issubclass(kind, Enum):
        return kind(value)
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value


def _check_evaluated(name: str, tasks: set[str]) -> None:
    if evaluated := sorted(tasks & EVALUATED.keys()):
        how = ", ".join(f"{task} gives answers to {EVALUATED[task]}" for task in evaluated)
        raise ConfigError(
            f"environment {name} is refused: its verifier runs what the model writes as code, in the orchestrator's"
            f" process ({how}); choose another task, or set allow_eval = true among its options, best in a container"
        )


def _check_hash_seed(name: str, tasks: set[str]) -> None:
    """A task that differs between processes is no function of its number."""
    if (loose := sorted(tasks & HASH_SEEDED)) and not os.environ.get("PYTHONHASHSEED", "").isdigit():
        raise ConfigError(
            f"environment {name}: what {', '.join(loose)} makes depends on Python's hash seed, which is random in this"
            " process; set PYTHONHASHSEED=0 in the environment, as `graftwork rl` and `submit` do for what they start"
        )


@contextmanager
def _pinned(seed: int) -> Iterator[None]:
    """The process's random generators, which some tasks draw from: seeded inside, as they were afterwards."""
    python, legacy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
