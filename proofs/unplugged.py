"""An environment that can be unplugged: reverse-text whose tools fail or hang for some of the rollouts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

from graftwork.rollouts.environment import Policy, Split, Task
from graftwork.rollouts.reverse_text import ReverseText

SLEEP_SECONDS = 3600.0


class Unplugged:
    """mood: what happens to a share of the tasks, always the same ones, until the file `mended` is there."""

    def __init__(self, mood: Literal["well", "raises", "hangs"], share: float, mended: str) -> None:
        self.mood, self.share, self.mended = mood, share, Path(mended)
        self.inner = ReverseText(min_length=4, max_length=6)

    def task(self, seed: int, index: int, split: Split) -> Task:
        task = self.inner.task(seed, index, split)
        return Task(task.messages, {**task.data, "index": index})

    async def run(self, task: Task, policy: Policy) -> float:
        unlucky = (task.data["index"] * 0.618034) % 1 < self.share and not self.mended.exists()
        if unlucky and self.mood == "raises":
            raise ConnectionError("the tool is unplugged")
        reward = await self.inner.run(task, policy)
        if unlucky and self.mood == "hangs":
            await asyncio.sleep(SLEEP_SECONDS)
        return reward
