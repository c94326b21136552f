"""What an environment is: where tasks come from, how one is played, what it earns.

An environment offers two things (`Environment`, below):

    task(seed, index, split) -> Task     a pure function of its arguments: the same task, every time, everywhere
    run(task, policy) -> float           plays the task against the model and returns its reward, a finite number

`policy` is the model under training. `await policy.ask(messages)` adds messages to the conversation, lets the model
answer, and returns the answer; `run` may ask as often as it likes, one question at a time. The policy holds the
conversation: a second `ask` is given only what is new. So the tokens that were sampled are never made from text again.

A game of two turns:

    class Guess:
        def task(self, seed, index, split):
            return Task(({"role": "user", "content": "Think of a number."},))
        async def run(self, task, policy):
            await policy.ask(task.messages)
            answer = await policy.ask([{"role": "user", "content": "Now double it."}])
            return float(answer.text.strip().isdigit())

An environment of one question inherits `SingleTurn` and writes `score` in place of `run`.

`environment.timeout_seconds` bounds what `run` takes by itself; the time that it waits for the model does not count. It
is told at its next `await`: code that never awaits cannot be interrupted.

What `run` (or `task`) raises fails that one rollout: it is recorded with its error and left out of training. An
environment that wants to end the run instead raises a GraftworkError.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from graftwork.config.run import VERIFIERS
from graftwork.errors import ConfigError

Split = Literal["train", "heldout"]
Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | ..., "content": text}, as the chat template takes it."""

BUILT_IN = {
    "prompts": "graftwork.rollouts.prompts:Prompts",
    "reverse_text": "graftwork.rollouts.reverse_text:ReverseText",
}
FAMILIES = {"reasoning_gym": "graftwork.rollouts.reasoning_gym:ReasoningGym"}
"""Built in too: `family:member`, whose factory takes the member's name before the options."""


@dataclass(frozen=True)
class Task:
    """One thing to do: the messages that open the conversation, and what scoring needs to know."""

    messages: tuple[Message, ...]
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What the model said: `text` without special tokens, `token_ids` as sampled, end token included."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    """"stop": the model ended its turn. "length": it was cut at sampling.max_tokens."""


class Policy(Protocol):
    """The model, as an environment sees it."""

    async def ask(self, messages: Sequence[Message]) -> Answer:
        """Add `messages` (one or more) to the conversation and return the model's answer to it."""
        ...


@runtime_checkable
class Environment(Protocol):
    """See the module's docstring."""

    def task(self, seed: int, index: int, split: Split) -> Task:
        """Task number `index` (from 0, no upper end) of a split. "heldout" shares no task with "train"."""
        ...

    async def run(self, task: Task, policy: Policy) -> float:
        """Play `task` and return its reward."""
        ...


@runtime_checkable
class HasAnswers(Protocol):
    """An environment that knows right answers: supervised fine-tuning can learn from it."""

    def task(self, seed: int, index: int, split: Split) -> Task: ...

    def answer(self, task: Task) -> str:
        """The text of a right answer to the task's messages."""
        ...


class SingleTurn(ABC):
    """One question, one answer, one score."""

    @abstractmethod
    def task(self, seed: int, index: int, split: Split) -> Task: ...

    @abstractmethod
    def score(self, task: Task, answer: Answer) -> float:
        """The reward of `answer`, a finite number."""

    async def run(self, task: Task, policy: Policy) -> float:
        return self.score(task, await policy.ask(task.messages))


def load_environment(name: str, options: Mapping[str, Any]) -> Environment:
    """The built-in environment `name` or `family:member`, or what `factory(**options)` of `module:factory` returns.

    `module` is looked up as Python does, the working directory included. Raises ConfigError: no such name (with the
    nearest one), a module that cannot be imported, an option that the factory does not take or whose value it refuses.
    """
    factory = _factory(name)
    _check_options(name, factory, options)
    try:
        environment = factory(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"environment {name!r} refused its options {dict(options)}: {error}") from error
    if not isinstance(environment, Environment):
        raise ConfigError(
            f"environment {name!r} made a {type(environment).__name__}, which has no task and run;"
            " graftwork/rollouts/environment.py says what an environment is"
        )
    return environment


def refuse_unknown(name: str, options: Mapping[str, Any]) -> None:
    """What can be said of an environment without making it, and without a line of the user's code: that no built-in one
    has this name, or takes these options. Raises ConfigError."""
    if not name.startswith(VERIFIERS) and (":" not in name or name.partition(":")[0] in FAMILIES):
        _check_options(name, _factory(name), options)


def _factory(name: str) -> Callable[..., Any]:
    if name.startswith(VERIFIERS):
        raise ConfigError(
            f"environment {name!r} is one of the package verifiers: it can be [run.environment], but it has no answers"
            " to learn from and no tasks to ask for; give data.path instead"
        )
    if ":" not in name:
        if name not in BUILT_IN:
            raise ConfigError(
                f"no environment {name!r}{nearest(name, BUILT_IN)}; built in:"
                f" {', '.join([*sorted(BUILT_IN), *(f'{family}:...' for family in sorted(FAMILIES))])};"
                " one of yours is named module:factory"
            )
        return _factory(BUILT_IN[name])
    family, _, member = name.partition(":")
    if family in FAMILIES:
        return functools.partial(_factory(FAMILIES[family]), member)
    return named("environment", name)


def named(what: str, name: str) -> Callable[..., Any]:
    """The function or class `module:attribute`. `what` it is, for messages. Raises ConfigError."""
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise ConfigError(f"{what} {name!r}: expected module:function")
    see_working_directory()
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{what} {name!r}: cannot import {module_name!r} ({error})") from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        raise ConfigError(
            f"{what} {name!r}: {module_name} has no function or class {attribute!r}{nearest(attribute, vars(module))}"
        )
    return factory


def see_working_directory() -> None:
    """Modules of the working directory can be imported."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)


def _check_options(name: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> None:
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # written in C, without a signature: calling it will tell
        return
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [key for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for option in options:
        if option not in known and not takes_any:
            raise ConfigError(
                f"environment {name!r} has no option {option!r}{nearest(option, known)};"
                f" its options are {', '.join(known) or 'none'}"
            )
    for key in known:
        if parameters[key].default is inspect.Parameter.empty and key not in options:
            raise ConfigError(f"environment {name!r} needs the option {key!r}; set it under environment.options")


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """How an error message goes on after a wrong name: "; did you mean 'this'?", or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
