"""Environments of the package `verifiers` (0.4, its v1 API): `environment.name = "verifiers:<module>"`.

Such an environment samples by itself. It is given the server's root, the version's name and the run's sampling settings
(`TrainClientConfig`, `ModelContext`), plays an episode a sample, and gives traces: what was said, with tokens as they
were read and sampled and their log-probs. `traces.py` makes training sequences of them. docs/verifiers.md is the guide.

Nothing here imports the package before an environment of it is asked for; what is imported is named by the run's own
configuration and by nothing that an adapter or a checkpoint says.

**Which version answered.** Every request names the version, and carries its digest in If-Match. The embedded server
answers such a request from an adapter of just that digest or not at all, so it vouches for every answer that there is.
A server that does not list digests (vLLM) is taken at its word: "claimed".

**Whose fault a failure is.** An episode that fails is data. A server that is gone, that does not serve the version or
that breaks ends the batch, like everywhere else; it is told apart by the HTTP status that the model call ended with.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from graftwork.config.run import VERIFIERS, EnvironmentConfig, SamplingConfig
from graftwork.errors import ConfigError, GraftworkError, InferenceError, Refused, RunError, ServerGone
from graftwork.rollouts.chat import ChatTokenizer
from graftwork.rollouts.client import InferenceClient
from graftwork.rollouts.collect import ERROR_CHARACTERS, Played, Request, Source, outcome
from graftwork.rollouts.environment import Environment, Split, load_environment, see_working_directory
from graftwork.rollouts.sampling import Sampler
from graftwork.rollouts.traces import NoRollout, TracedTalk, read_talk
from graftwork.rollouts.wave import request_seed
from graftwork.store.queue import DigestSource

HELDOUT, RENDERER = "heldout_tasks", "renderer"
"""Options of ours, beside those of the environment's own [env] table."""
HELDOUT_ONE_IN, HELDOUT_MAX = 10, 1000
"""How many tasks are held out where nothing is said: one in ten, at most (and of an endless taskset) a thousand."""
KEY_VARIABLE = "GRAFTWORK_INFERENCE_KEY"
"""Where a key for the server is looked up; there need be none."""
CHATTY = ("verifiers", "aiohttp.access")
"""Loggers that would write some lines a rollout."""
GONE, UNKNOWN = (502, 503), (404, 412)
"""HTTP statuses of a model call: nobody answered; the server does not hold the version, or another of its name."""


def environment_of(config: EnvironmentConfig) -> Environment | VerifiersEnvironment:
    """What `[run.environment]` names. Raises ConfigError."""
    if config.is_verifiers:
        return VerifiersEnvironment(config, load_package(config.name))
    return load_environment(config.name, config.options)


def load_package(name: str) -> ModuleType:
    """The package's v1 API. Raises ConfigError, naming the extra, where it is not installed."""
    try:
        import verifiers.v1 as vf
    except ImportError as error:
        raise ConfigError(
            f"environment {name!r} needs the package verifiers ({error}); install it with"
            " pip install 'graftwork[verifiers]'"
        ) from error
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    return vf


@dataclass(frozen=True)
class Numbering:
    """Which numbers of a taskset are trained on and which are held out.

    total    tasks there are; None: there is no end to them
    heldout  tasks that are held out: the last ones, or the first ones of a taskset without an end
    """

    total: int | None
    heldout: int

    def numbers(self, seed: int, split: Split, first: int, count: int) -> list[int]:
        """The taskset's numbers of tasks `first` to `first + count - 1` of a split: a function of the arguments.

        Training tasks are shuffled, anew for every time through all of them; none comes twice before all came once.
        Held-out tasks come in their order, from the beginning again when there are not as many as asked for.
        """
        wanted = range(first, first + count)
        if split == "heldout":
            if self.heldout == 0:
                raise ConfigError(f"environment.options.{HELDOUT} is 0, so there is nothing to evaluate on")
            start = 0 if self.total is None else self.total - self.heldout
            return [start + i % self.heldout for i in wanted]
        if self.total is None:
            return [self.heldout + i for i in wanted]
        size = self.total - self.heldout
        orders = {epoch: _order(seed, epoch, size) for epoch in {i // size for i in wanted}}
        return [orders[i // size][i % size] for i in wanted]


def _order(seed: int, epoch: int, size: int) -> list[int]:
    order = list(range(size))
    random.Random(f"verifiers {seed} {epoch}").shuffle(order)
    return order


class Tasks:
    """A taskset's tasks by number. An endless one is read from its beginning, and again if an earlier one is wanted."""

    def __init__(self, taskset: Any, heldout: int | None, name: str) -> None:
        """Raises ConfigError for a taskset with nothing left to train on."""
        self._taskset = taskset
        self._known: list[Any] | None = list(taskset) if taskset.bounded else None
        self._stream: Iterator[Any] = iter(())
        self._position = math.inf
        total = None if self._known is None else len(self._known)
        if heldout is None:
            heldout = HELDOUT_MAX if total is None else min(HELDOUT_MAX, math.ceil(total / HELDOUT_ONE_IN))
        if total is not None and total <= heldout:
            raise ConfigError(
                f"environment {name!r} has {total} tasks and {heldout} are held out: none is left to train on"
            )
        self.split = Numbering(total, heldout)

    def get(self, numbers: Sequence[int]) -> list[Any]:
        if self._known is not None:
            return [self._known[number] for number in numbers]
        found = {number: self._read_to(number) for number in sorted(set(numbers))}
        return [found[number] for number in numbers]

    def _read_to(self, number: int) -> Any:
        if number < self._position:
            self._stream, self._position = iter(self._taskset), 0
        task = next(islice(self._stream, number - int(self._position), None), None)
        if task is None:
            raise RunError(
                f"the taskset says that it is endless, but ended before task {number}; the batch is not made"
            )
        self._position = number + 1
        return task


class VerifiersEnvironment:
    """Satisfies `collect.PlaysBatches`."""

    def __init__(self, config: EnvironmentConfig, vf: Any) -> None:
        """Raises ConfigError: a module that is not there, an option that it does not take."""
        self.config, self._vf = config, vf
        options = dict(config.options)
        heldout, self._renderer = options.pop(HELDOUT, None), options.pop(RENDERER, None)
        if heldout is not None and (type(heldout) is not int or heldout < 0):
            raise ConfigError(f"environment.options.{HELDOUT} = {heldout!r} is not a whole number from 0 up")
        see_working_directory()
        taskset = {**options.pop("taskset", {}), "id": config.name.removeprefix(VERIFIERS)}
        try:
            self._env = vf.load_environment(vf.resolve_env_config({**options, "taskset": taskset}))
            self._client("http://127.0.0.1", ".", 1.0, None)  # refuses a renderer that there is not
            self.tasks = Tasks(self._env.taskset, heldout, config.name)
        except GraftworkError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise ConfigError(f"environment {config.name!r} cannot be made: {what}") from error

    async def play(
        self, tokenizer: ChatTokenizer, sampler: Sampler, source: Source, request: Request
    ) -> tuple[list[Played], DigestSource]:
        """See `PlaysBatches.play`. Raises ConfigError for a sampler that is no server, RunError for an environment that
        trains more than one agent or samples otherwise than the run."""
        if not isinstance(sampler, InferenceClient):
            raise ConfigError(
                f"environment {self.config.name!r} samples at a server, and here is none; `graftwork rl` with"
                " [run.evaluation] plays its held-out tasks"
            )
        leave_out_of_proxies(sampler.url)
        digest = source.digest if await sampler.lists_digest(source.model, source.digest) else None
        client = self._client(sampler.url, str(tokenizer.source), sampler.timeout_seconds, digest)
        split = self.tasks.split
        numbers = split.numbers(request.seed, request.split, request.first_index, request.prompts)
        try:
            tasks = self.tasks.get(numbers)
        except GraftworkError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise RunError(f"environment {self.config.name!r} gives no tasks {min(numbers)} and on: {what}") from error
        gate = asyncio.Semaphore(self.config.max_concurrent)

        async def one(p: int, s: int) -> Played:
            seed = request_seed(f"{request.key} {p} {s}", 0, "single")
            sampling = sampling_of(request.sampling, None if sampler.is_vllm else seed)
            context = self._vf.ModelContext(source.model, client, self._vf.SamplingConfig(**sampling))
            async with gate:
                return await self._episode(tasks[p], context, TracedTalk(p, s))

        played = await self._serve(lambda: [one(p, s) for p in range(request.prompts) for s in range(request.samples)])
        return played, "claimed" if digest is None else "engine"

    async def _serve(self, samples: Callable[[], list[Coroutine[Any, Any, Played]]]) -> list[Played]:
        """Play them with what the environment shares among its rollouts. That lives for one batch, and so do the
        package's connections, of which it keeps one a version. Raises RunError when it does not come up."""
        tasks: list[asyncio.Task[Played]] = []
        try:
            async with self._env.serving():
                try:
                    tasks += [asyncio.create_task(sample) for sample in samples()]
                    return await asyncio.gather(*tasks)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)
        except GraftworkError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise RunError(f"environment {self.config.name!r} cannot be served: {what}") from error

    def _client(self, url: str, base: str, timeout_seconds: float, digest: str | None) -> Any:
        return self._vf.TrainClientConfig.model_validate({
            "base_url": f"{url}/v1",
            "api_key_var": KEY_VARIABLE,
            "headers": {} if digest is None else {"If-Match": f'"{digest}"'},
            "timeout": {"read": timeout_seconds},
            "renderer": self._renderer,
            "renderer_model_name": base,
        })  # fmt: skip

    async def _episode(self, task: Any, context: Any, talk: TracedTalk) -> Played:
        """Play one sample. Raises GraftworkError for what is no fault of the environment's."""
        slot = self._env.slots(task)[0]
        try:
            async with asyncio.timeout(self.config.timeout_seconds) as clock:
                episode = await self._env.run_slot(slot, context)
            complete = self._env.complete(episode)
        except GraftworkError:
            raise
        except Exception as error:  # noqa: BLE001 - the environment's own code: whatever it raises is this rollout's
            if clock.expired():
                return Played(talk, math.nan, "it took longer than environment.timeout_seconds allows")
            return Played(talk, math.nan, f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS])
        refuse_server_faults(episode)
        try:
            trace = learnt_trace(episode, context.model, context.sampling, complete)
            talk = read_talk(trace, talk.prompt_index, talk.sample_index, self.config.max_branches)
        except NoRollout as failure:
            return Played(talk, math.nan, str(failure)[:ERROR_CHARACTERS])
        return outcome(talk, trace.reward if trace.rewards else None)


def sampling_of(sampling: SamplingConfig, seed: int | None) -> dict[str, Any]:
    """The run's sampling settings as the package and the server call them."""
    settings: dict[str, Any] = {
        "temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_tokens,
    }  # fmt: skip
    return settings if seed is None else {**settings, "seed": seed}


def learnt_trace(episode: Any, model: str, sampling: Any, complete: bool) -> Any:
    """The trace of the one agent that trains. Raises NoRollout for an episode that failed, RunError for several agents
    that train, or one that does not sample as the run says."""
    if not complete:
        errors = [*episode.errors, *(error for trace in episode.traces if not trace.ok for error in trace.errors)]
        raise NoRollout(f"{errors[-1].type}: {errors[-1].message}" if errors else "the episode did not complete")
    traces = [trace for trace in episode.traces if trace.agent.trainable]
    if len(traces) != 1:
        raise RunError(
            f"the environment's episode has {len(traces)} rollouts of agents that train"
            f" ({', '.join(trace.agent.name for trace in traces)}); a run trains one adapter from one of them: set"
            " `trainable = False` on the others in the environment's setup()"
        )
    agent = traces[0].agent
    if (agent.config.model, agent.config.sampling) != (model, sampling):
        raise RunError(
            f"agent {agent.name!r} samples from {agent.config.model} with {agent.config.sampling}, the run from {model}"
            f" with {sampling}; leave model and sampling of the agent that trains to the run"
        )
    if asked := {call.model for call in traces[0].calls} - {model}:
        raise InferenceError(f"agent {agent.name!r} asked {', '.join(map(str, asked))} for tokens, the run is {model}")
    if not traces[0].ok:
        raise NoRollout(f"agent {agent.name!r} failed: {traces[0].last_error and traces[0].last_error.message}")
    return traces[0]


def refuse_server_faults(episode: Any) -> None:
    """Raises ServerGone, Refused or InferenceError when the last model call of the agent that trains ended with a fault
    of the server's. One that was asked again and answered is forgotten; one that was not would pass for an answer."""
    for trace in episode.traces:
        error = trace.calls[-1].error if trace.agent.trainable and trace.calls else None
        status = 0 if error is None else error.status_code or 0
        if error is not None and (status >= 500 or status in UNKNOWN):
            kind = ServerGone if status in GONE else Refused if status in UNKNOWN else InferenceError
            raise kind(f"a model call to {trace.calls[-1].model} ended with {status}: {error.message}")


def leave_out_of_proxies(url: str) -> None:
    """A proxy that is set for downloads must not stand between programs of one machine, nor before the server; the
    package's clients read it from the environment of this process."""
    names = [name for name in os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")).split(",") if name]
    hosts = dict.fromkeys([*names, "127.0.0.1", "localhost", urlsplit(url).hostname or ""])
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(host for host in hosts if host)
