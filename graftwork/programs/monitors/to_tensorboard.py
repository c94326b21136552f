"""TensorBoard: event files, a new one a start, in the run's folder. `tensorboard --logdir outputs` shows all runs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftwork.errors import ConfigError
from graftwork.programs.report import shown


class TensorBoard:
    """A Monitor. An event holds all values of a step, so that it is there whole or not at all."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ConfigError(f"tensorboard is not installed ({error}): pip install 'graftwork[tensorboard]'") from None
        self.folders, self.writers = folders, dict[str, Any]()
        self.open_writer, self.Event, self.SessionLog, self.Summary = EventFileWriter, Event, SessionLog, Summary

    def logged(self, run: str) -> dict[tuple[int, str], float]:
        from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

        if not any(self.folders[run].glob("*tfevents*")):
            return {}
        events = EventAccumulator(str(self.folders[run]), size_guidance={SCALARS: 0})  # 0: all of them
        events.Reload()
        return {(event.step, name): event.value for name in events.Tags()[SCALARS] for event in events.Scalars(name)}

    def log(self, run: str, step: int, values: Mapping[str, float]) -> None:
        scalars = [self.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(run, step, summary=self.Summary(value=scalars))

    def begin_again(self, run: str) -> None:
        """TensorBoard drops what comes before a START of the same or an earlier step."""
        self._write(run, 0, session_log=self.SessionLog(status=self.SessionLog.START))

    def _write(self, run: str, step: int, **what: Any) -> None:
        if run not in self.writers:
            self.writers[run] = self.open_writer(str(self.folders[run]))
        self.writers[run].add_event(self.Event(wall_time=time.time(), step=step, **what))
        self.writers[run].flush()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()

    def hint(self) -> str:
        return f"tensorboard --logdir {shown(Path(os.path.commonpath(self.folders.values())))}"
