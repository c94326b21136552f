"""What programs say while they run: lines on stderr, for people or one JSON object each.

    text   time level message
    json   {"time", "level", "program", "logger", "message"}, and of a step the figures of its line in metrics.jsonl

GRAFTWORK_LOG_FORMAT says which to a command, and to the programs that it starts.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

from graftwork.errors import ConfigError

VARIABLE = "GRAFTWORK_LOG_FORMAT"
FORMATS = ("text", "json")
QUIET = {"httpx": logging.WARNING, "httpcore": logging.WARNING, "asyncio": logging.WARNING,
         "matplotlib": logging.WARNING, "tensorboard": logging.ERROR}  # fmt: skip
"""tensorboard warns of what it dropped where a run began again, as it was asked to."""


def is_json() -> bool:
    return os.environ.get(VARIABLE) == "json"


def set_up(rank: int | None = None, *, anew: bool = False) -> None:
    """One place for every program. rank: of several that write into one log; of the others than 0, only what went
    wrong. anew: whatever was set up before. Raises ConfigError when the variable names no format."""
    if (given := os.environ.get(VARIABLE, "text")) not in FORMATS:
        raise ConfigError(f"{VARIABLE} is {given!r}; there are: {', '.join(FORMATS)}")
    handler = logging.StreamHandler(sys.stderr)
    signed = "" if rank is None else f"rank {rank} "
    text = logging.Formatter(f"%(asctime)s {signed}%(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter(rank) if is_json() else text)
    handler.setLevel(logging.WARNING if rank else logging.INFO)
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=anew)
    for chatty, level in QUIET.items():
        logging.getLogger(chatty).setLevel(level)
    if is_json():
        logging.captureWarnings(True)
        sys.excepthook = _uncaught
        threading.excepthook = lambda args: _uncaught(args.exc_type, args.exc_value, args.exc_traceback)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON. What came with it as `row` (`extra={"row": ...}`) stands beside the rest; NaN and
    infinity become null, and of two values of one name the record's own is kept."""

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        self.rank = rank

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "program": sys.argv[1] if len(sys.argv) > 1 else "graftwork",
            **({} if self.rank is None else {"rank": self.rank}),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        row: Mapping[str, Any] = getattr(record, "row", {})
        return json.dumps({**fields, **{name: _finite(row[name]) for name in row if name not in fields}}, default=str)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def line(message: str, level: int = logging.INFO, row: Mapping[str, Any] | None = None) -> str:
    """What a program says to people, as it is; in JSON, an object like any other."""
    if not is_json():
        return message
    facts = {"name": "graftwork", "levelno": level, "levelname": logging.getLevelName(level), "msg": message}
    return JsonFormatter().format(logging.makeLogRecord({**facts, "row": row or {}}))


def say(message: str, *, row: Mapping[str, Any] | None = None, stream: TextIO | None = None) -> None:
    """stream: stderr, where none is given."""
    _write(line(message, row=row), stream or sys.stderr)


def say_error(error: object) -> None:
    """Why this program ends. `plain_lines` of its log then has a line that begins with `error: `."""
    _write(line(f"error: {error}", logging.ERROR), sys.stderr)


def _write(text: str, stream: TextIO) -> None:
    stream.write(f"{text}\n")  # in one piece: others may write into the same log
    stream.flush()


def plain_lines(log: str) -> list[str]:
    """The lines of a log that are not empty; of JSON, those of its messages and tracebacks."""
    return [part for one in log.splitlines() for part in _of_json(one) or [one] if part.strip()]


def _of_json(text: str) -> list[str]:
    try:
        found = json.loads(text) if text.startswith("{") else None
    except (ValueError, RecursionError):
        return []
    if not isinstance(found, dict) or "message" not in found:
        return []
    return "\n".join(str(found[key]) for key in ("message", "traceback") if key in found).splitlines()


def _uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    exc_info = None if error is None else (kind, error, trace)
    logging.getLogger("graftwork").critical("%s: %s", kind.__name__, error, exc_info=exc_info)
