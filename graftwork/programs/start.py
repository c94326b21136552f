"""What a start needs: absolute paths, refusals, the files that the programs are given and those that they answer with.

`Start` is one start of `graftwork rl`; the functions below it serve the commands of the hosted form as well.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from graftwork.config.load import build, dump
from graftwork.config.run import RunConfig
from graftwork.config.schema import (
    InferenceConfig,
    InferenceSection,
    RlConfig,
    ServeConfig,
    TrainerConfig,
    trainer_share,
    wants_probes,
)
from graftwork.config.section import ModelConfig
from graftwork.errors import Busy, CannotResume, ConfigError, Damaged, StoreError
from graftwork.programs.orch_toml import asks_to_stop, is_wanted, status_of
from graftwork.rollouts.environment import refuse_unknown
from graftwork.store.disk import Disk
from graftwork.store.files import is_stable, read_json
from graftwork.store.layout import OutputTree, RunId, RunTree, stable_steps
from graftwork.store.status import TERMINAL, Status

HEALTH_SECONDS = 5.0
VLLM_ABSENT = 3
HAS_VLLM = f"""
import sys
sys.path.pop(0)  # a folder of that name here is none
import importlib.util
sys.exit({VLLM_ABSENT} if importlib.util.find_spec("vllm") is None else 0)
"""
"""Said by exit code; nothing of vLLM is imported."""
C = TypeVar("C", RlConfig, ServeConfig)


@dataclass(frozen=True)
class Served:
    """serve.json: who serves which base where. It stays when the server ends; the next one replaces it."""

    pid: int
    inference_url: str
    model: ModelConfig


@dataclass(frozen=True)
class Start:
    """`config` has absolute paths: the programs may run anywhere."""

    disk: Disk
    config: RlConfig
    outputs: OutputTree
    tree: RunTree

    @staticmethod
    def of(config: RlConfig, *, resume: bool, resume_step: int | None) -> Start:
        """The flags win over the file; a step to resume from implies resume. Raises BadRunId."""
        step = config.run.resume_step if resume_step is None else resume_step
        resume = resume or config.run.resume or step is not None
        config = absolute(config)
        init = absolute_path(config.run.init_adapter_path)
        run = config.run.model_copy(update={"resume": resume, "resume_step": step, "init_adapter_path": init})
        outputs = OutputTree(Path(config.output_dir))
        config = config.model_copy(update={"run": run})
        return Start(Disk(), config, outputs, outputs.run(RunId.parse(run.id)))

    @property
    def ready_file(self) -> Path:
        return ready_file(self.outputs)

    def run_config(self, inference_url: str) -> RunConfig:
        """control/orch.toml."""
        values = self.config.run.model_dump(exclude={"id"}, exclude_none=True)
        values |= {"model": self.config.model.model_dump(), "inference_url": inference_url}
        return build(RunConfig, values, source="[run] of the configuration")

    def settled(self) -> bool:
        """Whether a trainer that looks now finds nothing to do: no run that goes on, and none that is to stop."""
        return not any(is_wanted(tree) for tree in self.outputs.scan()[0])


def absolute(config: C) -> C:
    """The same with absolute paths, as the programs may run anywhere; and with a dtype where two engines must agree on
    one."""
    init = absolute_path(config.trainer.init_adapter_path)
    trainer = config.trainer.model_copy(update={"init_adapter_path": init})
    model, output_dir = absolute_model(config.model), absolute_path(config.output_dir)
    if config.inference.engine == "vllm" and model.dtype == "auto":
        model = model.model_copy(update={"dtype": "bfloat16"})
    return config.model_copy(update={"trainer": trainer, "model": model, "output_dir": output_dir})


def absolute_model(model: ModelConfig) -> ModelConfig:
    """A hub id stays what it is."""
    return model.model_copy(update={"path": absolute_path(model.path)}) if Path(model.path).is_dir() else model


def absolute_path(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


# --- before anything starts -------------------------------------------------------------------------------------------


def refuse_what_cannot_work(start: Start) -> None:
    """Every refusal that needs no program, before the first file is written. Raises ConfigError, CannotResume, Busy."""
    refuse_held(start.outputs.trainer_lock, start.tree.orchestrator_lock)
    if start.config.inference.base_url is not None:
        refuse_absent_server(start.config.inference.base_url)
    refuse_absent_vllm(start.config.inference)
    refuse_unknown(start.config.run.environment.name, start.config.run.environment.options)
    steps, run = stable_steps(start.tree.checkpoints), start.config.run
    if run.resume:
        otherwise = "Without --resume the run starts from its beginning"
        refuse_impossible_resume(start.tree, run.resume_step, steps, otherwise)
        step = start_of(start.tree, run.resume_step)
        if step > run.max_steps:  # at the last step, what was killed before it said so is finished by a resume
            raise beyond_the_end(start.tree, step, run.max_steps, "--resume-step")
    else:
        refuse_to_start_over(start, steps)
    refuse_unfinished_neighbours(start)


def refuse_held(*locks: Path) -> None:
    """A trainer or an orchestrator of somebody else would act on what we are about to write. Raises Busy."""
    for lock in locks:
        if is_held(lock):
            holder = lock.read_text(errors="replace").strip() or "another process"
            raise Busy(f"{lock.parent} is in use by {holder}; stop it first, or choose another folder")


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock file. Looking changes nothing: the file goes on naming who held it last."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go of at once, as the descriptor is closed
    except BlockingIOError:
        return True
    except OSError as error:
        raise StoreError(f"{lock}: this file system cannot lock files ({error})") from None
    finally:
        os.close(descriptor)
    return False


def refuse_impossible_resume(tree: RunTree, wanted: int | None, steps: list[int], otherwise: str) -> None:
    """`otherwise` says what to do when there is no checkpoint at all."""
    if not steps:
        raise CannotResume(
            f"run {tree.id}: nothing to go on from: no checkpoint with a STABLE file in {tree.checkpoints}. {otherwise}"
        )
    if wanted is not None and wanted not in steps:
        there = ", ".join(map(str, steps))
        raise CannotResume(
            f"run {tree.id}: no checkpoint of step {wanted} in {tree.checkpoints}; there are steps {there}"
        )


def start_of(tree: RunTree, wanted: int | None) -> int:
    """The step that a resume goes on from: the one that is wanted, else that of the newest checkpoint; there is one."""
    return stable_steps(tree.checkpoints)[-1] if wanted is None else wanted


def beyond_the_end(tree: RunTree, step: int, max_steps: int, earlier: str) -> CannotResume:
    """Of a resume that leads nowhere. `earlier` is the flag that starts at an earlier checkpoint."""
    return CannotResume(
        f"run {tree.id}: its checkpoint is of step {step}, and max_steps is {max_steps}: --max-steps sets a later end, "
        f"{earlier} an earlier start"
    )


def refuse_absent_vllm(inference: InferenceSection) -> None:
    """vLLM must be there where we are to start it. Raises ConfigError."""
    if inference.engine != "vllm" or inference.base_url is not None:
        return
    python = inference.vllm.python or sys.executable
    try:
        code = subprocess.run([python, "-c", HAS_VLLM], stdin=subprocess.DEVNULL, check=False).returncode
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"inference.vllm.python: cannot start {python}: {reason} (docs/vllm.md)") from None
    if code == VLLM_ABSENT:
        raise ConfigError(
            f"vLLM is not installed for {python}: inference.vllm.python names the interpreter of an environment that "
            "has it (docs/vllm.md)"
        )
    if code:
        raise ConfigError(f"inference.vllm.python: {python} ended with exit code {code} when it was asked for vLLM")


def refuse_to_start_over(start: Start, steps: list[int]) -> None:
    name = start.tree.root.name
    if steps and steps[-1] > 0:
        raise ConfigError(
            f"{name} already has checkpoints up to step {steps[-1]} in {start.tree.checkpoints}: "
            "--resume goes on from there, or choose another run.id"
        )
    if is_stable(start.tree.batch(1)):
        way_on = "--resume goes on from step 0" if steps else f"move {start.tree.root} away to start again"
        raise ConfigError(
            f"{name} was started before and stopped before its first checkpoint ({start.tree.batch(1)} is there): "
            f"{way_on}, or choose another run.id"
        )
    refuse_missing_adapter("run.init_adapter_path", start.config.run.init_adapter_path, steps)


def refuse_missing_adapter(setting: str, adapter: str | None, steps: list[int]) -> None:
    """A run that has its step_0 already needs the adapter no more."""
    if adapter is not None and not steps and not Path(adapter).is_dir():
        raise ConfigError(f"{setting}: no adapter folder at {adapter}; `graftwork sft` makes one")


def refuse_unfinished_neighbours(start: Start) -> None:
    """This trainer would take up another run that is not finished, and wait for its batches for ever. One that is to
    stop it releases at once."""
    for tree in start.outputs.scan()[0]:
        if tree.id == start.tree.id or not is_wanted(tree) or asks_to_stop(tree):
            continue
        stop = f"`graftwork stop {tree.id}{_output_dir_flag(start.outputs)}`"
        raise ConfigError(
            f"{tree.root} holds a run that is not finished ({_left_as(status_of(tree))}), and the trainer of this "
            f"command would wait for its batches. {stop} ends it and keeps what it has, --resume with its own file "
            "finishes it; or move its folder away, or choose another output_dir"
        )


def _left_as(status: Status | None) -> str:
    if status is None:
        return "not seen by a trainer yet"
    if status.state in TERMINAL:
        return f"its orch.toml has changed since it was {status.state}"
    return f"{status.state} when its trainer ended"


def _output_dir_flag(outputs: OutputTree) -> str:
    """For a command that a person is to type: nothing where the tree is the one that it looks at by itself."""
    return "" if outputs.root == Path("outputs").absolute() else f" --output-dir {outputs.root}"


# --- files for the programs, and what they answer ---------------------------------------------------------------------


def ready_file(outputs: OutputTree) -> Path:
    """Where inference says that it answers."""
    return outputs.logs / "inference.json"


def said_by(path: Path, pid: int) -> dict[str, Any] | None:
    """The JSON table that the process `pid` wrote of itself; None while the file is of an earlier start, or absent."""
    try:
        found = read_json(path, "what a program says of itself")
    except Damaged:
        return None
    return found if isinstance(found, dict) and found.get("pid") == pid else None


def refuse_absent_server(url: str) -> None:
    """The server of inference.base_url must be there. Raises ConfigError."""
    if not is_well(url):
        raise ConfigError(f"inference.base_url: no inference server is well at {url}; start it, or leave base_url out")


def is_well(url: str) -> bool:
    """Whether an inference server says so, at this moment."""
    try:
        return httpx.get(f"{url.rstrip('/')}/health", timeout=HEALTH_SECONDS, trust_env=False).is_success
    except (httpx.TransportError, httpx.InvalidURL):
        return False


def read_served(outputs: OutputTree) -> Served | None:
    """What `graftwork serve` says of itself; None when it never ran here. Raises Damaged."""
    path = outputs.serve_json
    try:
        return TypeAdapter(Served).validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise Damaged(
            f"{path} does not say which base is served where; `graftwork serve` writes it anew ({error})"
        ) from None


def publish_served(disk: Disk, outputs: OutputTree, served: Served) -> None:
    about = {"pid": served.pid, "inference_url": served.inference_url, "model": served.model.model_dump()}
    disk.publish_json(outputs.serve_json, about)


def write_inference_toml(disk: Disk, outputs: OutputTree, config: RlConfig | ServeConfig) -> Path:
    if ready_file(outputs).exists():  # of an earlier start: its URL is stale
        disk.quarantine(ready_file(outputs), outputs.trash)
    section = config.inference.model_dump(exclude_none=True) | {"ready_file": str(ready_file(outputs))}
    values = {**section, "model": config.model.model_dump(), "lora": config.lora.model_dump()}
    path = outputs.logs / "inference.toml"
    disk.publish_file(path, dump(build(InferenceConfig, values, source="[inference] of the configuration")))
    return path


def write_trainer_toml(
    disk: Disk, outputs: OutputTree, config: RlConfig | ServeConfig, *, exit_when_done: bool
) -> Path:
    probes = wants_probes(config.trainer, config.inference)
    section = config.trainer.model_dump(exclude_none=True) | {
        "exit_when_done": exit_when_done,
        "publish_probes": probes,
    }
    if (share := trainer_share(config.model, config.trainer, config.inference)) is not None:
        section["gpu_memory_fraction"] = share
    tables = {"model": config.model.model_dump(), "lora": config.lora.model_dump()}
    values = {**section, **tables, "output_dir": str(outputs.root)}
    path = outputs.logs / "trainer.toml"
    disk.publish_file(path, dump(build(TrainerConfig, values, source="[trainer] of the configuration")))
    return path
