"""Warm start: a run's init_adapter_path becomes its step_0. The orchestrator's first act; torch-free, as it is."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path

from graftwork.config.run import AdapterConfig, RunConfig
from graftwork.errors import ConfigError, ProgramFailed
from graftwork.programs.processes import PARENT_VARIABLE
from graftwork.store.files import read_json
from graftwork.store.layout import RunTree, stable_steps

log = logging.getLogger("graftwork.orchestrator")


async def warm_start(tree: RunTree, config: RunConfig) -> None:
    """Make step_0 from the run's init_adapter_path, unless the run resumes or has a checkpoint already.

    The converter is a process of its own, as it needs torch. Raises ConfigError when there is no such adapter,
    ProgramFailed, with the converter's words, when it refuses the adapter.
    """
    adapter = config.init_adapter_path
    if adapter is None or config.resume:
        return
    if steps := stable_steps(tree.checkpoints):
        refuse_another_source(tree, adapter, config.adapter, steps)
        return
    if not Path(adapter).is_dir():
        raise ConfigError(f"run {tree.id}: init_adapter_path = {adapter!r} is no folder; the run does not start")
    command = (sys.executable, "-m", "graftwork", "convert", *import_flags(config), adapter, str(tree.root))
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, PARENT_VARIABLE: str(os.getpid())},  # it ends with us
    )
    try:
        out, err = (part.decode(errors="replace").strip() for part in await process.communicate())
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
    if process.returncode != 0:
        raise ProgramFailed(
            f"run {tree.id}: `{' '.join(command[2:])}` refused adapter {adapter} (exit code {process.returncode});"
            f" the run does not start. It said:\n{err or out}"
        )
    for line in out.splitlines():
        log.info("run %s: convert: %s", tree.id, line)


def import_flags(config: RunConfig) -> list[str]:
    """What the run wants of its starting adapter, as options of `graftwork convert`."""
    wish = config.adapter
    flags = ["--seed", str(config.seed)]
    flags += [] if wish.rank is None else ["--rank", str(wish.rank)]
    flags += [] if wish.alpha is None else ["--alpha", repr(wish.alpha)]
    flags += ["--allow-lossy"] if wish.allow_lossy else []
    flags += [] if wish.target_modules is None else ["--targets", ",".join(wish.target_modules)]
    flags += [] if wish.adapter_name is None else ["--adapter", wish.adapter_name]
    return [*flags, *(part for name in wish.ignore for part in ("--ignore", name))]


def refuse_another_source(tree: RunTree, adapter: str, wish: AdapterConfig, steps: list[int]) -> None:
    """A step_0 of another adapter than the configuration names, or imported otherwise, must not be taken for it. Raises
    ConfigError."""
    path = tree.checkpoint(0) / "report.json"
    if steps != [0] or not path.is_file():
        return
    report = read_json(path, "import report")
    asked = {"adapter_name": wish.adapter_name, "ignore": list(wish.ignore), "allow_lossy": wish.allow_lossy}
    if report.get("asked") not in (None, asked):
        raise ConfigError(
            f"run {tree.id}: {tree.checkpoint(0)} was imported with {report['asked']}, [adapter] says {asked}; move "
            f"{tree.checkpoints} away to import again, or set these as they were"
        )
    source = report.get("source")
    if source is not None and Path(source).absolute() != Path(adapter).absolute():
        raise ConfigError(
            f"run {tree.id}: {tree.checkpoint(0)} was made from {source}, init_adapter_path says {adapter}; "
            f"move {tree.checkpoints} away to start from the latter, or drop the setting to start from the former"
        )
