"""What does one more run cost in memory, over the least that it can: 16 bytes a parameter?

The least is fp32 master, gradient and both moments of AdamW. A trainer with S runs in S slots is held against one with
S + 1, after a step of each run. Counted are the storages of all tensors of the process, which is exact. Beside it
stands what the allocator gave out (malloc on a CPU, CUDA's on a GPU): with what is no tensor, to a few kilobytes.

A bfloat16 base computes with a rounded copy of the masters: 18 bytes. A run with a KL loss, which is not counted here,
holds its starting adapter frozen besides.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.bases import adapter_for, answers, base_folder, load
from bench.harness import Measured, Setting, at_most, main
from bench.made_runs import MadeRuns, model_of, scratch
from graftwork.config.section import ModelConfig
from graftwork.model.base import BaseModel
from proofs.rank_memory import tensor_bytes

ROW, NAME = 7, "slot_memory"
LEAST_BYTES = 16
SEQUENCES, PROMPT_TOKENS, ANSWER_TOKENS = 2, 8, 8


@dataclass(frozen=True)
class Held:
    """Bytes that this process holds."""

    tensors: int
    allocated: int


def measure(setting: Setting) -> Iterator[Measured]:
    path, slots = base_folder("smollm2-135m"), 2
    for dtype, name in (("float32", NAME), ("bfloat16", f"{NAME}_bf16")):
        base = load(path, setting.device, dtype)
        with scratch() as folder:
            fewer, more = (held_with(folder / str(count), base, model_of(path, base), count) for count in
                           (slots, slots + 1))  # fmt: skip
        least = LEAST_BYTES * parameters_of_a_run(base)
        figures = {
            "base": path.name, "dtype": str(base.dtype), "parameters_of_a_run": parameters_of_a_run(base),
            "slots": [slots, slots + 1], "tensor_bytes": [fewer.tensors, more.tensors],
            "allocated_bytes": [fewer.allocated, more.allocated],
            "allocated_ratio": round((more.allocated - fewer.allocated) / least, 4),
        }  # fmt: skip
        yield Measured(ROW, name, (more.tensors - fewer.tensors) / least, at_most(1.15), figures)


def parameters_of_a_run(base: BaseModel) -> int:
    return sum(pair.a.numel() + pair.b.numel() for pair in adapter_for(base).pairs.values())


def held_with(folder: Path, base: BaseModel, model: ModelConfig, slots: int) -> Held:
    """With a run in each slot that has taken a step."""
    with MadeRuns.of(folder, base, model, slots, SEQUENCES * (PROMPT_TOKENS + ANSWER_TOKENS)) as runs:
        for slot in range(slots):
            tenant = runs.admit(f"r{slot}", SEQUENCES)
            runs.lay(tenant, answers(base, SEQUENCES, PROMPT_TOKENS, ANSWER_TOKENS, seed=slot), 1)
            runs.trainer.one_pass()
            assert tenant.step == 1, "its step is not taken"
            assert tenant.learner.optimizer.moments is not None, "its gradient was not finite"
            assert all(bool(moment.any()) for moment in tenant.learner.optimizer.moments)
        return Held(tensor_bytes(), _allocated(base.device))


def _allocated(device: torch.device) -> int:
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _malloc_bytes()


class _MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks",
                     "keepcost")
    ]  # fmt: skip


def _malloc_bytes() -> int:
    """In use: small blocks, and those that have pages of their own."""
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = _MallInfo
    info = ask()
    return int(info.uordblks + info.hblkhd)


if __name__ == "__main__":
    main(ROW, NAME, __doc__, measure)
