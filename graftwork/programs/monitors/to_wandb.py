"""W&B, offline: no login and no network. A start is a W&B run of its own, in a group that is named like the run.

`wandb sync` uploads the folders, whenever a person wants that. What a folder holds is read from its `.wandb` file: a
log of records in blocks of 32 KiB, as LevelDB lays them out, each record a protobuf message.
"""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from graftwork.errors import ConfigError
from graftwork.programs.report import shown

PROJECT = "graftwork"
ANEW = "began_again"
FILE_HEADER_BYTES = 7
BLOCK_BYTES = 32 * 1024
PIECE = struct.Struct("<IHB")
"""Of each piece of a record: checksum, bytes, and whether it is all of it, its first part, one between or its last."""
WHOLE, FIRST, BETWEEN, LAST = 1, 2, 3, 4
QUIET = {
    "silent": True, "console": "off", "save_code": False, "disable_git": True, "x_disable_stats": True,
    "x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False,
}  # fmt: skip
"""Values go in, and nothing about the machine or the code that this command happens to run on."""


class WeightsAndBiases:
    """A Monitor. The step is a value of its own (`step`), since W&B's own count only goes up. What was logged cannot be
    taken back, so beginning again is a new W&B run, whose configuration says so; a W&B run's id is the time of its
    start, so that the names of the folders tell their order."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # read by `import wandb`: a crash of W&B is not reported either
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"wandb is not installed ({error}): pip install 'graftwork[wandb]'") from None
        self.folders, self.wandb = folders, wandb
        self.open = dict[str, Any]()
        self.anew = set[str]()
        """Runs that begin again with the next thing that is logged."""

    def logged(self, run: str) -> dict[tuple[int, str], float]:
        found: dict[tuple[int, str], float] = {}
        for file in sorted(self.folders[run].glob("wandb/offline-run-*/*.wandb")):
            anew, lines = read(file)
            found = {} if anew else found
            for line in lines:
                found.update({(int(line["step"]), n): float(v) for n, v in line.items() if n[0] != "_" and n != "step"})
        return found

    def log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        if run not in self.open:
            self.open[run] = self.wandb.init(
                id=str(time.time_ns()), project=PROJECT, group=run, name=run, config={ANEW: run in self.anew},
                dir=str(self.folders[run]), mode="offline", reinit="create_new", settings=self.wandb.Settings(**QUIET),
            )  # fmt: skip
            self.open[run].define_metric("*", step_metric="step")
            self.anew.discard(run)
        self.open[run].log({"step": step, **values})

    def begin_again(self, run: str) -> None:
        if run in self.open:
            self.open.pop(run).finish()
        self.anew.add(run)

    def close(self) -> None:
        for run in self.open.values():
            run.finish()
        self.wandb.teardown()  # `finish` alone may return before the file is written (wandb 0.31, offline)

    def hint(self) -> str:
        return f"wandb sync {' '.join(f'{shown(folder)}/wandb/offline-run-*' for folder in self.folders.values())}"


def read(file: Path) -> tuple[bool, list[dict[str, Any]]]:
    """(whether it began again, what was logged: a dict a call of `log`, in order); a torn end is left out."""
    from wandb.proto.wandb_internal_pb2 import Record

    anew, lines = False, list[dict[str, Any]]()
    for data in records(file.read_bytes()):
        record = Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            anew = anew or any(item.key == ANEW and item.value_json == "true" for item in record.run.config.update)
        elif kind == "history":
            items = record.history.item
            lines.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return anew, lines


def records(data: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file."""
    place, parts = FILE_HEADER_BYTES, list[bytes]()
    while True:
        if BLOCK_BYTES - place % BLOCK_BYTES < PIECE.size:  # no room for a piece: the next block begins
            place += BLOCK_BYTES - place % BLOCK_BYTES
        if place + PIECE.size > len(data):
            return
        _, size, kind = PIECE.unpack_from(data, place)
        place += PIECE.size
        if place + size > len(data) or kind not in (WHOLE, FIRST, BETWEEN, LAST):
            return
        parts = [*([] if kind in (WHOLE, FIRST) else parts), data[place : place + size]]
        place += size
        if kind in (WHOLE, LAST):
            yield b"".join(parts)
