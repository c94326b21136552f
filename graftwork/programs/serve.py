"""`graftwork serve`: keep one trainer and one inference server up for runs that come and go.

A child that dies is started again: inference at the address that it had, as orchestrators know it by that; the trainer
goes on with its runs unasked. What ends serve is a first start that fails (a setting is wrong), or a child that dies
again and again. Torch-free; runs are told by their folders, and nothing here decides about them.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from graftwork import logs
from graftwork.config.schema import ServeConfig
from graftwork.errors import Damaged, ProgramFailed
from graftwork.programs.news import News
from graftwork.programs.processes import COMMAND, Interrupted, Programs, describe_failure, noted_signals
from graftwork.programs.start import (
    Served,
    absolute,
    publish_served,
    read_served,
    ready_file,
    refuse_absent_server,
    refuse_absent_vllm,
    refuse_held,
    said_by,
    write_inference_toml,
    write_trainer_toml,
)
from graftwork.store.disk import Disk
from graftwork.store.layout import OutputTree

RESTARTS_MAX = 5
RESTARTS_WINDOW_SECONDS = 600.0
"""A child that dies more than RESTARTS_MAX times in this time is not started again."""
FIRST_DELAY_SECONDS = 1.0
"""The second restart in the window waits this long, the next twice as long, and so on; the first does not wait."""
POLL_SECONDS = 0.1
LOOK_SECONDS = 0.5
"""Between two looks at the runs."""


def main(config: ServeConfig, command: Sequence[str] = COMMAND) -> None:
    """Serve until SIGINT or SIGTERM. Raises Busy, and ProgramFailed when a child cannot be kept up."""
    config, disk = absolute(config), Disk()
    outputs = OutputTree(Path(config.output_dir))
    with only_server(disk, outputs):
        try:
            with noted_signals() as signals, Programs(outputs.logs, command, signals) as programs:
                serve(Keeper(config, disk, outputs, programs))
        except Interrupted as stop:
            say(f"stopped by {stop}")
            sys.exit(128 + stop.number)


@contextmanager
def only_server(disk: Disk, outputs: OutputTree) -> Iterator[None]:
    """Hold the tree against a second serve: it has no trainer, and so no trainer's lock, while that starts again."""
    refuse_held(outputs.trainer_lock)
    claim = disk.claim(outputs.logs / ".serve.lock", "graftwork serve")
    try:
        yield
    finally:
        claim.release()


def serve(keeper: Keeper) -> None:
    """Raises Interrupted, ProgramFailed."""
    news = News(keeper.outputs)
    keeper.start_all()
    looked = time.monotonic()
    while True:
        if keeper.programs.signals.received is not None:
            raise Interrupted(keeper.programs.signals.received)
        keeper.tend()
        if time.monotonic() - looked >= LOOK_SECONDS:
            looked = time.monotonic()
            for line in news.lines():
                say(line)
        time.sleep(POLL_SECONDS)


def say(line: str) -> None:
    logs.say(line if logs.is_json() else f"{time.strftime('%H:%M:%S')} {line}")


# --- children ---------------------------------------------------------------------------------------------------------


@dataclass
class Kept:
    """A child that is kept up. proof: the JSON file in which it says, with its pid, that it is up. deaths: when it
    died, start_at: when it is started again, both in seconds of the monotonic clock."""

    name: str
    proof: Path
    write_settings: Callable[[], Path]
    up: bool = False
    was_up: bool = False
    deaths: list[float] = field(default_factory=list)
    start_at: float | None = None


@dataclass
class Keeper:
    """Starts the children, and starts them again. port: 0 until inference has one."""

    config: ServeConfig
    disk: Disk
    outputs: OutputTree
    programs: Programs
    kept: tuple[Kept, ...] = ()

    def __post_init__(self) -> None:
        self.port = self.config.inference.port or port_of_before(self.outputs, self.config.inference.host)
        inference = Kept("inference", ready_file(self.outputs), self.inference_toml)
        trainer = Kept("trainer", self.outputs.trainer_json, self.trainer_toml)
        self.kept = (trainer,) if self.config.inference.base_url is not None else (inference, trainer)

    def inference_toml(self) -> Path:
        inference = self.config.inference.model_copy(update={"port": self.port})
        return write_inference_toml(self.disk, self.outputs, self.config.model_copy(update={"inference": inference}))

    def trainer_toml(self) -> Path:
        return write_trainer_toml(self.disk, self.outputs, self.config, exit_when_done=False)

    def start_all(self) -> None:
        refuse_absent_vllm(self.config.inference)
        if (url := self.config.inference.base_url) is not None:
            refuse_absent_server(url)
            publish_served(self.disk, self.outputs, Served(os.getpid(), url, self.config.model))
        say(f"{' and '.join(child.name for child in self.kept)}: loading {self.config.model.path}")
        for child in self.kept:
            self.start(child)

    def start(self, child: Kept) -> None:
        child.up, child.start_at = False, None
        self.programs.start(child.name, child.write_settings())

    def tend(self) -> None:
        """Notice who is up, who died, and whose time to start again has come. Raises ProgramFailed."""
        for child in self.kept:
            program, now = self.programs.started[child.name], time.monotonic()
            if child.start_at is not None:
                if now >= child.start_at:
                    self.start(child)
            elif program.exit_code is not None:
                child.start_at = now + self.delay_after_death(child, now)
            elif not child.up and (about := said_by(child.proof, program.process.pid)):
                child.up = child.was_up = True
                self.came_up(child, about)

    def delay_after_death(self, child: Kept, now: float) -> float:
        """Seconds until it is started again. Raises ProgramFailed when it is not."""
        program = self.programs.started[child.name]
        if not child.was_up and (program.exit_code or 0) >= 0:
            raise ProgramFailed(describe_failure([program]))
        child.deaths.append(now)
        delay = restart_delay(child.deaths, now)
        if delay is None:
            raise ProgramFailed(
                f"the {child.name} ended more than {RESTARTS_MAX} times in {RESTARTS_WINDOW_SECONDS / 60:g} minutes; "
                f"it is not started again. The last time, {describe_failure([program])}"
            )
        say(f"the {child.name} {program.how_it_ended()}; {f'in {delay:g} s ' if delay else ''}it is started again")
        return delay

    def came_up(self, child: Kept, about: Mapping[str, Any]) -> None:
        if child.name == "trainer":
            say(f"the trainer is up: {self.config.trainer.slots} slots, watching {self.outputs.root}")
            return
        url = str(about["url"])
        self.port = urlsplit(url).port or self.port
        publish_served(self.disk, self.outputs, Served(os.getpid(), url, self.config.model))
        say(f"inference answers at {url}")


def restart_delay(deaths: Sequence[float], now: float) -> float | None:
    """Seconds until a child that has just died is started again; None: it died too often. Pure."""
    lately = sum(1 for death in deaths if now - death <= RESTARTS_WINDOW_SECONDS)
    if lately > RESTARTS_MAX:
        return None
    return 0.0 if lately <= 1 else FIRST_DELAY_SECONDS * 2.0 ** (lately - 2)


def port_of_before(outputs: OutputTree, host: str) -> int:
    """The port of an earlier serve, if it is free: orchestrators that live on look for inference there. Else 0."""
    try:
        served = read_served(outputs)
        port = (served and urlsplit(served.inference_url).port) or 0
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (Damaged, ValueError, OSError):
        return 0
    return port
