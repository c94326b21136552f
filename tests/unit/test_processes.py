"""What started programs find in their environment."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest

from graftwork.programs.loading import loading
from graftwork.programs.processes import Programs, noted_signals, start_detached

COMMAND = (sys.executable, "-c", "import os; print('hash seed', os.environ['PYTHONHASHSEED'], hash('a'))")


@pytest.mark.parametrize(("given", "found"), [(None, "0"), ("7", "7"), ("random", "random")])
def test_the_hash_seed_of_started_programs_is_0_or_what_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, found: str
) -> None:
    if given is None:
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    else:
        monkeypatch.setenv("PYTHONHASHSEED", given)
    with noted_signals() as signals, Programs(tmp_path, COMMAND, signals) as programs:
        assert programs.start("orchestrator", tmp_path).process.wait() == 0
    os.waitpid(start_detached(COMMAND, "orchestrator", tmp_path, tmp_path / "detached.log"), 0)
    hashes = set()
    for log in (tmp_path / "orchestrator.log", tmp_path / "detached.log"):
        _title, words = log.read_text().splitlines()
        assert words.startswith(f"hash seed {found} ")
        hashes.add(words)
    assert len(hashes) == (2 if found == "random" else 1)


def test_the_garbage_collector_rests_while_a_program_loads_and_passes_by_what_was_loaded() -> None:
    frozen = gc.get_freeze_count()
    try:
        with pytest.raises(ImportError), loading():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() and gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
