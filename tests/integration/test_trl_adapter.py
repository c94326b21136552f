"""An adapter from outside: trained by TRL's SFTTrainer with PEFT, it starts a run as the function that it is."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from graftwork.config.load import load
from graftwork.config.schema import RlConfig, SftConfig
from graftwork.rollouts.environment import load_environment
from graftwork.store.files import read_lines

pytest.importorskip("trl")
REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "smollm2" / "trl_sft.py"
SFT, RL = (REPOSITORY / "examples" / "reverse_text" / f"{name}.toml" for name in ("sft", "rl"))
SAMPLING_ERROR = 0.08
"""Of the difference of two means of 256 rewards: a little over three standard errors at a deviation of 0.25."""


def graftwork(*arguments: str) -> str:
    command = [sys.executable, "-m", "graftwork", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
def test_an_adapter_of_trls_trainer_starts_a_run_without_a_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    spec = importlib.util.spec_from_file_location("trl_sft", SCRIPT)
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(script := importlib.util.module_from_spec(spec))
    sft, rl = load(SftConfig, SFT), load(RlConfig, RL)
    sft = sft.model_copy(update={"max_steps": 60})
    assert sft.data.environment is not None
    environment = load_environment(sft.data.environment.name, sft.data.environment.options)
    adapter = tmp_path / "trl"
    script.train(sft, environment, adapter, seed=0)
    theirs = script.held_out_reward(rl, environment, adapter, seed=0)

    held_out = graftwork("eval", str(RL), "--adapter", str(adapter), "--prompts", "256", "--json")
    ours = json.loads(held_out.splitlines()[-1])["reward"]
    assert theirs > 0.2 and ours == pytest.approx(theirs, abs=SAMPLING_ERROR)

    places = ["--output_dir", str(tmp_path / "outputs"), "--run.init_adapter_path", str(adapter)]
    graftwork("rl", str(RL), *places, "--run.max_steps", "1")
    [step] = read_lines(tmp_path / "outputs" / "run_reverse" / "metrics.jsonl")
    assert step["reward"] == pytest.approx(theirs, abs=SAMPLING_ERROR) and step["grad_norm"] > 0
