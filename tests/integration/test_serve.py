"""`graftwork serve` over small fake programs (fake_services.py): who is started again, and what ends it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fake_services import FREE_PORT

from graftwork.config.load import build
from graftwork.config.schema import ServeConfig
from graftwork.config.section import ModelConfig
from graftwork.errors import Busy, Damaged, ProgramFailed
from graftwork.programs import serve
from graftwork.programs.processes import PARENT_VARIABLE
from graftwork.programs.start import Served, publish_served, read_served
from graftwork.store.disk import Disk
from graftwork.store.files import read_json
from graftwork.store.layout import OutputTree, RunId
from graftwork.store.status import Status, write_status

FAKES = (sys.executable, str(Path(__file__).with_name("fake_services.py")))
WAIT_SECONDS = 60.0


def config(tmp_path: Path) -> ServeConfig:
    values = {"model": {"path": str(tmp_path)}, "output_dir": str(tmp_path / "outputs"), "trainer": {"slots": 3}}
    return build(ServeConfig, values, source="test")


def until(true: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + WAIT_SECONDS
    while not (found := true()):
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.05)
    return found


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@dataclass
class Server:
    """`graftwork serve` over the fakes as a process of its own."""

    process: subprocess.Popen[bytes]
    outputs: OutputTree
    words: Path

    def pid_of(self, program: str) -> int:
        file = self.outputs.trainer_json if program == "trainer" else self.outputs.logs / "inference.json"
        try:
            return int(read_json(file, program)["pid"])
        except Damaged:
            return 0

    def until_said(self, words: str) -> None:
        until(lambda: words in self.words.read_text() or self.process.poll() is not None, f"serve says {words!r}")
        assert words in self.words.read_text()

    def kill(self, program: str) -> int:
        """SIGKILL a child; the pid of the one that came after it."""
        old = self.pid_of(program)
        os.kill(old, signal.SIGKILL)
        return int(until(lambda: (new := self.pid_of(program)) != old and new, f"the {program} is back"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    words = tmp_path / "stderr"
    with words.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, __file__, str(tmp_path)], stderr=stderr)
    started = Server(process, OutputTree(tmp_path / "outputs"), words)
    started.until_said("inference answers at")
    started.until_said("the trainer is up")
    yield started
    if process.poll() is None:
        process.terminate()
    process.wait(WAIT_SECONDS)


def test_children_that_are_killed_come_back_where_they_were(server: Server) -> None:
    served = read_served(server.outputs)
    assert served is not None and (served.pid, served.inference_url) == (
        server.process.pid, f"http://127.0.0.1:{FREE_PORT}",
    )  # fmt: skip
    assert tomllib.loads((server.outputs.logs / "inference.toml").read_text())["port"] == 0
    for program in ("inference", "trainer"):
        assert alive(server.kill(program))
        server.until_said(f"the {program} was killed by SIGKILL")
    assert tomllib.loads((server.outputs.logs / "inference.toml").read_text())["port"] == FREE_PORT
    assert read_served(server.outputs) == served
    assert server.process.poll() is None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_children_end_with_serve(server: Server, number: signal.Signals, code: int) -> None:
    children = [server.pid_of("inference"), server.pid_of("trainer")]
    assert all(alive(pid) for pid in children)
    server.process.send_signal(number)
    assert server.process.wait(WAIT_SECONDS) == code
    until(lambda: not any(alive(pid) for pid in children), "no child is left")


def test_runs_that_change_are_told(server: Server) -> None:
    tree, disk = server.outputs.run(RunId("alpha")), Disk()
    disk.make_folder(tree.status_json.parent)
    write_status(disk, tree, Status("alpha", "active", "a" * 64, 1, admitted=True, slot=0, step=0))
    server.until_said("run alpha: active in slot 0 at step 0")
    write_status(disk, tree, Status("alpha", "failed", "a" * 64, 1, admitted=True, step=3, reason="batch 4 is damaged"))
    server.until_said("run alpha: failed at step 3: batch 4 is damaged")
    removed = [{"run": "beta", "step": 7, "time": 5.0}]
    disk.publish_json(server.outputs.liveness_json, {"pid": 1, "time": time.time(), "runs": {}, "removed": removed})
    server.until_said("run beta: removed at step 7")
    assert server.words.read_text().count("run alpha: active") == 1


def test_a_second_serve_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(Busy, match="in use by a trainer, pid"):
        serve.main(config(tmp_path), FAKES)
    assert server.process.poll() is None


def test_serve_holds_its_place_while_its_trainer_is_away(tmp_path: Path) -> None:
    claim = Disk().claim(OutputTree(tmp_path / "outputs").logs / ".serve.lock", "graftwork serve")
    with pytest.raises(Busy, match="in use by graftwork serve, pid"):
        serve.main(config(tmp_path), FAKES)
    claim.release()


def test_a_first_start_that_fails_ends_serve_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_INFERENCE", "port taken")
    with pytest.raises(ProgramFailed, match=r"(?s)the inference ended with exit code 1; .*the port is taken"):
        serve.main(config(tmp_path), FAKES)
    assert not OutputTree(tmp_path / "outputs").serve_json.exists()


def test_a_child_that_dies_again_and_again_ends_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_INFERENCE", "dies")
    monkeypatch.setattr(serve, "RESTARTS_MAX", 2)
    monkeypatch.setattr(serve, "FIRST_DELAY_SECONDS", 0.1)
    with pytest.raises(ProgramFailed, match=r"(?s)the inference ended more than 2 times in 10 minutes.*engine broke"):
        serve.main(config(tmp_path), FAKES)
    assert capfd.readouterr().err.count("it is started again") == 2


def test_the_port_of_before_is_taken_again_if_it_is_free(tmp_path: Path) -> None:
    outputs = OutputTree(tmp_path)
    assert serve.port_of_before(outputs, "127.0.0.1") == 0
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        publish_served(Disk(), outputs, Served(1, f"http://127.0.0.1:{port}", ModelConfig(path="base")))
        assert serve.port_of_before(outputs, "127.0.0.1") == 0
    assert serve.port_of_before(outputs, "127.0.0.1") == port


def test_restarts_wait_longer_and_longer_and_end() -> None:
    deaths: list[float] = []
    delays = []
    for second in range(serve.RESTARTS_MAX + 1):
        deaths.append(float(second))
        delays.append(serve.restart_delay(deaths, float(second)))
    assert delays == [0, 1, 2, 4, 8, None]
    assert serve.restart_delay(deaths, serve.RESTARTS_WINDOW_SECONDS + 4.5) == 0


if __name__ == "__main__":
    os.environ.pop(PARENT_VARIABLE, None)
    serve.main(config(Path(sys.argv[1])), FAKES)
