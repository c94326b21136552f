"""One run's versions in an inference server: one at a time, loaded when needed, whatever becomes of the server."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from graftwork.errors import BadRunId, InferenceError, Refused, ServerGone, WrongAdapter
from graftwork.rollouts.client import InferenceClient
from graftwork.rollouts.probe import Finding, Probe, judge, refuse_raw_logprobs
from graftwork.store.layout import RunId
from graftwork.store.queue import Published, parse_version_name

log = logging.getLogger("graftwork.orchestrator")
T = TypeVar("T")

INFERENCE_START_SECONDS = 300.0
"""How long the inference server may take to come up, at the start and after it went away."""
LOSSES_MAX = 10
"""A batch that lost the server this often is given up: it may be what brings the server down."""
REFUSALS_MAX = 3
REFUSED_PAUSE_SECONDS = 1.0
"""A batch that was refused this often in a row is an error. The pauses in between grow by this: the server may be about
to notice that another run does not need its place any more."""
PROBED_TOKENS = 20
"""Likeliest next tokens that a server is asked for: as many as vLLM gives unless told otherwise."""
PROBED_TEMPERATURE = 0.5
LEAVE_SECONDS = 3.0
"""Longest wait for inference at the end; what it was told to unload, it unloads in its own time."""


@dataclass
class Serving:
    """The run's side of the server at the other end of `client`."""

    run: RunId
    client: InferenceClient
    probe_tolerance: float
    findings: dict[str, Finding] = field(default_factory=dict)
    """By name: what probing found of versions that the server is known to hold, where it cannot name what it holds."""
    temperature_checked: bool = False
    """Whether the server was seen to give log-probs of the distribution that it samples from; asked as findings are."""

    async def from_one_server(self, published: Published, what: str, work: Callable[[], Awaitable[T]]) -> T:
        """What `work` gives, all of it sampled by one server that holds this version.

        A server that goes away is waited for. Nothing of what it had sampled is kept: requests are keyed by their
        seeds, so work that is begun again gives the same.
        """
        losses = refusals = 0
        while True:
            try:
                await self.serve(published)
                return await work()
            except Refused as error:  # most often: it was started again, or gave the adapter's place to another run
                refusals += 1
                if refusals == REFUSALS_MAX:
                    raise
                log.warning("run %s: %s is begun again: %s", self.run, what, error)
                await asyncio.sleep(refusals * REFUSED_PAUSE_SECONDS)
            except InferenceError as error:
                losses, refusals = losses + 1, 0
                if losses == LOSSES_MAX:
                    raise
                await self.wait_for_inference(error)

    async def wait_for_inference(self, error: InferenceError) -> None:
        """Until a server that went away with `error` is well. Raises `error` if it was well all the time, ServerGone
        if it does not come back."""
        if not isinstance(error, ServerGone) and await self.client.is_well():
            raise error
        log.warning("run %s: %s; waiting up to %g seconds for inference", self.run, error, INFERENCE_START_SECONDS)
        try:
            await self.client.wait_ready(INFERENCE_START_SECONDS)
        except InferenceError as last:
            raise ServerGone(
                f"{error}. It was not well again within {INFERENCE_START_SECONDS:g} seconds (last: {last}); resume the"
                " run once it is"
            ) from None
        log.info("run %s: %s is well", self.run, self.client.url)

    async def serve(self, published: Published) -> None:
        """Have inference hold this version of the run and no other. Nothing is in flight between two batches.

        A server that cannot name what it holds is probed, once a version. Raises WrongAdapter when what it holds under
        the version's name is another adapter, and still is after it was loaded again.
        """
        version = published.version
        if version.name not in await self.unload_all_but(version.name):
            await self.load(published)
        elif self.client.is_vllm and version.name not in self.findings:
            await self.probe_what_is_there(published)

    async def probe_what_is_there(self, published: Published) -> None:
        """Of an earlier orchestrator's loading, or somebody else's."""
        try:
            await self.probe(published)
        except WrongAdapter as error:
            log.warning("%s; it is loaded again", error)
            await self.client.unload_adapter(published.version.name)
            await self.load(published)

    async def load(self, published: Published) -> None:
        version = published.version
        self.findings.clear()
        await self.client.load_adapter(version, published.path)
        if version.name not in await self.client.served_models():
            raise Refused(
                f"run {self.run}: {self.client.url} said that it loaded {version.name} from {published.path}, but"
                " does not serve it; nothing was sampled"
            )
        if self.client.is_vllm:
            await self.probe(published)

    async def probe(self, published: Published) -> None:
        """Raises WrongAdapter, and InferenceError for log-probs of another distribution than the sampled one."""
        probe, name = Probe.read(published.path), published.version.name
        if probe is None:
            log.warning(
                "run %s: %s was published without a probe, so that nobody can tell whether the server holds it: "
                "undecided. trainer.publish_probes = true makes the trainer publish them",
                self.run, name,
            )  # fmt: skip
            self.findings[name] = Finding("undecided", None, None, None, self.probe_tolerance)
            return
        served = await self.client.next_tokens(name, probe.prompt, PROBED_TOKENS)
        if not self.temperature_checked:
            sharp = await self.client.next_tokens(name, probe.prompt, PROBED_TOKENS, PROBED_TEMPERATURE)
            try:
                refuse_raw_logprobs(served, sharp, PROBED_TEMPERATURE)
            except InferenceError as error:
                raise InferenceError(f"run {self.run}: {self.client.url}: {error}") from None
            self.temperature_checked = True
        try:
            self.findings[name] = finding = judge(probe, served, self.probe_tolerance)
        except WrongAdapter as error:
            raise WrongAdapter(f"run {self.run}: {self.client.url} does not hold {name}: {error}") from None
        log.info("run %s: %s in inference is %s", self.run, name, finding)

    async def unload_all_but(self, kept: str | None) -> list[str]:
        """Unload this run's versions, but `kept`. Returns what was served before."""
        served = await self.client.served_models()
        for name in served:
            if name != kept and self.is_ours(name):
                await self.client.unload_adapter(name)
        return served

    async def leave_inference(self) -> None:
        """Let a server that is there go of the run's versions: it may outlive this orchestrator by far."""
        try:
            await asyncio.wait_for(self.unload_all_but(None), LEAVE_SECONDS)
        except (InferenceError, TimeoutError) as error:
            log.info("run %s: its versions may still be in inference: %s", self.run, str(error) or "no answer")

    def is_ours(self, model: str) -> bool:
        try:
            return parse_version_name(model)[0] == self.run
        except BadRunId:
            return False  # the base, or an adapter that a person loaded
