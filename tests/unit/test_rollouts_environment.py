"""Environments: reverse_text, the loader and its refusals."""

from __future__ import annotations

import asyncio
import difflib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graftwork.errors import ConfigError
from graftwork.rollouts.environment import (
    Answer,
    Environment,
    HasAnswers,
    SingleTurn,
    Task,
    load_environment,
    refuse_unknown,
)
from graftwork.rollouts.reverse_text import ReverseText, split_of


def said(text: str) -> Answer:
    return Answer(text, (1,), "stop")


def test_a_task_is_a_function_of_seed_index_and_split():
    once, again = ReverseText(), ReverseText()
    assert once.task(3, 7, "train") == again.task(3, 7, "train")
    others = [once.task(4, 7, "train"), once.task(3, 8, "train"), once.task(3, 7, "heldout")]
    assert all(other != once.task(3, 7, "train") for other in others)


def test_the_default_prompt_and_its_reward():
    environment = ReverseText()
    task = environment.task(0, 0, "train")
    word = task.data["answer"][::-1]
    assert task.messages == ({"role": "user", "content": f"reverse: {word}"},)
    assert 6 <= len(word) <= 10
    assert environment.answer(task) == word[::-1]
    assert environment.score(task, said(word[::-1])) == 1.0
    assert environment.score(task, said("")) == 0.0
    assert environment.score(task, said(word)) == difflib.SequenceMatcher(None, word, word[::-1]).ratio()


def test_spaced_writes_letters_apart_in_question_and_answer():
    plain, spaced = ReverseText(), ReverseText(spaced=True, system="You reverse.", template="<{text}>")
    word = plain.task(0, 0, "train").data["answer"][::-1]
    task = spaced.task(0, 0, "train")
    assert task.messages[0] == {"role": "system", "content": "You reverse."}
    assert task.messages[1]["content"] == f"<{' '.join(word)}>"
    assert task.data["answer"] == " ".join(word[::-1])


@given(seed=st.integers(0, 2**32), index=st.integers(0, 10**6), length=st.integers(1, 12))
def test_no_word_is_in_both_splits(seed, index, length):
    environment = ReverseText(min_length=length, max_length=length)
    for split in ("train", "heldout"):
        word = environment.task(seed, index, split).data["answer"][::-1]
        assert len(word) == length
        assert split_of(word) == split


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_length": 0}, ["min_length"]),
        ({"min_length": 9, "max_length": 3}, ["min_length = 9", "max_length = 3"]),
        ({"max_length": "10"}, ["max_length", "'10'"]),
        ({"spaced": "yes"}, ["spaced"]),
        ({"template": "reverse it"}, ["template", "{text}"]),
        ({"system": 3}, ["system"]),
        ({"max_lenght": 8}, ["max_lenght", "did you mean 'max_length'"]),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ConfigError) as caught:
        load_environment("reverse_text", options)
    assert all(word in str(caught.value) for word in words)


class Two:
    """An environment of two turns, for the loader."""

    def __init__(self, bonus: float, *, hint: str = "again"):
        if bonus < 0:
            raise ValueError("bonus is negative")
        self.bonus, self.hint = bonus, hint

    def task(self, seed, index, split):
        return Task(({"role": "user", "content": f"{seed} {index} {split}"},))

    async def run(self, task, policy):
        first = await policy.ask(task.messages)
        second = await policy.ask([{"role": "user", "content": self.hint}])
        return self.bonus + len(first.text) + len(second.text)


def test_loads_a_factory_of_ones_own():
    environment = load_environment(f"{__name__}:Two", {"bonus": 1.5})
    assert isinstance(environment, Environment)
    assert not isinstance(environment, HasAnswers)
    assert isinstance(load_environment("reverse_text", {}), HasAnswers)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("reverse_txt", {}, ["reverse_txt", "did you mean 'reverse_text'", "module:factory"]),
        ("no_such_module_anywhere:x", {}, ["no_such_module_anywhere"]),
        (f"{__name__}:Twoo", {"bonus": 1}, ["Twoo", "did you mean 'Two'"]),
        (f"{__name__}:Two", {}, ["needs the option 'bonus'"]),
        (f"{__name__}:Two", {"bonus": 1, "hnt": ""}, ["hnt", "did you mean 'hint'"]),
        (f"{__name__}:Two", {"bonus": -1}, ["bonus is negative"]),
        ("builtins:dict", {}, ["has no task and run"]),
    ],
)
def test_what_cannot_be_loaded_is_refused(name, options, words):
    with pytest.raises(ConfigError) as caught:
        load_environment(name, options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_single_turn_asks_once_and_scores():
    class Length(SingleTurn):
        def task(self, seed, index, split):
            return Task(({"role": "user", "content": "hi"},), {"wanted": 3})

        def score(self, task, answer):
            return float(len(answer.text) == task.data["wanted"])

    class Parrot:
        async def ask(self, messages):
            return said(messages[-1]["content"] + "!")

    environment = Length()
    assert asyncio.run(environment.run(environment.task(0, 0, "train"), Parrot())) == 1.0


def test_what_is_refused_without_making_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the user's code nor what only the process that plays can have is looked at."""
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    refuse_unknown("reasoning_gym:ransom_note", {})
    refuse_unknown("prompts", {"path": "not/there.jsonl", "scorer": "no_such_module:score"})
    refuse_unknown("no_such_module:factory", {"anything": 1})
    for name, options, says in (
        ("prompt", {}, "did you mean 'prompts'"),
        ("reverse_text", {"min_lenght": 3}, "did you mean 'min_length'"),
    ):
        with pytest.raises(ConfigError, match=says):
            refuse_unknown(name, options)
