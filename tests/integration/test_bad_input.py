"""Bad input and dead programs, with real processes: one clear message, a non-zero exit, committed files intact."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_kill_resume import SMALL, wild_adapter

from graftwork.store.files import verify
from graftwork.store.layout import RunTree, stable_steps
from graftwork.store.queue import read_version
from proofs.killing import children_of
from proofs.main import EXAMPLE, RUN

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def _from_the_repository() -> None:
    os.chdir(REPOSITORY)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return wild_adapter(tmp_path / "adapter")


def refused(*arguments: str) -> str:
    """Run a command that must end with 1 and one message; return the message."""
    command = [sys.executable, "-m", "graftwork", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1
    return done.stderr


def spoil(adapter: Path, change: str) -> None:
    """Make the saved adapter bad in one way; without our manifest, as if another program had saved it."""
    (adapter / "STABLE").unlink()
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[3]
    match change:
        case "nan":
            tensors[name][0, 0] = float("nan")
        case "shape":
            tensors[name] = torch.zeros(tensors[name].shape[0], 7)
        case "cut":
            path.write_bytes(path.read_bytes()[:-100])
            return
        case "half":
            path.unlink()
            return
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("nan", r"lora_[AB]\.weight.*(nan|NaN)"),
        ("cut", r"adapter_model\.safetensors"),
        ("half", r"adapter_model\.safetensors is missing"),
    ],
)
def test_a_bad_adapter_is_refused_by_name_and_leaves_nothing(
    adapter: Path, tmp_path: Path, change: str, says: str
) -> None:
    spoil(adapter, change)
    assert re.search(says, refused("convert", str(adapter), str(tmp_path / "out" / RUN)))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_shape_stops_rl_by_name_and_leaves_no_checkpoint(adapter: Path, tmp_path: Path) -> None:
    spoil(adapter, "shape")
    flags = ["--output_dir", str(tmp_path / "out"), "--run.init_adapter_path", str(adapter), *SMALL]
    assert re.search(r"model\.layers\.\d+\.\S+_proj", refused("rl", str(EXAMPLE / "rl.toml"), *flags))
    assert stable_steps(RunTree.at(tmp_path / "out" / RUN).checkpoints) == []


@pytest.mark.parametrize("victim", ["inference", "orchestrator"])
def test_a_killed_program_is_named_and_what_was_committed_stays_whole(
    adapter: Path, tmp_path: Path, victim: str
) -> None:
    flags = ["--output_dir", str(tmp_path), "--run.init_adapter_path", str(adapter), *SMALL]
    command = [sys.executable, "-m", "graftwork", "rl", str(EXAMPLE / "rl.toml"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    tree = RunTree.at(tmp_path / RUN)
    end = time.monotonic() + 200
    while read_version(tree, 2) is None and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    children = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in children_of(process.pid)}
    (pid,) = [pid for pid, line in children.items() if f"\0{victim}\0" in line]
    os.kill(pid, signal.SIGKILL)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "Traceback" not in said
    assert re.search(rf"the {victim} was killed by SIGKILL", said)
    for kind, parent in (("broadcast", tree.broadcasts), ("checkpoint", tree.checkpoints), ("batch", tree.rollouts)):
        assert stable_steps(parent)
        for step in stable_steps(parent):
            verify(parent / f"step_{step}", kind)
