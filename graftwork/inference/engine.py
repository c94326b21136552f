"""The embedded engine: a worker, on one thread, that owns the model, and a thread-safe front.

Requests and adapter changes go through one inbox and are taken in order, between two steps of the scheduler. A bad
request is answered with its error; the worker goes on. Anything unexpected ends the worker: everybody who waits gets an
EngineFault, and `fault` says what it was.

Slots are a cache, for those who load may die before they unload: an adapter that comes when all are taken gets the slot
of the least recently used one that no request uses. Who asks for that one hears that it is not loaded, and loads it.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from graftwork.errors import GraftworkError
from graftwork.inference.lanes import Job, Source, refuse
from graftwork.inference.requests import EngineFault, GenerationRequest, GenerationResult, Limits, UnknownModel
from graftwork.inference.scheduler import Counters, Decode, Scheduler
from graftwork.inference.shelf import Shelf, Shelved, read_adapter
from graftwork.model.base import BaseModel

log = logging.getLogger("graftwork.inference")

T = TypeVar("T")


@dataclass(frozen=True)
class ServedModel:
    """A name that can be asked. `path`: the adapter's folder, None for the base."""

    name: str
    path: Path | None
    digest: str | None


@dataclass(frozen=True)
class _Generate:
    request: GenerationRequest
    future: Future[GenerationResult]


@dataclass(frozen=True)
class _Load:
    shelved: Shelved
    future: Future[None]


@dataclass(frozen=True)
class _Unload:
    name: str
    future: Future[None]


class _Close:
    pass


_Command = _Generate | _Load | _Unload | _Close


class Engine:
    """`engine.work_for(front)` makes this thread the worker while `front` runs on another: the way for programs, as
    GNU's OpenMP counts a main thread among those that compute, so that beside it the threads of a product sleep after
    each, and small products take twice as long. `with Engine(...) as engine` gives the worker a thread of its own.

    name           what the bare base answers to
    max_adapters   slots; max_sequences: lanes; max_model_len: prompt and answer together, in tokens, cut to what the
                   base can do
    eos_token_ids  tokens that end an answer
    decode         token ids -> text, for stop strings; without it requests with `stop` are refused
    """

    def __init__(
        self, base: BaseModel, *, name: str, eos_token_ids: Sequence[int], max_adapters: int = 4,
        max_sequences: int = 512, max_model_len: int = 1024, decode: Decode | None = None,
    ) -> None:  # fmt: skip
        self._base = base
        self.eos_token_ids = tuple(eos_token_ids)
        self.limits = Limits(base.vocab_size, min(max_model_len, base.max_positions), decode is not None)
        bank = base.new_bank(max_adapters, gradients=False)
        self._shelf = Shelf(bank, name)
        self._scheduler = Scheduler(
            base, bank, max_sequences=max_sequences, max_model_len=self.limits.max_model_len,
            eos_token_ids=eos_token_ids, decode=decode,
        )  # fmt: skip
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._leaving: list[tuple[Source, Future[None]]] = []
        self._gate = threading.Lock()  # between posting a command and the end of the worker
        self._ended: str | None = None
        self._thread: threading.Thread | None = None

    # --- the front: any thread --------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread = threading.Thread(target=self.work, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Fail what is under way and end the worker; waits for it where `start` began it."""
        with self._gate:
            self._inbox.put(_Close())
        if self._thread is not None:
            self._thread.join()

    def work_for(self, front: Callable[[], T]) -> T:
        """What `front` returns, on a thread of its own; this one is the worker until then, and the engine is closed
        afterwards. Raises what `front` raises, and EngineFault, which `front` meets too, when the worker broke."""

        def to_its_end() -> T:
            try:
                return front()
            finally:
                self.close()

        with ThreadPoolExecutor(1, "front") as pool:
            fronting = pool.submit(to_its_end)
            try:
                self.work()
            except EngineFault:
                log.exception("the engine broke")
                raise
            return fronting.result()

    def __enter__(self) -> Engine:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def fault(self) -> str | None:
        """Why the engine no longer answers; None while it does."""
        return self._ended

    @property
    def counters(self) -> Counters:
        return self._scheduler.counters

    @property
    def base_name(self) -> str:
        return self._shelf.base.name

    def models(self) -> list[ServedModel]:
        """The base first, then the adapters in the order of loading."""
        adapters = [ServedModel(name, path, source.digest) for name, (source, path) in self._shelf.entries.items()]
        return [ServedModel(self.base_name, None, None), *adapters]

    def submit(self, request: GenerationRequest) -> Future[GenerationResult]:
        """Queue a request. Cancel the future and its sequences are dropped.

        The future raises BadRequest, UnknownModel, InferenceError (probabilities that are not finite) or EngineFault.
        """
        future: Future[GenerationResult] = Future()
        self._post(_Generate(request, future))
        return future

    def load(self, name: str, folder: Path) -> ServedModel:
        """Read, check and hold the adapter in a PEFT folder; blocks. Reading happens on the caller's thread, so that
        others go on sampling. Raises BadRequest (name taken, no slot that is free or idle, another digest than the name
        says), AdapterError, Damaged, EngineFault."""
        self._shelf.check_name(name)
        future: Future[None] = Future()
        shelved = read_adapter(name, folder, self._base.spec, self._base.fingerprint)
        self._post(_Load(shelved, future))
        future.result()
        return ServedModel(name, folder, shelved.digest)

    def unload(self, name: str) -> None:
        """Take an adapter out. From now on nothing new can ask for it; requests under way end as they would have; the
        slot is free when the last of them has ended, and only then this returns. Raises UnknownModel, EngineFault."""
        future: Future[None] = Future()
        self._post(_Unload(name, future))
        future.result()

    def _post(self, command: _Command) -> None:
        with self._gate:
            if self._ended is not None:
                raise EngineFault(self._ended)
            self._inbox.put(command)

    # --- the worker -------------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Be the worker until `close` is called. Raises EngineFault when it breaks; `fault` says so too."""
        reason = "the engine was closed"
        try:
            with torch.inference_mode():
                while self._take_commands():
                    if self._scheduler.busy:
                        self._scheduler.step()
                    self._free_slots()
        except BaseException as error:
            reason = f"the engine failed: {type(error).__name__}: {error}; see its log and start it again"
            if not isinstance(error, Exception):
                raise
            raise EngineFault(reason) from error
        finally:
            self._end(reason)

    def _take_commands(self) -> bool:
        """Carry out what has come in; wait for something if there is nothing else to do. False: close."""
        while True:
            try:
                command = self._inbox.get(block=not self._scheduler.busy)
            except queue.Empty:
                return True
            if isinstance(command, _Close):
                return False
            self._carry_out(command)

    def _carry_out(self, command: _Generate | _Load | _Unload) -> None:
        try:
            if isinstance(command, _Generate):
                self._begin(command)
            elif isinstance(command, _Load):
                self._put(command.shelved)
                command.future.set_result(None)
            else:
                source = self._shelf.withdraw(command.name)
                if source is None:
                    raise self._unknown(command.name)
                self._leaving.append((source, command.future))
                self._free_slots()
        except GraftworkError as error:
            refuse(command.future, error)

    def _begin(self, command: _Generate) -> None:
        source = self._shelf.find(command.request.model)
        if source is None:
            raise self._unknown(command.request.model)
        self.limits.check(command.request)
        self._scheduler.add(Job(command.request, source, command.future, command.request.settled_seed))

    def _unknown(self, name: str) -> UnknownModel:
        served = ", ".join(model.name for model in self.models())
        return UnknownModel(f"model {name!r} is not loaded; loaded: {served}. POST /v1/load_lora_adapter loads one")

    def _put(self, shelved: Shelved) -> None:
        """Into a free slot, or into that of an adapter that has to go. Raises BadRequest."""
        self._shelf.check_name(shelved.name)
        if self._shelf.is_full and (idle := self._shelf.least_used(self._slots_in_use())) is not None:
            log.info("%s makes room for %s: all %d slots are taken", idle.name, shelved.name, self._shelf.bank.slots)
            self._shelf.withdraw(idle.name)
            self._free(idle)
        self._shelf.put(shelved)

    def _slots_in_use(self) -> set[int]:
        """By requests that are under way or wait; what is still in the inbox came after the command that asks."""
        return {job.source.slot for job in self._scheduler.jobs}

    def _free_slots(self) -> None:
        """Free the slots of withdrawn adapters that no request uses any more."""
        if not self._leaving:
            return
        in_use = self._slots_in_use()
        for source, future in [pair for pair in self._leaving if pair[0].slot not in in_use]:
            self._free(source)
            self._leaving.remove((source, future))
            future.set_result(None)

    def _free(self, source: Source) -> None:
        """Leave nothing of an adapter that was withdrawn and that no request uses: neither weights nor a prefix."""
        self._scheduler.forget(source.slot)
        self._shelf.free(source)

    def _end(self, reason: str) -> None:
        """Nobody is left waiting."""
        with self._gate:
            self._ended = reason
            for job in self._scheduler.jobs:
                job.fail(EngineFault(reason))
            for _, future in self._leaving:
                refuse(future, EngineFault(reason))
            while not self._inbox.empty():
                command = self._inbox.get()
                if not isinstance(command, _Close):
                    refuse(command.future, EngineFault(reason))
