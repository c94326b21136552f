"""A base that is cut over ranks is the base: every bit of it, what it computes, what it says when it cannot be loaded.

`checks` runs on every rank, in the starts of conftest.py.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import random_adapter
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.distributed.tensor import DTensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import graftwork.model.base as base_module
from graftwork.adapters.prepare import PreparedInitAdapter
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.errors import ModelError
from graftwork.lora.linear import Segment
from graftwork.lora.slots import SlotBank
from graftwork.model.attention import Group, PackedPlan
from graftwork.model.base import Ask, BaseModel, Placement, Route, load_base
from graftwork.parallel.parts import local, whole
from graftwork.parallel.ranks import Ranks
from proofs.adapter_models import EXPERT_SHAPE, EXPERTS, SHAPE, make_base

CHECKED = "every check was made"
LORA = LoraConfig(max_rank=4)
BIG = {"vocab_size": 20_000, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12,
       "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
ODD_VOCAB = 61
SLACK_BYTES = 4 << 20
"""What the allocator and the libraries take while a base is loaded."""


# --- bases ------------------------------------------------------------------------------------------------------------


def make_bases(folder: Path) -> None:
    """moe has 12 experts, one by one in its file, split 5, in several files; big has 71 MB."""
    make_base("qwen3", folder)
    (folder / "qwen3").rename(folder / "dense")
    make_base("moe", folder)
    torch.manual_seed(1)
    tied = Qwen3Config(**{**SHAPE, "vocab_size": ODD_VOCAB}, head_dim=16, tie_word_embeddings=True)
    Qwen3ForCausalLM(tied).save_pretrained(folder / "tied")
    split = Qwen3MoeConfig(**SHAPE, **{**EXPERT_SHAPE, "num_experts": 5}, head_dim=16)
    Qwen3MoeForCausalLM(split).save_pretrained(folder / "split", max_shard_size="60KB")
    assert len(list((folder / "split").glob("*.safetensors"))) > 2
    LlamaForCausalLM(LlamaConfig(**BIG, tie_word_embeddings=True)).save_pretrained(folder / "big")
    _broken_bases(folder)


def _broken_bases(folder: Path) -> None:
    first = "model.layers.0.self_attn.q_proj.weight"
    expert = f"model.layers.1.mlp.experts.{EXPERTS - 1}.up_proj.weight"

    def broken(source: str, name: str, change: dict[str, Tensor | None]) -> None:
        shutil.copytree(folder / source, folder / name)
        file = folder / name / "model.safetensors"
        tensors = {**load_file(file), **change}
        save_file({key: value for key, value in tensors.items() if value is not None}, file)

    broken("dense", "missing", {first: None})
    broken("dense", "extra", {"model.layers.7.bias": torch.zeros(3)})
    broken("dense", "shape", {first: torch.zeros(64, 31)})
    broken("dense", "integers", {first: torch.zeros(64, 32, dtype=torch.int8)})
    broken("moe", "missing-expert", {expert: None})
    broken("moe", "extra-expert", {expert.replace(str(EXPERTS - 1), str(EXPERTS)): torch.zeros(24, 32)})
    broken("tied", "untied", {"lm_head.weight": torch.zeros(ODD_VOCAB, 32)})
    shutil.copytree(folder / "dense", folder / "empty")
    (folder / "empty" / "model.safetensors").unlink()
    shutil.copytree(folder / "dense", folder / "torn")
    data = (folder / "dense" / "model.safetensors").read_bytes()
    (folder / "torn" / "model.safetensors").write_bytes(data[: len(data) // 2])


REFUSALS = {
    "missing": r"model.safetensors: model.layers.0.self_attn.q_proj.weight [64, 32] is missing (the first of 1)",
    "extra": "model.layers.7.bias is no tensor of this model",
    "shape": "model.layers.0.self_attn.q_proj.weight has shape [64, 31], expected [64, 32]",
    "integers": "model.layers.0.self_attn.q_proj.weight is I8, expected one of",
    "missing-expert": f"model.layers.1.mlp.experts.{EXPERTS - 1}.up_proj.weight is missing, a part of model.layers.1.",
    "extra-expert": f"model.layers.1.mlp.experts.{EXPERTS}.up_proj.weight is no tensor of this model",
    "untied": "lm_head.weight should be tied",
    "empty": "expected model.safetensors or model.safetensors.index.json, found neither",
    "torn": "torn/model.safetensors: ",
}


# --- what every rank does ---------------------------------------------------------------------------------------------


def checks(ranks: Ranks, folder: str) -> str:
    """Raises AssertionError, on some rank, when something is not so."""
    for kind in ("dense", "tied", "moe", "split") if ranks.size == 2 else ("tied", "split"):
        for dtype in ("float32", "bfloat16"):
            _check_base(Path(folder) / kind, dtype, ranks)
    for name, expected in REFUSALS.items():
        with pytest.raises(ModelError) as caught:
            load_base(_config(Path(folder) / name, "float32"), LORA, Placement(ranks))
        assert expected in str(caught.value), f"{name}: {caught.value}"
    if ranks.size == 2:
        _check_compiled(Path(folder) / "tied", ranks)
    _check_memory(Path(folder) / "big", ranks)
    _check_agreed_dtype(Path(folder) / "dense", ranks)
    replicated = load_base(_config(Path(folder) / "dense", "float32"), LORA, Placement(ranks, sharded=False))
    assert not replicated.sharded and not isinstance(replicated.head, DTensor)
    assert replicated.new_bank(1, gradients=True).mesh is ranks.mesh
    assert replicated.new_bank(1, gradients=False).mesh is None
    return CHECKED


def _config(path: Path, dtype: str) -> ModelConfig:
    return ModelConfig.model_validate({"path": str(path), "dtype": dtype, "device": "cpu"})


def _check_base(path: Path, dtype: str, ranks: Ranks) -> None:
    config = _config(path, dtype)
    alone = load_base(config, LORA)
    cut = load_base(config, LORA, Placement(ranks))
    assert cut.sharded and not alone.sharded
    assert (cut.device, cut.dtype, cut.vocab_size) == (alone.device, alone.dtype, alone.vocab_size)
    assert cut.max_positions == alone.max_positions and cut.spec == alone.spec
    assert cut.fingerprint == alone.fingerprint
    _same_weights(cut, alone)
    if "tied" in path.name:
        assert cut.trunk.head.weight is cut.trunk.body.embed_tokens.weight
    bases = [cut, load_base(config, LORA, Placement(ranks, activation_checkpointing=True))]
    idle = int(ranks.rank == ranks.size - 1)
    everyone, all_but_one = Pass.of(alone, ranks), Pass.of(alone, ranks, idle=idle)
    for base in bases:
        everyone.same_as(Pass.of(base, ranks))
        all_but_one.same_as(Pass.of(base, ranks, idle=idle))
        everyone.same_as(Pass.of(base, ranks))
        assert all(isinstance(p, DTensor) for layer in base.trunk.body.layers for p in layer.parameters())
    _same_weights(cut, alone)
    assert everyone.gradients.any() and all_but_one.gradients.any() != idle


def _check_compiled(path: Path, ranks: Ranks) -> None:
    """Gathered weights, other lengths and another rank's idleness are no reason to compile again."""
    counter, inner = CompileCounter(), base_module.compile_layers
    base_module.compile_layers = partial(inner, backend=counter)
    try:
        wish = Placement(ranks, activation_checkpointing=True, compile_layers=True)
        base = load_base(_config(path, "float32"), LORA, wish)
    finally:
        base_module.compile_layers = inner
    alone = load_base(_config(path, "float32"), LORA)
    Pass.of(alone, ranks).same_as(Pass.of(base, ranks))
    compiled = counter.frame_count
    assert compiled > 5
    idle = 2 if ranks.leads else 0  # a single row is compiled for itself
    Pass.of(alone, ranks, idle=idle).same_as(Pass.of(base, ranks, idle=idle))
    Pass.of(alone, ranks, more=4).same_as(Pass.of(base, ranks, more=4))
    assert counter.frame_count == compiled


def _same_weights(cut: BaseModel, alone: BaseModel) -> None:
    found, expected = (dict(base.trunk.named_parameters(remove_duplicate=False)) for base in (cut, alone))
    assert found.keys() == expected.keys()
    assert sum(local(tensor).numel() for tensor in cut.trunk.parameters()) < alone.trunk.head.weight.numel() * 100
    for name, tensor in found.items():
        assert isinstance(tensor, DTensor) and not tensor.requires_grad, name
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(whole(tensor), expected[name]), name
    found, expected = (dict(base.trunk.named_buffers()) for base in (cut, alone))
    assert found.keys() == expected.keys() and found
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


# --- a forward and a backward pass ------------------------------------------------------------------------------------


@dataclass
class Pass:
    """What came of a micro-batch of two slots, which is another one on each rank. idle: of so many rows of which
    none is asked for; more: of longer sequences."""

    logprobs: list[Tensor]
    entropies: list[Tensor]
    reference: list[Tensor]
    gradients: Tensor

    @staticmethod
    def of(base: BaseModel, ranks: Ranks, *, idle: int = 0, more: int = 0) -> Pass:
        bank, frozen = (_bank(base, gradients) for gradients in (True, False))
        short = 5 + ranks.rank + more
        groups = [Group(0, 2, short), Group(2 * short, 1, 9)] if not idle else [Group(0, 1, idle)]
        lengths = [group.length for group in groups for _ in range(group.count)]
        rows, first = sum(lengths), 2 * lengths[0]
        tokens = torch.randint(ODD_VOCAB, (rows,), generator=torch.Generator().manual_seed(ranks.rank))
        positions = torch.cat([torch.arange(length) for length in lengths])
        segments, asks = [], [_ask(range(0), tokens, 1.0)]
        if not idle:
            segments = [Segment(1, 0, first, 2.0), Segment(0, first, rows, 0.5)]
            asks = [_ask(range(1, first, 2), tokens, 1.0), _ask(range(first, rows - 1), tokens, 0.7)]
        call = (tokens, positions, PackedPlan(groups))
        found = base.logprobs(*call, Route(bank, segments), asks, 4)
        with torch.no_grad():
            reference = base.logprobs(*call, Route(frozen, segments), asks, 4)
        torch.autograd.backward([logprobs.sum() for logprobs, _ in found])
        assert bank.gradients is not None and base.routing.current is None
        return Pass([one.detach() for one, _ in found], [one for _, one in found], [one for one, _ in reference],
                    bank.gradients.clone())  # fmt: skip

    def same_as(self, other: Pass) -> None:
        """To the bit: the ranks gather what a process alone has, and compute the same with it."""
        assert torch.equal(self.gradients, other.gradients)
        for mine, its in zip((self.logprobs, self.entropies, self.reference),
                             (other.logprobs, other.entropies, other.reference), strict=True):  # fmt: skip
            assert all(torch.equal(a, b) for a, b in zip(mine, its, strict=True))


def _ask(rows: Sequence[int], tokens: Tensor, temperature: float) -> Ask:
    index = torch.tensor(list(rows), dtype=torch.int64)
    return Ask(index, tokens[index + 1], temperature)


def _bank(base: BaseModel, gradients: bool) -> SlotBank:
    """Two slots of random adapters, of different ranks."""
    bank = base.new_bank(2, gradients=gradients)
    for slot, rank in enumerate((3, 4)):
        adapter = random_adapter(base.spec.shapes, rank, seed=slot + 2 * gradients, scale=1.0)
        bank.write(slot, PreparedInitAdapter(adapter, rank, float(rank), "", {}))
    return bank


# --- memory -----------------------------------------------------------------------------------------------------------


def _check_memory(path: Path, ranks: Ranks) -> None:
    """No rank holds more than its part and the tensor that it reads: memory that no file backs, while `shard` runs."""
    watched, inner = Watch(), base_module.shard

    def watch(*arguments: object) -> None:
        with watched.running():
            inner(*arguments)

    base_module.shard = watch
    try:
        cut = load_base(_config(path, "float32"), LORA, Placement(ranks))
    finally:
        base_module.shard = inner
    sizes = [tensor.numel() * tensor.itemsize for tensor in cut.trunk.parameters()]
    part = sum(local(tensor).numel() * tensor.itemsize for tensor in cut.trunk.parameters())
    assert part <= sum(sizes) / ranks.size + len(sizes) * 4096
    peak = watched.peak - watched.before
    said = ranks.gather({"total": sum(sizes), "largest": max(sizes), "part": part, "peak": peak})
    if ranks.leads:
        print(json.dumps({"memory": said}), flush=True)
    assert peak <= part + max(sizes) / ranks.size + SLACK_BYTES < sum(sizes)
    assert cut.fingerprint == load_base(_config(path, "bfloat16"), LORA).fingerprint


@dataclass
class Watch:
    """Bytes of anonymous memory, looked at every millisecond."""

    before: int = 0
    peak: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        self.before = self.peak = _anonymous_bytes()
        thread = threading.Thread(target=self._look)
        thread.start()
        try:
            yield
        finally:
            self.done.set()
            thread.join()

    def _look(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, _anonymous_bytes())


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def _check_agreed_dtype(path: Path, ranks: Ranks) -> None:
    """Ranks that measure otherwise still take rank 0's."""
    inner = base_module._matmul_seconds
    slow = torch.float32 if ranks.leads else torch.bfloat16
    base_module._matmul_seconds = lambda dtype: 2.0 if dtype == slow else 1.0
    try:
        assert load_base(_config(path, "auto"), LORA, Placement(ranks)).dtype == torch.bfloat16
    finally:
        base_module._matmul_seconds = inner
