"""The command line itself: what it hands to the programs, and how it says no. The programs are replaced."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from graftwork import cli
from graftwork.config.load import keys
from graftwork.errors import ProgramFailed
from graftwork.programs.settings import SECTIONS, describe_section

RL_TOML = 'model.path = "base"\n[run]\nid = "x"\n'


class Called(Exception):
    """What a replaced program was called with."""


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No trace of main() on the test process: working directory, environment, logging."""
    monkeypatch.chdir(tmp_path)
    for name in (*cli.THREAD_ENVIRONMENT, "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)


def replace(monkeypatch: pytest.MonkeyPatch, program: str, main: Any) -> None:
    """Put a module with this `main` in the place of graftwork.programs.<program>."""
    import graftwork.programs

    module = types.ModuleType(f"graftwork.programs.{program}")
    module.main = main  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(graftwork.programs, program, module, raising=False)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `graftwork ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["graftwork", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_rl_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    replace(monkeypatch, "rl", lambda config, **flags: calls.append((config, flags)))
    Path("rl.toml").write_text(RL_TOML)
    flags = ["--resume", "--max-steps", "25", "--run.seed", "3", "--run.optimizer.learning_rate=1e-4"]
    assert run(monkeypatch, "rl", "rl.toml", *flags) == 0
    config, given = calls[0]
    assert given == {"resume": True, "resume_step": None}
    assert (config.run.max_steps, config.run.seed, config.run.optimizer.learning_rate) == (25, 3, 1e-4)
    assert run(monkeypatch, "rl", "rl.toml", "--ranks", "2") == 0
    assert calls.pop()[0].trainer.ranks == 2
    assert run(monkeypatch, "rl", "rl.toml", "--resume-step", "10") == 0
    assert calls[1][1] == {"resume": False, "resume_step": 10}
    assert calls[1][0].run.max_steps == 20


def test_sft_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    replace(monkeypatch, "sft", calls.append)
    Path("sft.toml").write_text('model.path = "base"\n')
    assert run(monkeypatch, "sft", "sft.toml", "--resume", "--max-steps", "7", "--seed", "2") == 0
    assert (calls[0].resume, calls[0].max_steps, calls[0].seed) == (True, 7, 2)
    assert run(monkeypatch, "sft", "sft.toml") == 0
    assert (calls[1].resume, calls[1].max_steps) == (False, 100)


def test_serve_reads_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    replace(monkeypatch, "serve", calls.append)
    Path("serve.toml").write_text('model.path = "base"\n')
    assert run(monkeypatch, "serve", "serve.toml", "--trainer.slots", "2", "--output_dir", "there") == 0
    assert (calls[0].trainer.slots, calls[0].output_dir, calls[0].inference.port) == (2, "there", 0)


def test_submit_stop_resume_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for name in ("submit", "stop", "resume"):
        monkeypatch.setattr(f"graftwork.programs.submit.{name}", lambda *given: calls.append(given))
    Path("submit.toml").write_text('output_dir = "of-the-file"\nmax_steps = 3\n')
    flags = ["--id", "a", "--output-dir", "there", "--id", "b", "--resume", "true", "--sampling.top_p", "0.5"]
    assert run(monkeypatch, "submit", "submit.toml", *flags) == 0
    config, ids = calls[0]
    assert (ids, config.output_dir, config.max_steps) == (["a", "b"], "there", 3)
    assert (config.resume, config.sampling.top_p) == (True, 0.5)
    assert config.model_fields_set == {"output_dir", "max_steps", "resume", "sampling"}
    assert run(monkeypatch, "submit", "submit.toml", "--id", "a") == 0
    assert calls[1][0].output_dir == "of-the-file"
    assert run(monkeypatch, "submit", "submit.toml") == 2
    assert run(monkeypatch, "stop", "a", "b", "--wait", "0") == 0
    assert run(monkeypatch, "resume", "a", "--max-steps", "9", "--step", "0", "--output-dir", "there") == 0
    assert calls[2:] == [("outputs", ["a", "b"], 0), ("there", ["a"], 9, 0)]


def test_runs_has_a_table_and_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("graftwork.programs.runs.main", lambda *given, **flags: calls.append((given, flags)))
    assert run(monkeypatch, "runs", "--output-dir", "there", "--json") == 0
    assert calls == [(("there",), {"watch": False, "as_json": True})]
    monkeypatch.setattr("graftwork.programs.adapter.export", lambda *given: calls.append(given) or ["wrote it"])
    weight = Path("there/run_x/checkpoints/step_3/weight").absolute()
    weight.mkdir(parents=True)
    (weight.parent / "STABLE").touch()
    assert run(monkeypatch, "runs", "--output-dir", "there", "export", "x", "--out", "adapter") == 0
    assert run(monkeypatch, "runs", "export", "x", "--step", "3", "--out", "adapter", "--output-dir", "there") == 0
    assert calls[1:] == [(weight, Path("adapter"), "peft")] * 2
    assert capsys.readouterr().out == "wrote it\nrun x: the adapter after step 3\n" * 2


def test_runs_verify_ends_with_1_when_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @dataclass(frozen=True)
    class Report:
        run: str
        findings: list[str]
        checked: dict[str, int]

    for name in ("good", "bad"):
        Path(f"outputs/run_{name}").mkdir(parents=True)
    findings = {"good": [], "bad": ["rollouts/step_3: another batch"]}
    module = types.ModuleType("graftwork.programs.verify")
    module.verify_run = lambda tree: Report(str(tree.id), findings[str(tree.id)], {"batches": 3})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert run(monkeypatch, "runs", "verify", "good") == 0
    assert capsys.readouterr().out == "good: ok, 3 batches\n"
    assert run(monkeypatch, "runs", "verify", "good", "bad") == 1
    assert capsys.readouterr().out.splitlines()[1] == "bad: rollouts/step_3: another batch"
    assert run(monkeypatch, "runs", "verify", "bad", "--json") == 1
    assert json.loads(capsys.readouterr().out)[0]["findings"] == findings["bad"]


def test_the_commands_of_the_hosted_form_load_without_torch() -> None:
    programs = ", ".join(f"graftwork.programs.{name}" for name in ("serve", "submit", "runs"))
    code = f"import sys, {programs}; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_eval_prints_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    replace(monkeypatch, "evaluate", lambda config, adapter, prompts, seed: 0.5)
    Path("rl.toml").write_text(RL_TOML)
    assert run(monkeypatch, "eval", "rl.toml", "--prompts", "8", "--seed", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"adapter": None, "prompts": 8, "seed": 1, "reward": 0.5}
    assert run(monkeypatch, "eval", "rl.toml") == 0
    assert "mean reward 0.5000 of the bare base on 256" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rl", "none.toml"], "error: no configuration file at none.toml"),
        (["rl", "rl.toml", "--run.max_stepz", "3"], "--run.max_stepz is no setting; did you mean run.max_steps?"),
        (["rl", "rl.toml", "--run.max_steps", "many"], "run.max_steps"),
        (["rl", "--run.seed", "3", "rl.toml"], "FILE first, then --key value"),
        (["rl", "bad.toml"], "run.sead: no such key; did you mean run.seed?"),
        (["rl", "rl.toml", "stray"], "stray"),
        (["eval", "rl.toml", "--adapter", "none"], "--adapter: no folder at none"),
        (["convert", "a", "run_x", "--trainer-json", "none"], "--trainer-json: no file at none"),
        (["config", "nothing"], "error: no section 'nothing': there are sft, rl, serve, submit, trainer, inference"),
        (["serve", "serve.toml"], "trainer.slots 8: every run that trains needs its adapter in the sampler"),
        (
            ["submit", "submit.toml", "--id", "x", "--max_stepz", "3"],
            "--max_stepz is no setting; did you mean max_steps?",
        ),
        (["submit", "submit.toml", "--id", "x"], "model.path: must be given, as there is no serve.json in outputs"),
        (["submit", "submit.toml", "--id", "Not.An.Id"], "'Not.An.Id' is not a run id"),
        (["stop", "x"], "no run x in outputs; there are: none"),
        (["resume", "x", "--output-dir", "elsewhere"], "no run x in elsewhere"),
        (["runs"], "no folder at outputs"),
        (["runs", "export", "x", "--out", "adapter"], "no run x in outputs"),
        (["runs", "--output-dir", "elsewhere", "export", "x", "--out", "adapter"], "no run x in elsewhere"),
    ],
)
def test_one_clear_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("rl.toml").write_text(RL_TOML)
    Path("bad.toml").write_text(RL_TOML + "sead = 1\n")
    Path("submit.toml").write_text("max_steps = 3\n")
    Path("serve.toml").write_text('model.path = "base"\ninference.max_adapters = 4\n')
    assert run(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_errors_of_programs_and_interrupts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ProgramFailed("the trainer was killed")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    Path("rl.toml").write_text(RL_TOML)
    replace(monkeypatch, "rl", fail)
    assert run(monkeypatch, "rl", "rl.toml") == 1
    assert capsys.readouterr().err == "error: the trainer was killed\n"
    replace(monkeypatch, "rl", interrupt)
    assert run(monkeypatch, "rl", "rl.toml") == 130


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise Called("ours")

    Path("rl.toml").write_text(RL_TOML)
    replace(monkeypatch, "rl", bug)
    monkeypatch.setattr(sys, "argv", ["graftwork", "rl", "rl.toml"])
    with pytest.raises(Called):
        cli.main()


def test_convert_finds_the_trainer_json_beside_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def convert(source: Path, target: Path, options: object, trainer_json: Path | None, *_: object) -> list[str]:
        calls.append((source, target, trainer_json))
        return ["made step_0"]

    monkeypatch.setattr("graftwork.programs.adapter.convert", convert)
    assert run(monkeypatch, "convert", "adapter", "outputs/run_x") == 0
    beside = Path("outputs/trainer.json").absolute()
    beside.parent.mkdir()
    beside.write_text("{}")
    assert run(monkeypatch, "convert", "adapter", "outputs/run_x") == 0
    assert [call[2] for call in calls] == [None, beside]
    assert capsys.readouterr().out == "made step_0\n" * 2


@pytest.mark.parametrize("section", SECTIONS)
def test_config_lists_every_setting_with_its_meaning(section: str) -> None:
    lines = describe_section(section)
    listed = {line.split()[0]: meaning.strip() for line, meaning in pairwise(lines) if line[0] != " "}
    leaves = set(keys(SECTIONS[section]))
    leaves -= {key for key in leaves if any(other.startswith(f"{key}.") for other in leaves)}
    assert leaves <= listed.keys()
    assert all(listed[key] for key in leaves)


def test_config_shows_types_bounds_and_defaults() -> None:
    text = "\n".join(describe_section("rl"))
    assert "model.path  text, must be given" in text
    assert "run.sampling.top_p  number > 0, <= 1, default 1.0" in text
    assert 'run.loss.ratio  "truncate" | "mask", default "truncate"' in text
    assert "run.adapter.rank  integer > 0 or unset, default unset" in text
    assert "inference.port  integer >= 0, <= 65535, default 0" in text


def test_threads_sleep_when_idle_and_what_the_user_set_wins(tmp_path: Path) -> None:
    """main() sets the environment before anything imports torch."""
    code = "\n".join([
        "import os, sys; from graftwork import cli; sys.argv = ['graftwork', '--help']",
        "try: cli.main()",
        "except SystemExit: pass",
        "print(os.environ['OMP_WAIT_POLICY'], os.environ['GOMP_SPINCOUNT'], os.environ['KMP_BLOCKTIME'])",
    ])  # fmt: skip
    clean = {name: value for name, value in os.environ.items() if name not in cli.THREAD_ENVIRONMENT}
    environment = {**clean, "KMP_BLOCKTIME": "5", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "PASSIVE 10000 5"
