"""The smallest task that a model can get better at: write a word backwards.

    user       reverse: hello
    assistant  olleh

Words are random letters, so none can be known by heart. The reward is the similarity of the answer and the reversed
word, `difflib.SequenceMatcher(None, answer, reversed).ratio()`, from 0 to 1: a half-right answer earns something, so
a group of samples has a best one long before one of them is perfect.

`spaced = true` is for tokenizers that cut words into pieces: letters are written apart, in the question
(`reverse: h e l l o`) and in the right answer (`o l l e h`), so one letter is one token and reversal is a question of
order alone. The score then compares the spaced texts, as they stand.

A word belongs to one split for good, by a hash of the word: nothing held out can be trained on, whatever the seed.
"""

from __future__ import annotations

import difflib
import hashlib
import random
import string

from graftwork.errors import ConfigError
from graftwork.rollouts.environment import Answer, Message, SingleTurn, Split, Task

HELDOUT_ONE_IN = 5
"""One word in this many is held out."""
LENGTH_MAX = 256
PLACE = "{text}"


class ReverseText(SingleTurn):
    """Options: min_length, max_length (letters), spaced, template (holds `{text}`), system (a message before it)."""

    def __init__(
        self,
        min_length: int = 6,
        max_length: int = 10,
        spaced: bool = False,
        template: str = "reverse: {text}",
        system: str | None = None,
    ) -> None:
        """Raises ConfigError, naming the option."""
        for name, value in (("min_length", min_length), ("max_length", max_length)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"environment reverse_text: {name} = {value!r} is not a whole number")
        if not 1 <= min_length <= max_length <= LENGTH_MAX:
            raise ConfigError(
                f"environment reverse_text: min_length = {min_length} and max_length = {max_length} must satisfy"
                f" 1 <= min_length <= max_length <= {LENGTH_MAX}"
            )
        if not isinstance(spaced, bool):
            raise ConfigError(f"environment reverse_text: spaced = {spaced!r} is not true or false")
        if not isinstance(template, str) or PLACE not in template:
            raise ConfigError(f"environment reverse_text: template = {template!r} has no place {PLACE} for the word")
        if system is not None and not isinstance(system, str):
            raise ConfigError(f"environment reverse_text: system = {system!r} is not a text")
        self.min_length, self.max_length, self.spaced = min_length, max_length, spaced
        self.template, self.system = template, system

    def task(self, seed: int, index: int, split: Split) -> Task:
        """A word keyed by (seed, split, index); `data` holds {"answer": the text that earns 1}."""
        word = self._word(random.Random(f"reverse_text {seed} {split} {index}"), split)
        user = self.template.replace(PLACE, self._write(word))
        messages: list[Message] = [{"role": "user", "content": user}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return Task(tuple(messages), {"answer": self._write(word[::-1])})

    def score(self, task: Task, answer: Answer) -> float:
        return difflib.SequenceMatcher(None, answer.text, task.data["answer"]).ratio()

    def answer(self, task: Task) -> str:
        return str(task.data["answer"])

    def _word(self, rng: random.Random, split: Split) -> str:
        """Random letters, drawn again until they fall into `split` (there are words of every length in both)."""
        while True:
            word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(self.min_length, self.max_length)))
            if split_of(word) == split:
                return word

    def _write(self, word: str) -> str:
        return " ".join(word) if self.spaced else word


def split_of(word: str) -> Split:
    """The one split that a word belongs to."""
    return "heldout" if hashlib.sha256(word.encode()).digest()[0] % HELDOUT_ONE_IN == 0 else "train"
