"""TOML files and command-line overrides to typed sections, and back.

pydantic-settings parses the flags (`--run.max_steps 25`), pydantic checks the values; this module only says it better:
an unknown key is refused with the nearest known name.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsError

from graftwork.errors import ConfigError

T = TypeVar("T", bound=BaseModel)
FREE = "options"
"""What tables are called whose keys the schema does not know: what a factory of the user's takes. On the command line
such a table replaces the file's: an option of another environment would be in the way."""


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """Raises ConfigError, naming `source` and the line."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, or an integer of thousands of digits
        raise ConfigError(f"{source} is not TOML: {error}") from None


def load(section: type[T], path: Path, overrides: Sequence[str] = ()) -> T:
    """The section in the TOML file `path`, with flags like `--run.seed 3` laid over it. Raises ConfigError."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise ConfigError(f"no configuration file at {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    source = f"{path} and the command line" if overrides else str(path)
    return build(section, parse_toml(text, str(path)), overrides, source=source)


def build(section: type[T], values: dict[str, Any], overrides: Sequence[str] = (), *, source: str) -> T:
    """The section made of `values`; `source` is named in errors. Raises ConfigError with every mistake at once."""
    _refuse_unknown_flags(section, overrides)
    flags = list(_free_tables_checked([_spelled(word) for word in overrides]))
    try:
        return section.model_validate(_merge(values, _parse_flags(section, flags)))
    except SettingsError as error:
        raise ConfigError(f"command line: {error.__cause__ or error}") from None
    except ValidationError as error:
        raise ConfigError(describe(error, section, source)) from None


def describe(error: ValidationError, section: type[BaseModel], source: str) -> str:
    """One line a mistake: the dotted key, what is wrong, and the nearest known key for an unknown one."""
    known = list(keys(section))
    lines = []
    for mistake in error.errors():
        key = ".".join(str(part) for part in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            lines.append(f"{key}: no such key{_nearest(key, known)}")
        elif mistake["type"] == "missing":
            lines.append(f"{key}: must be given")
        else:
            given = f" (given: {mistake['input']!r})" if key and not isinstance(mistake["input"], dict) else ""
            lines.append(f"{key or 'file'}: {mistake['msg'].removeprefix('Value error, ')}{given}")
    return f"{source}: " + "\n  ".join(["the configuration was refused", *lines])


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key of a section, tables included."""
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in _sections_in(field.annotation):
            yield from keys(inner, f"{prefix}{name}.")


def dump(section: BaseModel) -> bytes:
    """TOML that `load` reads back to an equal section; unset values (None) are left out."""
    return tomli_w.dumps(section.model_dump(mode="json", exclude_none=True)).encode()


def digest(data: bytes) -> str:
    """Names one state of a configuration file: `status.json` says which one the trainer acted on."""
    return hashlib.sha256(data).hexdigest()


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else [annotation]
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not close:
        leaf = key.rpartition(".")[2]
        close = [name for name in known if name.rpartition(".")[2] == leaf][:1]
    return f"; did you mean {close[0]}?" if close else ""


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, table by table; a free table takes the place of the other."""
    merged = dict(below)
    for key, value in above.items():
        both = key != FREE and isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _merge(below[key], value) if both else value
    return merged


def _parse_flags(section: type[BaseModel], flags: Sequence[str]) -> dict[str, Any]:
    """What the flags set, as nested tables. Raises SettingsError."""
    if not flags:
        return {}
    settings = type("Flags", (section, BaseSettings), {})
    return CliSettingsSource(settings, cli_parse_args=list(flags), cli_exit_on_error=False)()


def _spelled(word: str) -> str:
    """`--output-dir` is `--output_dir`."""
    if not word.startswith("--"):
        return word
    key, equals, value = word.partition("=")
    return f"--{key[2:].replace('-', '_')}{equals}{value}"


def _free_tables_checked(flags: Sequence[str]) -> Iterator[str]:
    """The flags, where what sets a free table is a JSON object: `null` is an empty one. Raises ConfigError."""
    words = iter(flags)
    for word in words:
        key, equals, value = word.partition("=")
        if not word.startswith("--") or key.rpartition(".")[2] != FREE:
            yield word
            continue
        text = value if equals else next(words, "")
        try:
            table = json.loads(text)
            tomli_w.dumps(table or {})
            as_json = json.dumps(table or {}, allow_nan=False)
        except (ValueError, RecursionError, TypeError, AttributeError):  # no JSON, or what no TOML file can hold
            table = text
        if table is not None and not isinstance(table, dict):
            raise ConfigError(
                f'command line: {key} takes a JSON object, such as \'{{"path": "questions.jsonl"}}\', or '
                f"null for none (given: {text!r})"
            )
        yield f"{key}={as_json}"


def _refuse_unknown_flags(section: type[BaseModel], overrides: Sequence[str]) -> None:
    known = list(keys(section)) if overrides else []
    for argument in overrides:
        if not argument.startswith("--"):
            continue
        key = _spelled(argument)[2:].partition("=")[0]
        if key in known:
            continue
        table, _, option = key.rpartition(".")
        if table in known and table.rpartition(".")[2] == FREE:
            raise ConfigError(f"command line: --{key}: options are given together: --{table} '{{\"{option}\": ...}}'")
        raise ConfigError(f"command line: {argument.partition('=')[0]} is no setting{_nearest(key, known)}")
