"""An environment of verifiers that does what conversations do: branch, call tools, fail, dawdle, grow too long.

What it does is the taskset's `kind`. Of the kinds "fail", "slow" and "long" every second task goes wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import aiohttp
import verifiers.v1 as vf


class OddConfig(vf.TasksetConfig):
    kind: str = "branch"
    count: int = 12


class OddTask(vf.Task[vf.TaskData]):
    @vf.reward
    async def length(self, trace: vf.Trace) -> float:
        return len(trace.last_reply) / 10 + (self.data.idx or 0)


class OddTasks(vf.Taskset[OddTask, OddConfig]):
    def load(self) -> Iterable[OddTask]:
        for number in range(self.config.count):
            yield OddTask(vf.TaskData(prompt=f"copy: word{number}", name=self.config.kind), self.config.task)


class OddHarness(vf.Harness[vf.HarnessConfig]):
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(self, ctx, trace, runtime, endpoint, secret, mcp_urls, data):
        async def ask(*messages: Any) -> dict[str, Any]:
            headers = {"Authorization": f"Bearer {secret}"}
            async with (
                aiohttp.ClientSession(headers=headers, raise_for_status=True) as http,
                http.post(f"{endpoint}/chat/completions", json={"model": ctx.model, "messages": messages}) as response,
            ):
                return (await response.json())["choices"][0]["message"]

        odd = data.idx % 2 == 1
        if data.name == "fail" and odd:
            raise FileNotFoundError("the puzzle is missing")
        if data.name == "slow" and odd:
            await asyncio.sleep(300)
        question = {"role": "user", "content": data.prompt + ("x" * 200 if data.name == "long" and odd else "")}
        answer = await ask(question)
        if data.name == "branch":
            await ask(question, answer, {"role": "user", "content": "copy: left"})
            await ask(question, answer, {"role": "user", "content": "copy: right"})
        if data.name == "tool":
            await ask(question, answer, {"role": "tool", "tool_call_id": "1", "content": "it says word"})
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


class TwoConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig(runtime=vf.SubprocessConfig())
    both: bool = False
    """Play twice, so that two rollouts would train."""


class OddEnv(vf.Env[TwoConfig]):
    async def run(self, task, agents):
        await agents.agent.run(task)
        if self.config.both:
            await agents.agent.run(task)


__all__ = ["OddEnv", "OddHarness", "OddTasks"]
