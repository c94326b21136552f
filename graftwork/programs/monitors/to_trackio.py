"""trackio, locally: one SQLite file, no Space and no network. `trackio show` opens its dashboard.

trackio keeps one folder a process, named by TRACKIO_DIR when it is imported. So it is the run's own folder, and one run
a process; or, where TRACKIO_DIR is set, that one, for as many runs as are named.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from graftwork.errors import ConfigError
from graftwork.programs.report import shown

PROJECT = "graftwork"
FOLDER = "TRACKIO_DIR"
ELSEWHERE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "TRACKIO_WEBHOOK_URL")
"""Variables that would have trackio send what it is given to another machine."""


class Trackio:
    """A Monitor. One run is open at a time: that is how trackio has it."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        if given := [name for name in ELSEWHERE if os.environ.get(name)]:
            raise ConfigError(f"{given[0]} is set, and this command keeps everything here: unset it")
        if len(folders) > 1 and not os.environ.get(FOLDER):
            raise ConfigError(
                f"{len(folders)} runs, and trackio keeps one folder a process: name one run, or set {FOLDER} to a "
                "folder for all of them"
            )
        folder = Path(os.environ.setdefault(FOLDER, str(next(iter(folders.values())))))
        os.environ["HF_HUB_OFFLINE"] = "1"  # else it asks the hub who we are
        try:
            import trackio
            from trackio.sqlite_storage import SQLiteStorage
        except ImportError as error:
            raise ConfigError(f"trackio is not installed ({error}): pip install 'graftwork[trackio]'") from None
        if folder != trackio.utils.TRACKIO_DIR:
            raise ConfigError(f"trackio writes to {trackio.utils.TRACKIO_DIR} in this process, expected {folder}")
        self.trackio, self.storage, self.folder = trackio, SQLiteStorage, folder
        self.name = ""
        self.run: Any = None

    def logged(self, run: str) -> dict[tuple[int, str], float]:
        return {
            (row["step"], name): float(value)
            for row in self.storage.get_logs(PROJECT, run)
            for name, value in row.items()
            if name not in ("step", "timestamp")
        }

    def log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        if run != self.name:
            self.close()
            with redirect_stdout(StringIO()):  # it says at length how to open the dashboard
                self.run = self.trackio.init(
                    PROJECT, name=run, resume="allow", embed=False, auto_log_gpu=False, auto_log_cpu=False
                )
            self.name = run
        self.run.log(dict(values), step=step)

    def begin_again(self, run: str) -> None:
        self.close()  # what it still has in hand would come after
        self.storage.delete_run(PROJECT, run)

    def close(self) -> None:
        if self.name:
            with redirect_stdout(StringIO()):
                self.trackio.finish()
            self.name = ""

    def hint(self) -> str:
        return f"{FOLDER}={shown(self.folder)} trackio show --project {PROJECT}"
