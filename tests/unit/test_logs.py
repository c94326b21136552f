"""What programs say while they run: text for people, JSON by option, and how it is read again."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from graftwork import logs
from graftwork.errors import ConfigError
from graftwork.logs import JsonFormatter, plain_lines
from graftwork.programs.processes import Program, open_log
from graftwork.programs.progress import ProgressView

ROOT = Path(__file__).parents[2]
ROW = {"step": 3, "loss": 0.25, "grad_norm": float("nan"), "tokens_per_second": 1234.5, "version": "a@3-0"}


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, "json")
    monkeypatch.setattr(sys, "argv", ["graftwork", "sft", "sft.toml"])


def record(message: str, *arguments: Any, **more: Any) -> logging.LogRecord:
    facts = {"name": "graftwork.x", "levelname": "INFO", "msg": message, "args": arguments, "created": 0.25}
    return logging.makeLogRecord({**facts, **more})


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, "sft"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip


# --- one line ---------------------------------------------------------------------------------------------------------


def test_a_record_is_an_object(as_json: None) -> None:
    assert json.loads(JsonFormatter().format(record("two\n%s", "lines"))) == {
        "time": "1970-01-01T00:00:00.250+00:00", "level": "INFO", "program": "sft", "logger": "graftwork.x",
        "message": "two\nlines",
    }  # fmt: skip
    assert json.loads(JsonFormatter(rank=2).format(record("x")))["rank"] == 2


def test_a_steps_figures_stand_beside_the_rest(as_json: None) -> None:
    text = JsonFormatter().format(record("step", row={**ROW, "message": "not this one"}))
    assert "\n" not in text and "NaN" not in text
    found = json.loads(text)
    assert (found["message"], found["loss"], found["grad_norm"], found["version"]) == ("step", 0.25, None, "a@3-0")


def test_an_exception_is_in_its_line(as_json: None) -> None:
    try:
        raise ValueError("ours")
    except ValueError:
        found = json.loads(JsonFormatter().format(record("a bug", exc_info=sys.exc_info())))
    assert found["message"] == "a bug" and found["traceback"].endswith("ValueError: ours")


# --- a process --------------------------------------------------------------------------------------------------------

CODE = """
import logging, sys, threading, warnings
from graftwork import logs
logs.set_up()
logging.getLogger("graftwork.x").info("said")
warnings.warn("beware")
thread = threading.Thread(target=lambda: 1 / 0)
thread.start(); thread.join()
logs.say("for people", row={"step": 1})
logs.say_error("why it ends")
raise ValueError("a bug")
"""


def test_all_that_a_process_says_is_json(tmp_path: Path) -> None:
    done = python(CODE, GRAFTWORK_LOG_FORMAT="json")
    found = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1
    assert [(one["level"], one["message"].splitlines()[0].rpartition(": ")[2]) for one in found] == [
        ("INFO", "said"), ("WARNING", "beware"), ("CRITICAL", "division by zero"), ("INFO", "for people"),
        ("ERROR", "why it ends"), ("CRITICAL", "a bug"),
    ]  # fmt: skip
    assert found[3]["step"] == 1 and "ValueError: a bug" in found[5]["traceback"]


def test_text_is_for_people() -> None:
    lines = python(CODE, GRAFTWORK_LOG_FORMAT="text").stderr.splitlines()
    assert lines[0].endswith(" INFO said")
    assert {"for people", "error: why it ends", "Traceback (most recent call last):", "ValueError: a bug"} <= {*lines}


def test_a_format_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, "yaml")
    with pytest.raises(ConfigError, match="GRAFTWORK_LOG_FORMAT is 'yaml'; there are: text, json"):
        logs.set_up()


@pytest.mark.parametrize("way", ["option", "variable"])
def test_the_command_line_takes_either(way: str) -> None:
    option = ["--log-format", "json"] if way == "option" else []
    command = [sys.executable, "-m", "graftwork", "rl", "none.toml", "--run.seed", "3", *option]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **({logs.VARIABLE: "json"} if way == "variable" else {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = json.loads(done.stderr)
    assert done.returncode == 1
    assert (found["program"], found["level"]) == ("rl", "ERROR")
    assert found["message"].startswith("error: no configuration file at none.toml")


# --- read again -------------------------------------------------------------------------------------------------------


def test_a_log_is_read_as_people_read_it(as_json: None) -> None:
    log = "\n".join(["plain", "", logs.line("two\nlines"), '{"no": "message"}', "{torn"])
    assert plain_lines(log) == ["plain", "two", "lines", '{"no": "message"}', "{torn"]


def test_the_last_words_of_a_program(as_json: None, tmp_path: Path) -> None:
    path = tmp_path / "trainer.log"
    path.write_text(f"{logs.line('error: of an earlier start')}\n")
    descriptor, start = open_log(path, "graftwork trainer FILE")
    os.write(descriptor, f"{logs.line('loading')}\n".encode())
    program = Program("trainer", subprocess.Popen(["true"]), path, start)
    assert program.last_words() == ["loading"]
    os.write(descriptor, f"{logs.line('error: no base', logging.ERROR)}\n{logs.line('bye')}\n".encode())
    os.close(descriptor)
    program.process.wait()
    assert program.last_words() == ["error: no base", "bye"]
    assert all(json.loads(line) for line in path.read_text().splitlines())


# --- progress ---------------------------------------------------------------------------------------------------------


def progress(*, terminal: bool) -> str:
    """What the console got of two steps."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    with ProgressView(4, console) as view:
        view.begin(2)
        view.show(ROW)
        view.show({**ROW, "step": 4, "reward": 0.5})
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_step_that_learned_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressView(4, Console(file=io.StringIO())) as view:
        view.begin(0)
        view.show({"step": 1, "reward": 0.0, "grad_norm": 0.0, "equal_groups": 64})
        view.show({"step": 2, "reward": 0.0, "grad_norm": 0.1, "equal_groups": 63})
        view.show({"step": 3, "loss": 0.0, "grad_norm": 0.0})  # of sft
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("nothing learned: the gradient is 0 (64 groups of equal rewards)")
    assert not any("nothing learned" in line for line in said[1:])


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = progress(terminal=True)
    assert "3/4" in drawn and "loss 0.250" in drawn and "reward 0.500" in drawn
    assert capsys.readouterr().err == ""


def test_a_line_a_step_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert progress(terminal=False) == ""
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("step 3/4  loss 0.250  1,234 tokens/s  0:00 left")
    assert last.startswith("step 4/4  reward 0.500")


def test_an_object_a_step_also_on_a_terminal(as_json: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert progress(terminal=True) == ""
    found = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [(one["step"], one["loss"], one["grad_norm"]) for one in found] == [(3, 0.25, None), (4, 0.25, None)]
