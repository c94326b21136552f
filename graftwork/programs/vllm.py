"""`graftwork inference` with engine = "vllm": vLLM's own server as a child, started so that it is right for us.

What must hold, and what would go wrong without it (tests/real_vllm):
- log-probs of the distribution that was sampled from, temperature and top-p applied: else ratios are wrong
- sampling settings that are not sent come from nowhere, not from the base's generation_config.json
- the base under its path as its name, its dtype the trainer's

That every version comes under a name and a path of its own and is asked for alone is the client's part, and that it
took effect is probed (serving.py). Torch-free.

vLLM is several processes, and leaves the others behind when its server is killed: they are a group of their own, and a
guard kills the group when this process is gone, however it went.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from graftwork.config.schema import InferenceConfig
from graftwork.errors import ConfigError, ProgramFailed
from graftwork.logs import say
from graftwork.programs.listening import listen, url_of
from graftwork.programs.processes import noted_signals
from graftwork.programs.start import is_well
from graftwork.rollouts.probe import PROMPT_TOKENS_MAX
from graftwork.store.disk import Disk
from graftwork.store.files import read_json

MODULE = "vllm.entrypoints.openai.api_server"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank accepts."""
NVIDIA = Path("/dev/nvidiactl")
"""There where NVIDIA's driver is."""
POLL_SECONDS = 0.5
GUARD = """
import contextlib, os, signal, sys
group, _ = sys.stdin.readline(), sys.stdin.read()
if group:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(int(group), signal.SIGKILL)
"""
"""Reads the number of a group of processes, waits until nobody can write to it any more, and kills the group."""
END_GRACE_SECONDS = 8.0
"""From SIGTERM to SIGKILL; less than what `Programs` gives this process."""
ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
ON_CPU: dict[str, str] = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer runs on the same cores
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than what it saves
}
"""Unless the environment says otherwise."""


def main(config: InferenceConfig) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError, and ProgramFailed when vLLM does not come up or ends."""
    port = taken_port(config.host, config.port)
    url = url_of(config.host, port)
    with noted_signals() as signals, running(config, port) as child:
        gives_up_at = time.monotonic() + config.vllm.start_timeout_seconds
        while signals.received is None and not is_well(url):
            refuse_dead(child)
            if time.monotonic() > gives_up_at:
                raise ProgramFailed(
                    f"vLLM did not answer at {url} within {config.vllm.start_timeout_seconds:g} seconds; what it said "
                    "is above. Raise inference.vllm.start_timeout_seconds if it was about to"
                )
            time.sleep(POLL_SECONDS)
        if signals.received is None:
            announce(config, url)
        while signals.received is None:
            refuse_dead(child)
            time.sleep(POLL_SECONDS)


def announce(config: InferenceConfig, url: str) -> None:
    if config.ready_file is not None:
        Disk().publish_json(Path(config.ready_file), {"url": url, "pid": os.getpid()})
    say(f"inference: vLLM serves {config.model.path} on {url}", stream=sys.stdout)


@contextmanager
def running(config: InferenceConfig, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """vLLM's server, which ends with the block: SIGTERM, then SIGKILL to all of its group. Raises ConfigError when
    there is no such interpreter."""
    words = command(config, port)
    with subprocess.Popen([sys.executable, "-c", GUARD], stdin=subprocess.PIPE, start_new_session=True) as guard:
        assert guard.stdin is not None
        try:
            child = subprocess.Popen(words, env=environment(config, os.environ), start_new_session=True)
        except OSError as error:
            raise ConfigError(f"inference.vllm.python: cannot start {words[0]}: {error.strerror or error}") from None
        guard.stdin.write(f"{child.pid}\n".encode())
        guard.stdin.flush()
        try:
            yield child
        finally:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(END_GRACE_SECONDS)
            guard.communicate()  # the end of its input is its sign
            child.wait()


def refuse_dead(child: subprocess.Popen[bytes]) -> None:
    """Raises ProgramFailed when vLLM has ended."""
    if (code := child.poll()) is not None:
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        raise ProgramFailed(f"vLLM {how}; what it said is above in this log")


def command(config: InferenceConfig, port: int) -> list[str]:
    """Pure. Raises ConfigError for flags of the user's that are ours to set, and a rank that vLLM does not know."""
    dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
    ours = {
        "--model": config.model.path,
        "--served-model-name": config.model.path,
        "--dtype": dtype,
        "--host": config.host,
        "--port": str(port),
        "--max-loras": str(config.max_adapters),
        "--max-lora-rank": str(max_lora_rank(config.lora.max_rank)),
        "--max-model-len": str(context_length(config)),
        "--max-num-seqs": str(config.max_sequences),
        "--gpu-memory-utilization": str(config.vllm.gpu_memory_fraction),
        "--logprobs-mode": "processed_logprobs",
        "--generation-config": "vllm",
    }
    given = {word.partition("=")[0].replace("_", "-") for word in config.vllm.arguments if word.startswith("--")}
    if taken := sorted(given & {*ours, "--enable-lora"}):
        raise ConfigError(f"inference.vllm.arguments: {taken[0]} is set by Graftwork; leave it out")
    python = config.vllm.python or sys.executable
    pairs = [word for pair in ours.items() for word in pair]
    return [python, "-m", MODULE, *pairs, "--enable-lora", *config.vllm.arguments]


def room_for(rank: int) -> int | None:
    """The smallest --max-lora-rank that vLLM accepts and that has room; None where there is none."""
    return next((size for size in RANKS if size >= rank), None)


def max_lora_rank(rank: int) -> int:
    """The same. Raises ConfigError where there is none."""
    room = room_for(rank)
    if room is None:
        raise ConfigError(f"lora.max_rank is {rank}; vLLM has room for {RANKS[-1]} at most")
    return room


def on_cpu(config: InferenceConfig) -> bool:
    """Whether this is for vLLM's CPU build."""
    return config.model.device == "cpu" or (config.model.device == "auto" and not NVIDIA.exists())


def context_length(config: InferenceConfig) -> int:
    """Room for the probe, and no more than the base has positions, where its config.json is here to say."""
    wanted = max(config.max_model_len, PROMPT_TOKENS_MAX + 1)
    file = Path(config.model.path) / "config.json"
    positions = read_json(file, "base model").get("max_position_embeddings") if file.is_file() else None
    return min(wanted, positions) if isinstance(positions, int) else wanted


def environment(config: InferenceConfig, given: Mapping[str, str]) -> dict[str, str]:
    """Pure."""
    found = {**(ON_CPU if on_cpu(config) else {}), **given, **ENVIRONMENT}
    if config.threads:
        found["OMP_NUM_THREADS"] = str(config.threads)
    if config.vllm.gpus is not None:
        found["CUDA_VISIBLE_DEVICES"] = config.vllm.gpus
    return found


def taken_port(host: str, port: int) -> int:
    """A port that is free at this moment: this one, or any for 0. Raises ConfigError."""
    with listen(host, port) as listener:
        return int(listener.getsockname()[1])
