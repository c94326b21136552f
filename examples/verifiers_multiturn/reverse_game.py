"""A game of several turns, as an environment of the package verifiers (0.4, v1 API): write a word backwards, until it
is right or the tries are used up.

    user       reverse: bkqos        the task
    assistant  soqbk
    user       3 right: bkqos        letters that are where they belong, and the word again
    assistant  soqkb

The reward is how similar the last answer is to the right one (difflib, 0 to 1), times 0.8 for every try but the first:
a right answer at once earns 1, one at the second try 0.8.

What verifiers asks of a module is what `__all__` names: the tasks, how one is played, and the program that talks to
the model. That program (the harness) runs in this process and asks once a turn. The harnesses that come with verifiers
start a process for every turn, which is right for agents that run commands and slow for a game like this one.
"""

from __future__ import annotations

import difflib
import random
import string
from collections.abc import Iterable

import aiohttp
import verifiers.v1 as vf

TRY_COSTS = 0.8


class WordsConfig(vf.TasksetConfig):
    count: int = 4000
    """Tasks."""
    min_length: int = 4
    max_length: int = 7
    """Letters of a word."""


class WordData(vf.TaskData):
    word: str


class WordTask(vf.Task[WordData]):
    @property
    def answer(self) -> str:
        return self.data.word[::-1]

    def hint(self, reply: str) -> str:
        right = sum(a == b for a, b in zip(reply, self.answer, strict=False))
        return f"{right} right: {self.data.word}"

    @vf.reward
    async def similarity(self, trace: vf.Trace) -> float:
        alike = difflib.SequenceMatcher(None, trace.last_reply, self.answer).ratio()
        return alike * TRY_COSTS ** (trace.num_turns - 1)

    @vf.metric
    async def tries(self, trace: vf.Trace) -> float:
        return float(trace.num_turns)


class Words(vf.Taskset[WordTask, WordsConfig]):
    def load(self) -> Iterable[WordTask]:
        rng = random.Random("reverse_game")
        for _ in range(self.config.count):
            length = rng.randint(self.config.min_length, self.config.max_length)
            word = "".join(rng.choices(string.ascii_lowercase, k=length))
            yield WordTask(WordData(prompt=f"reverse: {word}", word=word), self.config.task)


class AskHere(vf.Harness[vf.HarnessConfig]):
    """One question to the model a turn, asked from this process."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        system, prompt = self.resolve_prompt(data)
        said = [vf.UserMessage(content=prompt)] if isinstance(prompt, str) else list(prompt)
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": message.role, "content": message.content or ""} for message in said]
        headers, wait = {"Authorization": f"Bearer {secret}"}, aiohttp.ClientTimeout(total=None)
        body = {"model": ctx.model, "messages": messages}
        async with (
            aiohttp.ClientSession(headers=headers, timeout=wait, raise_for_status=True) as http,
            http.post(f"{endpoint}/chat/completions", json=body) as response,
        ):
            await response.read()
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


class ReverseGameConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig(runtime=vf.SubprocessConfig())
    """Who plays: the run's model. Nothing is executed, so it needs no box."""
    tries: int = 2


class ReverseGame(vf.Env[ReverseGameConfig]):
    async def run(self, task, agents):
        async with agents.player.interaction(task) as game:
            turn = await game.turn()
            for _ in range(self.config.tries - 1):
                if turn.terminated or turn.last_reply == task.answer:
                    break
                turn = await game.turn(task.hint(turn.last_reply))


__all__ = ["AskHere", "ReverseGame", "Words"]
