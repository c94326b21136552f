"""The processes that train together, and what they tell one another. Data only: JSON and bytes, never pickle.

    Ranks.alone()            this process; nothing is communicated
    Ranks.of_torchrun(...)   the processes that torchrun started

Rank 0 decides; `tell` and `hear` carry what it decided, `gather` what became of it.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from graftwork.parallel.watch import Watch

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def under_torchrun() -> bool:
    return all(name in os.environ for name in TORCHRUN_VARIABLES)


def restarts() -> int:
    """How often torchrun has started this job again after one of its processes died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def job_pid() -> int:
    """The process that stands for the whole job: torchrun's, where it started this one."""
    return os.getppid() if under_torchrun() else os.getpid()


def torchrun_store(timeout: timedelta, *, hosts: bool = False) -> dist.Store:
    """A connection to the store through which the ranks find one another, without what an earlier start of the job left
    there: torchrun keeps its store over restarts, and a rank would meet the addresses of dead ones (torch 2.13).

    hosts: rank 0 opens the store where torchrun did not.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_open = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    master = hosts and not is_open and os.environ["RANK"] == "0"
    store = dist.TCPStore(host, port, is_master=master, wait_for_workers=False, timeout=timeout)
    return dist.PrefixStore(f"graftwork/{restarts()}", store)


@dataclass(eq=False)
class Ranks:
    """This process among the others. mesh: of one axis, over all ranks; None for a process alone. watch: is told what
    this rank does, where somebody watches."""

    rank: int
    size: int
    mesh: DeviceMesh | None
    watch: Watch | None = None

    @staticmethod
    def alone() -> Ranks:
        return Ranks(0, 1, None)

    @staticmethod
    def of_torchrun(device: torch.device, timeout_seconds: float) -> Ranks:
        """Join the others. timeout_seconds: of one communication. Orders and outcomes travel by gloo, also on GPUs."""
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        timeout = timedelta(seconds=timeout_seconds)
        dist.init_process_group(
            backend, timeout=timeout, store=torchrun_store(timeout, hosts=True), rank=rank, world_size=size
        )
        return Ranks(rank, size, init_device_mesh(device.type, (size,)) if size > 1 else None)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def exit(self) -> None:
        """Leave the others, once nothing is communicated any more, and end this process. Not by the interpreter's own
        end: in one of ten it meets a thread of gloo's that waits for it, and aborts (torch 2.13, seen on a CPU)."""
        dist.destroy_process_group()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    @contextmanager
    def at(self, order: str) -> Iterator[None]:
        """Inside, this rank carries out an order; for whoever watches."""
        if self.watch is not None:
            self.watch.at(order)
        yield
        if self.watch is not None:
            self.watch.waits()

    # --- what is said -------------------------------------------------------------------------------------------------

    def tell(self, value: Any, payload: bytes = b"") -> None:
        """Rank 0, to all others: a JSON value and bytes."""
        assert self.leads
        if self.size == 1:
            return
        head = json.dumps(value).encode()
        dist.broadcast(torch.tensor([len(head), len(payload)]), src=0)
        dist.broadcast(_tensor(head + payload), src=0)

    def hear(self) -> tuple[Any, bytes]:
        """Any other rank: what rank 0 tells."""
        assert not self.leads
        sizes = torch.zeros(2, dtype=torch.int64)
        dist.broadcast(sizes, src=0)
        head, payload = sizes.tolist()
        data = torch.empty(head + payload, dtype=torch.uint8)
        dist.broadcast(data, src=0)
        text = data.numpy().tobytes()
        return json.loads(text[:head]), text[head:]

    def gather(self, value: Any) -> list[Any]:
        """Everyone's JSON value, in the order of ranks, on every rank; NaN and infinity are kept."""
        return [json.loads(data) for data in self.gather_bytes(json.dumps(value).encode())]

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Everyone's bytes, in the order of ranks, on every rank."""
        if self.size == 1:
            return [data]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        counts = [int(size) for size in sizes]
        room = max(counts)
        parts = [torch.empty(room, dtype=torch.uint8) for _ in counts]
        dist.all_gather(parts, _tensor(data.ljust(room, b"\0")))
        return [part[:count].numpy().tobytes() for part, count in zip(parts, counts, strict=True)]


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
