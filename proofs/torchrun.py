"""Start processes that train together, and wait for them: what tests and proofs of several ranks use.

    output = torchrun("distributed.test_base_ranks:checks", str(folder), ranks=2)

Under torchrun this file is the program that finds `module:function` and calls it with the arguments, as strings.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(
    target: str, *arguments: str, ranks: int, restarts: int = 0, timeout: float = 300.0,
    environment: dict[str, str] | None = None,
) -> str:  # fmt: skip
    """What the processes said, stdout and stderr of all ranks together.

    target: `module:function`, called with the arguments, on every rank. restarts: how often all are started again when
    one dies. timeout: seconds, after which all of them are killed. Raises AssertionError, with what they said, when
    one fails.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
               f"--max-restarts={restarts}", __file__, target, *arguments]  # fmt: skip
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **(environment or {})}
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        output = _end(process)
        raise AssertionError(f"{target} on {ranks} ranks took more than {timeout} s:\n{output}") from None
    assert process.returncode == 0, f"{target} on {ranks} ranks exited with {process.returncode}:\n{output}"
    return output


def _end(process: subprocess.Popen[str]) -> str:
    """torchrun ends its workers when it is told to end; they are in sessions of their own."""
    process.terminate()
    try:
        return process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "it would not end, and was killed; its workers may be left"


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    getattr(importlib.import_module(module), name)(*sys.argv[2:])
