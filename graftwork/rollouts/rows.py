"""Conversations and prompts from files: JSONL, or what `datasets` reads (optional: graftwork[datasets])."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from graftwork.errors import ConfigError
from graftwork.rollouts.environment import Message

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Suffix of a local file -> the builder of `datasets` that reads it."""


@dataclass(frozen=True)
class Row:
    """where: for messages, `data.jsonl, line 3`."""

    where: str
    columns: Mapping[str, Any]


def jsonl_rows(path: Path) -> list[Row]:
    """The objects of a JSONL file; empty lines are passed over. Raises ConfigError, naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            columns = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: expected a JSON object ({error})") from None
        if not isinstance(columns, dict):
            raise ConfigError(f"{where}: expected a JSON object, found a {type(columns).__name__}")
        rows.append(Row(where, columns))
    return _some(rows, str(path))


def dataset_rows(name: str, split: str, revision: str | None = None) -> list[Row]:
    """All rows of a split, in memory. `name`: a folder that `save_to_disk` made, another folder or a file of data, or a
    hub id (`revision`: of the hub's repository).

    No code of a dataset is ever run: `trust_remote_code` is not passed. Raises ConfigError, also where the package is
    not installed.
    """
    try:
        import datasets  # optional, and slow to import
    except ImportError as error:
        raise ConfigError(
            f"dataset {name!r} needs the package datasets ({error}): pip install 'graftwork[datasets]', or give a "
            "JSONL file as path"
        ) from None
    datasets.disable_progress_bars()
    what = f"dataset {name!r}, split {split!r}"
    try:
        found = _load(datasets, Path(name), name, split, revision)
    except (OSError, ValueError, LookupError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"{what}: cannot be read ({type(error).__name__}: {error})") from None
    return _some([Row(f"{what}, row {number}", columns) for number, columns in enumerate(found)], what)


def _load(datasets: Any, place: Path, name: str, split: str, revision: str | None) -> Any:
    if revision is not None and place.exists():
        raise ValueError("revision belongs to a dataset of the hub, this one is local")
    if (place / "dataset_dict.json").is_file() or (place / "dataset_info.json").is_file():
        saved = datasets.load_from_disk(name)
        if isinstance(saved, datasets.Dataset):
            if split != "train":
                raise ValueError("it was saved without splits: leave split as it is, 'train'")
            return saved
        if split not in saved:
            raise ValueError(f"its splits are {', '.join(saved)}")
        return saved[split]
    if place.is_file():
        if (reader := READERS.get(place.suffix)) is None:
            raise ValueError(f"expected a file of {', '.join(READERS)}")
        return datasets.load_dataset(reader, data_files=name, split=split)
    return datasets.load_dataset(name, split=split, revision=revision)


def _some(rows: list[Row], what: str) -> list[Row]:
    if not rows:
        raise ConfigError(f"{what} holds no row")
    return rows


def messages_of(row: Row, column: str) -> list[Message]:
    """The conversation in `column`, as the chat template takes it. Raises ConfigError, naming the row.

    What a message has beside role and content goes to the template too, but for what is null: tables fill the fields
    that other rows have with null.
    """
    messages = row.columns.get(column)
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise ConfigError(
            f'{row.where}: expected {column} = [{{"role": text, "content": text}}, ...], found {str(messages)[:200]!r}'
        )
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
