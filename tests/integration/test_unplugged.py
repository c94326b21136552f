"""A sample of `make proof-engines`: one of each kind that is quick, in random order."""

import random
from pathlib import Path

from proofs.engines import KINDS, Stage, trials

QUICK = (
    "the server is killed", "the environment raises too often", "the environment hangs now and then",
    "the disk of the samples is full",
)  # fmt: skip


def test_runs_go_on_or_stop_with_the_reason_whatever_is_unplugged(tmp_path: Path) -> None:
    rng = random.Random(1)
    stage = Stage.open(tmp_path)
    try:
        held, failures = trials(stage, rng.sample(QUICK, len(QUICK)), rng)
    finally:
        stage.close()
    assert set(QUICK) < set(KINDS)
    assert (failures, held.total()) == ([], len(QUICK))
