"""Kinds of bad neighbours that mean it: links into other runs, pipes, numbers and names that nobody expects."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from graftwork.config.load import dump
from proofs.neighbour_kinds import (
    HOUR_SECONDS,
    Columns,
    Kind,
    Offender,
    after_an_hour,
    after_steps,
    forged,
    put,
)

DIGITS = 4300
"""More than Python turns into text."""


def with_unsigned_offsets(offender: Offender, columns: Columns, about: dict[str, Any]) -> None:
    """Their differences wrap around instead of falling below 0."""
    offsets = columns["offsets"].astype(np.uint64)
    offsets[[1, 2]] = offsets[[2, 1]]
    columns["offsets"] = offsets


def of_a_run_that_is_no_text(offender: Offender, columns: Columns, about: dict[str, Any]) -> None:
    about["run"] = "\ud800"


def of_a_run_with_a_long_name(offender: Offender, columns: Columns, about: dict[str, Any]) -> None:
    about["run"] = "x" * 2**20


def hide_behind_trash(offender: Offender) -> None:
    """There is no place to set its bad batch aside."""
    shutil.rmtree(offender.tree.trash, ignore_errors=True)
    offender.tree.trash.write_bytes(b"")
    offender.forge(put("advantages", float("nan")))


def link_to_another_runs_batches(offender: Offender) -> None:
    """And then it is silent: what it wrote now, it would write into the good run's folder itself."""
    offender.silent = True
    if offender.tree.rollouts.exists():
        shutil.rmtree(offender.tree.rollouts)
    offender.tree.rollouts.symlink_to(offender.scene.good.rollouts)


def once_the_others_batch_is_there(offender: Offender) -> bool:
    assert offender.struck is not None
    return offender.scene.good.batch(offender.struck + 1).exists()


def link_to_another_runs_checkpoints(offender: Offender) -> None:
    shutil.rmtree(offender.tree.checkpoints)
    offender.tree.checkpoints.symlink_to(offender.scene.good.checkpoints)
    offender.publish(offender.batch())


def link_to_another_run(offender: Offender) -> None:
    (offender.scene.outputs.root / "run_zz").symlink_to(offender.scene.good.root)


def last_in_line_for_ever(offender: Offender) -> None:
    """Asks anew, with a place in line that no number follows."""
    config = dump(offender.config.model_copy(update={"resume": True}))
    offender.tree.orch_toml.write_bytes(config)
    text = offender.tree.status_json.read_text()
    text = re.sub(r'"arrival": \d+', f'"arrival": {"9" * DIGITS}', text)
    text = re.sub(r'"orch_digest": "[0-9a-f]+"', f'"orch_digest": "{hashlib.sha256(config).hexdigest()}"', text)
    offender.tree.status_json.write_text(text)


def pipe_of_metrics(offender: Offender) -> None:
    """Whoever opens a pipe waits for its other end."""
    offender.tree.metrics_jsonl.unlink(missing_ok=True)
    os.mkfifo(offender.tree.metrics_jsonl)
    offender.publish(offender.batch())


def jump_an_hour(offender: Offender) -> None:
    """A pass that takes an hour, while the good run's batch is there."""
    offender.silent = True
    offender.scene.clock.now += HOUR_SECONDS + 1


TRICKS: Mapping[str, Kind] = {
    "unsigned offsets": Kind(forged(with_unsigned_offsets), "offsets"),
    "run that is no text": Kind(forged(of_a_run_that_is_no_text), "is batch"),
    "run with a long name": Kind(forged(of_a_run_with_a_long_name), "is batch"),
    "trash that is a file": Kind(hide_behind_trash, "advantage nan"),
    "link to another run's batches": Kind(
        link_to_another_runs_batches, "symbolic link", visible=once_the_others_batch_is_there
    ),
    "link to another run's checkpoints": Kind(
        link_to_another_runs_checkpoints, "symbolic link", visible=after_steps(0)
    ),
    "link to another run": Kind(link_to_another_run, "", "goes on"),
    "last in line": Kind(last_in_line_for_ever, "", "goes on"),
    "pipe as metrics.jsonl": Kind(pipe_of_metrics, "metrics.jsonl", visible=after_steps(0)),
    "an hour at once": Kind(jump_an_hour, "no batch", "evicted", after_an_hour),
}
