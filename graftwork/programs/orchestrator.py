"""`graftwork orchestrator RUN_DIR`: sample batches for one run, from the versions that the trainer publishes.

    read control/orch.toml -> claim the run -> (warm start: convert the adapter into step_0) -> wait until admitted
    then, until the trainer says finished:
        find the next batch that is not there, wait for the version that it is sampled from, load that version into
        inference, play the batch, publish it

It holds no state that a restart could lose: what to do next follows from status.json and from the batches on disk. So
a restart, a resume, and a batch that was set aside as stale are one and the same case. Torch is never imported.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from graftwork.config.load import build, digest, parse_toml
from graftwork.config.schema import AdapterConfig, RunConfig
from graftwork.errors import BadRunId, ConfigError, InferenceError, ProgramFailed, RunError
from graftwork.programs.processes import PARENT_VARIABLE
from graftwork.rollouts.chat import ChatTokenizer
from graftwork.rollouts.client import InferenceClient
from graftwork.rollouts.collect import Collected, Request, Source, collect
from graftwork.rollouts.environment import Environment, load_environment
from graftwork.store.disk import Disk, is_stable, json_line, read_json, read_lines
from graftwork.store.layout import RunTree, stable_steps
from graftwork.store.queue import Batch, Published, SampledVersion, parse_version_name, publish_batch, read_version
from graftwork.store.status import Status, read_status

log = logging.getLogger("graftwork.orchestrator")

POLL_SECONDS = 0.02
INFERENCE_START_SECONDS = 300.0
"""How long the inference server may take to come up. Once it was there, its silence is an error at once."""
SETTLED_SECONDS = 5.0
"""A status.json of this age is not about to change: what it asks for is really missing."""
ENDED = ("failed", "evicted", "stopped")


def main(run_dir: Path) -> None:
    """Sample for the run in `run_dir` until it is finished, or until SIGTERM. Raises GraftworkError.

    What it does is logged (one line a step); the command line decides where to.
    """
    try:
        asyncio.run(_main(run_dir))
    except asyncio.CancelledError:
        log.info("%s: stopped by SIGTERM; batches that are published stay", run_dir)


async def _main(run_dir: Path) -> None:
    task = asyncio.current_task()
    if task is not None and threading.current_thread() is threading.main_thread():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    tree, disk = RunTree.at(run_dir), Disk()
    config, orch_digest = read_orch_toml(tree)
    claim = disk.claim(tree.orchestrator_lock, f"the orchestrator of run {tree.id}")
    try:
        environment = load_environment(config.environment.name, config.environment.options)
        tokenizer = ChatTokenizer.load(config.model.path)
        await warm_start(tree, config)
        async with InferenceClient(config.inference_url, config.request_timeout_seconds) as client:
            await Orchestrator(tree, config, orch_digest, disk, environment, tokenizer, client).run()
    finally:
        claim.release()


def read_orch_toml(tree: RunTree) -> tuple[RunConfig, str]:
    """The run's configuration, and the digest that names this state of the file. Raises ConfigError."""
    try:
        data = tree.orch_toml.read_bytes()
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"run {tree.id}: cannot read {tree.orch_toml}: {error}") from None
    return build(RunConfig, parse_toml(text, str(tree.orch_toml)), source=str(tree.orch_toml)), digest(data)


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


@dataclass
class Orchestrator:
    """One run's sampling."""

    tree: RunTree
    config: RunConfig
    orch_digest: str
    disk: Disk
    environment: Environment
    tokenizer: ChatTokenizer
    client: InferenceClient
    last_step: int = 0
    """Newest batch that is published or was consumed."""

    async def run(self) -> None:
        """Until the trainer says finished. Raises GraftworkError with the reason when the run or the server ends."""
        status = await self.wait_until_admitted()
        if status.state == "finished":
            log.info("run %s: finished already, at step %d", self.tree.id, status.step or 0)
            return
        log.info("run %s: admitted at step %d; sampling at %s", self.tree.id, status.start_step or 0, self.client.url)
        await self.client.wait_ready(INFERENCE_START_SECONDS)
        self.client.send_seed = not await self.client.is_vllm()
        self.disk.sweep(self.tree.rollouts)
        self.last_step = max(status.start_step or 0, status.step or 0)
        self.skip_published()
        self.disk.cut_log(self.tree.samples_jsonl, self.last_step)
        await self.sample_until_finished()
        log.info("run %s: finished at step %d", self.tree.id, self.config.max_steps)

    # --- what the trainer says --------------------------------------------------------------------------------------

    async def wait_until_admitted(self) -> Status:
        """The first status "active" or "finished" that the trainer gave this orch.toml."""
        said = ""
        while True:
            if not self.tree.orch_toml.exists() or digest(self.tree.orch_toml.read_bytes()) != self.orch_digest:
                raise ConfigError(f"run {self.tree.id}: {self.tree.orch_toml} changed or went away; start again")
            status = read_status(self.tree)
            if status is not None and status.is_of(self.tree.id, self.orch_digest):
                self.refuse_ended(status)
                if status.state in ("active", "finished"):
                    return status
            now = "no status yet" if status is None else status.state
            if now != said:
                log.info("run %s: waiting to be admitted by the trainer (%s)", self.tree.id, now)
                said = now
            await asyncio.sleep(POLL_SECONDS)

    def look(self) -> Status:
        """The status now. Raises RunError, with the reason, when the run has ended otherwise than well."""
        if not self.tree.root.is_dir():
            raise RunError(f"run {self.tree.id}: {self.tree.root} is gone; the run was removed")
        status = read_status(self.tree)
        if status is None:
            raise RunError(f"run {self.tree.id}: {self.tree.status_json} is gone; start again once the trainer runs")
        if not status.is_of(self.tree.id, self.orch_digest):
            raise ConfigError(f"run {self.tree.id}: {self.tree.orch_toml} changed under this orchestrator; start again")
        self.refuse_ended(status)
        return status

    def refuse_ended(self, status: Status) -> None:
        if status.state in ENDED:
            raise RunError(
                f"run {self.tree.id} {status.state} at step {status.step or 0}: {status.reason or 'no reason given'}"
                f" (says {self.tree.status_json})"
            )

    # --- which batch, from which version ----------------------------------------------------------------------------

    async def sample_until_finished(self) -> None:
        while (status := self.look()).state != "finished":
            step = self.step_to_sample(status)
            published = None if step is None else self.version_for(step, status)
            if step is None or published is None:
                await asyncio.sleep(POLL_SECONDS)
            else:
                await self.sample(step, published)

    def step_to_sample(self, status: Status) -> int | None:
        """The batch to make now; None when all are made. A batch that the trainer set aside is made again."""
        if (wanted := status.wanted_batch) is not None and wanted <= self.last_step and self.was_set_aside(wanted):
            return wanted
        self.skip_published()
        return self.last_step + 1 if self.last_step < self.config.max_steps else None

    def was_set_aside(self, step: int) -> bool:
        """Whether the trainer waits for a batch that was there. Where it has published that step's version meanwhile,
        the batch was consumed and its status is about to say so."""
        if is_stable(self.tree.batch(step)):
            return False
        age_seconds = time.time() - self.tree.status_json.stat().st_mtime
        return not is_stable(self.tree.broadcast(step)) or age_seconds > SETTLED_SECONDS

    def skip_published(self) -> None:
        """After a restart, batches that are on disk are consumed as they are."""
        while is_stable(self.tree.batch(self.last_step + 1)):
            self.last_step += 1

    def version_for(self, step: int, status: Status) -> Published | None:
        """The version that batch `step` is sampled from: k - 1 - lag_steps. None while it is not published."""
        wanted = max(0, step - 1 - self.config.lag_steps)
        published = read_version(self.tree, wanted)
        start = status.start_step or 0
        if published is None and wanted < start:
            # Versions before the start are never published again; the start itself is the nearest that will be there.
            published = read_version(self.tree, start)
            if published is not None:
                log.warning(
                    "run %s: batch %d: version %d is not kept; sampling from %s", self.tree.id, step, wanted,
                    published.version.name,
                )  # fmt: skip
        return published

    # --- one batch --------------------------------------------------------------------------------------------------

    async def sample(self, step: int, published: Published) -> None:
        """Make batch `step` from a version, and publish it."""
        version = published.version
        await self.serve(published)
        request = Request.of_batch(str(self.tree.id), self.config.seed, step, self.config.sampling)
        source = Source(version.name, version.digest)
        collected = await collect(self.environment, self.tokenizer, self.client, source, request)
        batch = Batch(
            run=self.tree.id,
            step=step,
            temperature=self.config.sampling.temperature,
            versions=(SampledVersion(version.name, version.digest, collected.digest_source),),
            rollouts=collected.rollouts,
            orchestrator_state={"next_step": step + 1, "seed": self.config.seed},
        )
        self.look()  # a folder that was removed meanwhile must not come back because we write into it
        # Rows first: a batch that is there has its rows, and rows without a batch are cut at the next start.
        self.write_samples(step, collected)
        publish_batch(self.disk, self.tree, batch)
        self.last_step = max(self.last_step, step)
        log.info(
            "run %s: batch %d from %s: mean reward %.4f, %d rollouts (%d failed), %d tokens", self.tree.id, step,
            version.name, collected.mean_reward, len(collected.rollouts), collected.failed, collected.sampled_tokens,
        )  # fmt: skip

    async def serve(self, published: Published) -> None:
        """Have inference hold this version of the run and no other. Nothing is in flight between two batches."""
        version = published.version
        served = await self.client.served_models()
        for name in served:
            if name != version.name and self.is_ours(name):
                await self.client.unload_adapter(name)
        if version.name in served:
            return
        await self.client.load_adapter(version, published.path)
        if version.name not in await self.client.served_models():
            raise InferenceError(
                f"run {self.tree.id}: {self.client.url} said that it loaded {version.name} from {published.path}, but"
                " does not serve it; nothing was sampled"
            )

    def is_ours(self, model: str) -> bool:
        try:
            return parse_version_name(model)[0] == self.tree.id
        except BadRunId:
            return False  # the base, or an adapter that a person loaded

    def write_samples(self, step: int, collected: Collected) -> None:
        path = self.tree.samples_jsonl
        if step <= self.last_step:  # a batch that is made again: its old rows were of answers that nobody learns from
            kept = [json_line(row) for row in read_lines(path) if row.get("step") != step]
            self.disk.publish_file(path, "".join(f"{line}\n" for line in kept).encode())
        self.disk.append_line(path, "\n".join(json_line(row) for row in collected.rows))
