"""What a rank holds, measured against the formula of docs/scaling.md. On every rank, by on_ranks.py:

slots   bytes of all tensors, with that many slots in use, after a step of each (so that AdamW has its moments)
load    the most memory while a base is loaded, beyond what the process had before
"""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from graftwork.config.run import OptimizerConfig
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.lora.slots import SlotLayout
from graftwork.model.base import BaseModel, Placement, load_base, slot_spec
from graftwork.parallel.ranks import Ranks
from graftwork.training.learner import Banks, Learner, LearnerConfig, gradient_norm, learn
from proofs.ranks_agree import examples_of, snapshot_for

LORA = LoraConfig(max_rank=16)
SMALL: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
LARGE: dict[str, Any] = {
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 10,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
"""1.26 GB in bfloat16."""
FILE_BYTES = 400 * 2**20
SAMPLE_SECONDS = 0.001
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_base(folder: Path, shape: Mapping[str, Any]) -> Path:
    """A base of random bfloat16 weights, in several files; never in memory as a whole."""
    config = Qwen3Config(**shape, max_position_embeddings=2048)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    held: dict[str, Tensor] = {}
    places: dict[str, str] = {}

    def flush() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(held, folder / name)
        places.update(dict.fromkeys(held, name))
        held.clear()

    for name, parameter in model.named_parameters():
        held[name] = (torch.randn(parameter.shape, generator=generator) * 0.02).to(torch.bfloat16)
        if sum(tensor.nbytes for tensor in held.values()) > FILE_BYTES:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@dataclass(frozen=True)
class BaseBytes:
    """Of a base: all of it, and its largest FSDP unit (a layer, or what is outside the layers)."""

    whole: int
    largest_unit: int

    @staticmethod
    def of(path: Path, itemsize: int) -> BaseBytes:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        units: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            _, _, inside = name.partition(".layers.")
            unit = inside.partition(".")[0]
            units[unit] = units.get(unit, 0) + parameter.numel() * itemsize
        return BaseBytes(sum(units.values()), max(units.values()))


def expected_bytes(base: int, slots: int, row: int, ranks: int, compute_itemsize: int) -> float:
    """docs/scaling.md: the base's share, and each slot's: compute copy and gradients whole, masters and moments cut.

    base: bytes of the base. row: elements of a slot's row. A process alone computes with fp32 masters as they are.
    """
    copy = 0 if ranks == 1 and compute_itemsize == 4 else compute_itemsize
    return base / ranks + slots * row * (copy + 4 + 12 / ranks)


def tensor_bytes() -> int:
    """Of all tensors in this process, storages counted once."""
    gc.collect()
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        if isinstance(found, Tensor) and not isinstance(found, FakeTensor) and found.device.type != "meta":
            tensor = found.to_local() if isinstance(found, DTensor) else found
            try:
                storage = tensor.untyped_storage()
            except NotImplementedError:  # a tensor that stands for others has none
                continue
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def slots(ranks: Ranks, base_path: str, dtype: str, counts: str) -> dict[str, Any]:
    """By number of slots: bytes on the rank that holds most beyond what it held before, and by the formula."""
    folder, before = Path(base_path), tensor_bytes()
    base_bytes = BaseBytes.of(folder, DTYPES[dtype].itemsize).whole
    row = SlotLayout(slot_spec(str(folder), LORA)).row_numel
    base = load_base(ModelConfig(path=str(folder), dtype=dtype, device="cpu"), LORA, Placement(ranks))  # type: ignore[arg-type]
    found = {}
    for count in map(int, counts.split(",")):
        held = in_use(base, count)
        most = max(ranks.gather(tensor_bytes() - before))
        formula = expected_bytes(base_bytes, count, row, ranks.size, DTYPES[dtype].itemsize)
        found[str(count)] = {"measured": most, "formula": round(formula), "ratio": round(most / formula, 4)}
        del held
    return found


def in_use(base: BaseModel, count: int) -> list[Learner]:
    """Runs in so many slots, each after a step."""
    banks = Banks.of(base, count)
    config = LearnerConfig(OptimizerConfig(), None, 1.0, 64, 16)
    learners = []
    for slot in range(count):
        one = Learner(banks, slot, config, snapshot_for(base, LORA.max_rank, slot))
        one.feed(examples_of((9, 12, 7, 8), slot))
        while one.rounds:
            learn([one])
        one.step("batch", gradient_norm([one.report()]))
        one.reference = None  # rank 0 keeps it on the CPU for checkpoints, where the loss needs one
        learners.append(one)
    return learners


def load(ranks: Ranks, base_path: str, small: str) -> dict[str, Any]:
    """small: another base, loaded before, so that what a first one costs is not counted."""
    folder = Path(base_path)
    about = BaseBytes.of(folder, 2)
    load_base(ModelConfig(path=small, dtype="bfloat16", device="cpu"), LORA, Placement(ranks))
    gc.collect()
    before = anonymous_bytes()
    with sampled() as samples:
        base = load_base(ModelConfig(path=str(folder), dtype="bfloat16", device="cpu"), LORA, Placement(ranks))
    peaks = ranks.gather(max(samples) - before)
    held = ranks.gather(
        sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in base.trunk.parameters())
    )
    bound = about.whole / ranks.size + about.largest_unit
    return {
        "base_bytes": about.whole, "largest_unit_bytes": about.largest_unit, "held_bytes": held, "peak_bytes": peaks,
        "bound_bytes": round(bound), "ratio": round(max(peaks) / bound, 4),
    }  # fmt: skip


@contextmanager
def sampled() -> Iterator[list[int]]:
    """Anonymous memory of this process, looked at again and again meanwhile."""
    samples, over = [anonymous_bytes()], threading.Event()

    def look() -> None:
        while not over.is_set():
            samples.append(anonymous_bytes())
            time.sleep(SAMPLE_SECONDS)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()
        samples.append(anonymous_bytes())


def anonymous_bytes() -> int:
    """Resident memory without mapped files (/proc/self/status)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
