"""vLLM as a program of ours: what it is started with, and what is said when it does not come up. No vLLM is needed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from graftwork.config.load import build, dump
from graftwork.config.schema import InferenceConfig, RlConfig, ServeConfig, trainer_share, wants_probes
from graftwork.errors import ConfigError
from graftwork.programs import vllm
from graftwork.programs.start import absolute, said_by
from graftwork.programs.vllm import command, environment, max_lora_rank

FAKE = """
import http.server, os, subprocess, sys
sys.stderr.write("fake vLLM at work\\n")
mood = os.environ.get("FAKE_VLLM", "")
if mood == "dies":
    sys.exit(3)
subprocess.Popen(["sleep", "600"])  # vLLM's engine is a process that does not end with its server
port = int(sys.argv[sys.argv.index("--port") + 1])
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if mood == "never well" else 200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""


def inference(**changes: object) -> InferenceConfig:
    values = {"model": {"path": "base"}, "engine": "vllm", "port": 8123, **changes}
    return build(InferenceConfig, values, source="test")


# --- how it is started ------------------------------------------------------------------------------------------------


def flags(config: InferenceConfig) -> dict[str, str]:
    words = command(config, config.port)
    return {flag: words[i + 1] for i, flag in enumerate(words[:-1]) if flag.startswith("--")}


def test_log_probs_are_those_of_the_sampled_distribution_and_nothing_comes_from_the_bases_generation_config() -> None:
    found = flags(inference())
    assert found["--logprobs-mode"] == "processed_logprobs"
    assert found["--generation-config"] == "vllm"
    assert found["--model"] == found["--served-model-name"] == "base"
    assert found["--port"] == "8123"


def test_settings_become_vllms_own_flags() -> None:
    config = inference(
        model={"path": "base", "dtype": "float32"}, lora={"max_rank": 12}, max_adapters=3, max_model_len=300,
        max_sequences=7, vllm={"python": "/there/python", "gpu_memory_fraction": 0.3, "arguments": ["--enforce-eager"]},
    )  # fmt: skip
    assert command(config, 1)[:2] == ["/there/python", "-m"]
    assert command(config, 1)[-1] == "--enforce-eager"
    found = flags(config)
    expected = {
        "--max-loras": "3", "--max-model-len": "300", "--max-num-seqs": "7", "--dtype": "float32",
        "--max-lora-rank": "16", "--gpu-memory-utilization": "0.3",
    }  # fmt: skip
    assert {flag: found[flag] for flag in expected} == expected


@pytest.mark.parametrize("taken", ["--logprobs-mode", "--max_loras=9", "--enable-lora", "--dtype"])
def test_flags_that_are_ours_to_set_are_refused(taken: str) -> None:
    with pytest.raises(ConfigError, match="is set by Graftwork"):
        command(inference(vllm={"arguments": [taken]}), 1)


def test_a_rank_that_vllm_has_no_room_for_is_refused() -> None:
    assert [max_lora_rank(rank) for rank in (1, 2, 8, 9, 512)] == [1, 8, 8, 16, 512]
    with pytest.raises(ConfigError, match="512 at most"):
        max_lora_rank(513)


def test_adapters_may_be_loaded_at_run_time_and_other_variables_are_the_users() -> None:
    found = environment(inference(threads=3, vllm={"gpus": "1"}), {"VLLM_CPU_KVCACHE_SPACE": "7", "HOME": "/h"})
    assert found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert (found["VLLM_CPU_KVCACHE_SPACE"], found["HOME"]) == ("7", "/h")
    assert (found["OMP_NUM_THREADS"], found["CUDA_VISIBLE_DEVICES"]) == ("3", "1")


def test_settings_for_cpus_are_for_cpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compiles(device: str) -> bool:
        return "TORCHDYNAMO_DISABLE" not in environment(inference(model={"path": "base", "device": device}), {})

    monkeypatch.setattr(vllm, "NVIDIA", tmp_path / "absent")
    assert [compiles(device) for device in ("cpu", "auto", "cuda:1")] == [False, False, True]
    monkeypatch.setattr(vllm, "NVIDIA", tmp_path)
    assert [compiles(device) for device in ("cpu", "auto", "cuda:1")] == [False, True, True]


def test_the_probe_has_room_and_the_base_its_positions(tmp_path: Path) -> None:
    assert flags(inference(max_model_len=64))["--max-model-len"] == "161"
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 512}')
    model = {"path": str(tmp_path)}
    assert flags(inference(model=model, max_model_len=1024))["--max-model-len"] == "512"
    assert flags(inference(model=model, max_model_len=300))["--max-model-len"] == "300"


# --- one GPU for two --------------------------------------------------------------------------------------------------


def rl(device: str = "auto", trainer: dict[str, object] | None = None, **inference: object) -> RlConfig:
    tables = {"trainer": trainer or {}, "inference": {"port": 0, "engine": "vllm", **inference}}
    values = {"model": {"path": "base", "device": device}, "run": {"id": "a"}, **tables}
    return build(RlConfig, values, source="test")


def test_versions_have_a_probe_where_a_server_may_serve_them_that_cannot_name_what_it_holds() -> None:
    def probes(**settings: object) -> bool:
        config = rl(**settings)  # type: ignore[arg-type]
        return wants_probes(config.trainer, config.inference)

    assert probes() and probes(engine="embedded", base_url="http://127.0.0.1:1")
    assert not probes(engine="embedded")
    assert probes(engine="embedded", trainer={"publish_probes": True}) and not probes(trainer={"publish_probes": False})


def test_shares_of_a_gpu_that_cannot_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"0\.6 and .* 0\.45 are 1\.05 of one GPU, which has room for 0\.95"):
        rl(trainer={"gpu_memory_fraction": 0.6})
    with pytest.raises(ConfigError, match="of one GPU"):
        tables = {"trainer": {"gpu_memory_fraction": 0.6}, "inference": {"engine": "vllm", "max_adapters": 9}}
        build(ServeConfig, {"model": {"path": "base"}, **tables}, source="test")
    with pytest.raises(ConfigError, match=r"0\.1 \(at least\) and .* 0\.9 are 1 of one GPU"):
        rl(vllm={"gpu_memory_fraction": 0.9})
    assert rl(trainer={"gpu_memory_fraction": 0.5}).trainer.gpu_memory_fraction == 0.5


def test_the_trainer_takes_what_vllm_leaves_where_they_share_a_gpu() -> None:
    def share(config: RlConfig) -> float | None:
        return trainer_share(config.model, config.trainer, config.inference)

    assert share(rl()) == pytest.approx(0.5)
    assert share(rl(vllm={"gpu_memory_fraction": 0.3})) == pytest.approx(0.65)
    assert share(rl(vllm={"gpus": "1"})) is None
    assert share(rl(device="cpu")) is None
    assert share(rl(engine="embedded")) is None
    assert share(rl(base_url="http://there:8000")) is None
    crowded = {"gpu_memory_fraction": 0.9}
    assert share(rl(trainer=crowded, vllm={"gpus": "1"})) == 0.9


def test_both_engines_have_one_dtype() -> None:
    assert absolute(rl()).model.dtype == "bfloat16"
    assert absolute(rl(engine="embedded")).model.dtype == "auto"


# --- how it ends ------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """Of a fake vLLM: the interpreter is a script that ignores `-m MODULE`."""
    (tmp_path / "fake.py").write_text(FAKE)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "fake.py"} "$@"\n')
    python.chmod(0o755)
    vllm = {"python": str(python), "start_timeout_seconds": 60}
    config = inference(port=0, ready_file=str(tmp_path / "ready.json"), vllm=vllm)
    (tmp_path / "inference.toml").write_bytes(dump(config))
    return tmp_path / "inference.toml"


def start(settings: Path, mood: str = "", *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "graftwork", "inference", str(settings), *more]
    return subprocess.Popen(command, env={**os.environ, "FAKE_VLLM": mood}, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_says_that_it_is_up_and_leaves_nothing_behind_however_it_ends(settings: Path, number: int) -> None:
    with start(settings) as process:
        deadline = time.monotonic() + 60
        while (said := said_by(settings.parent / "ready.json", process.pid)) is None:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        family = children(process.pid)
        assert said["url"].startswith("http://127.0.0.1:")
        assert len(family) == 3, "the fake vLLM, its engine, the guard"
        process.send_signal(number)
        assert process.wait(60) == (0 if number == signal.SIGTERM else -number)
    while [pid for pid in family if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    own = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*own, *(deeper for child in own for deeper in children(child))]


def test_a_vllm_that_dies_ends_it_with_the_reason(settings: Path) -> None:
    with start(settings, "dies") as process:
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "fake vLLM at work" in said and "error: vLLM ended with exit code 3" in said


def test_a_vllm_that_does_not_come_up_is_not_waited_for_longer_than_asked(settings: Path) -> None:
    with start(settings, "never well", "--vllm.start_timeout_seconds", "2") as process:
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "did not answer" in said and "within 2 seconds" in said


def test_an_interpreter_that_is_not_there_is_named(settings: Path) -> None:
    with start(settings, "", "--vllm.python", "/nowhere/python") as process:
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "error: inference.vllm.python: cannot start /nowhere/python" in said


def test_there_is_nothing_to_start_where_a_server_runs_already(settings: Path) -> None:
    with start(settings, "", "--base_url", "http://there:1") as process:
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "a server runs at http://there:1 already" in said
