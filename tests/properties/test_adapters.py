"""Adapters as values: what is written is what is read, whatever the names, ranks, dtypes and scales."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graftwork.adapters.canonical import Adapter, LoraPair, alpha_for
from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.prepare import SlotSpec, fresh, prepare
from graftwork.adapters.snapshot import read_snapshot, snapshot_of, write_snapshot
from graftwork.adapters.source import AdapterFacts, InMemory
from graftwork.store.checkpoint import open_checkpoint, save_checkpoint
from graftwork.store.disk import Disk

WORDS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}|[0-9]{1,3}", fullmatch=True)
PATHS = st.lists(WORDS, min_size=1, max_size=5).map(".".join).filter(lambda path: "base_layer" not in path)
SHAPES = st.dictionaries(PATHS, st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
ALPHAS = st.one_of(
    st.integers(1, 512).map(float),
    st.floats(1e-6, 1e6, allow_nan=False),
    st.sampled_from([32.1, 0.1, math.pi, 1 / 3, math.nextafter(16.0, 17.0)]),
)


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    """Any plain LoRA of one rank and one scale; alpha / r or alpha / sqrt(r), as PEFT forms it."""
    shapes, rank, alpha, seed = draw(SHAPES), draw(st.integers(1, 12)), draw(ALPHAS), draw(st.integers(0, 99))
    scale = alpha / draw(st.sampled_from([rank, math.sqrt(rank)]))
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path, (out, width) in shapes.items():
        a = torch.randn(rank, width, generator=generator).to(draw(DTYPES))
        b = torch.randn(out, rank, generator=generator).to(draw(DTYPES))
        pairs[path] = LoraPair(a, b, scale)
    return Adapter(pairs)


def read_back(files: dict[str, bytes]) -> InMemory:
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        return read_peft(Path(folder))


@settings(max_examples=60, deadline=None)
@given(adapter=adapters(), base=st.none() | st.text(max_size=20))
def test_an_adapter_written_and_read_has_the_same_digest(adapter: Adapter, base: str | None) -> None:
    found = read_back(write_peft(adapter, AdapterFacts(base)))
    assert found.adapter.digest() == adapter.digest()
    assert found.facts == AdapterFacts(base)
    assert write_peft(found.adapter, found.facts) == write_peft(adapter, AdapterFacts(base))


@settings(max_examples=200, deadline=None)
@given(alpha=ALPHAS, rank=st.integers(1, 512))
def test_every_scale_that_peft_can_form_has_an_alpha(alpha: float, rank: int) -> None:
    for divisor in (rank, math.sqrt(rank)):
        found = alpha_for(alpha / divisor, divisor)
        assert found is not None and found / divisor == alpha / divisor


@settings(max_examples=40, deadline=None)
@given(adapter=adapters())
def test_a_prepared_adapter_survives_its_checkpoint(adapter: Adapter) -> None:
    prepared = prepare(InMemory(adapter, AdapterFacts(), ()), SlotSpec.around(InMemory(adapter)))
    snapshot = snapshot_of(prepared, None)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Path(folder) / "checkpoints"
        save_checkpoint(Disk(), checkpoints, 0, lambda staging: write_snapshot(staging, snapshot, AdapterFacts("base")))
        found = read_snapshot(open_checkpoint(checkpoints))
    assert found.state == snapshot.state
    assert found.adapter.digest() == prepared.adapter.digest()
    for path, pair in found.adapter.pairs.items():
        assert torch.equal(pair.a, adapter.pairs[path].a.float())
        assert torch.equal(pair.b, adapter.pairs[path].b.float())
        assert math.isclose(pair.scale, adapter.pairs[path].scale, rel_tol=1e-15)


@settings(max_examples=60, deadline=None)
@given(shapes=SHAPES, rank=st.integers(1, 8), seed=st.integers(0, 2**63), data=st.data())
def test_a_fresh_module_depends_on_its_path_and_the_seed_alone(
    shapes: dict[str, tuple[int, int]], rank: int, seed: int, data: st.DataObject
) -> None:
    whole = fresh(SlotSpec(8, shapes), rank, 2.0 * rank, seed).adapter
    order = data.draw(st.permutations(sorted(shapes)))
    shuffled = fresh(SlotSpec(64, {path: shapes[path] for path in order}), rank, 2.0 * rank, seed).adapter
    assert shuffled.digest() == whole.digest()
    path = order[0]
    alone = fresh(SlotSpec(rank, {path: shapes[path]}), rank, 1.0, seed).adapter
    assert torch.equal(alone.pairs[path].a, whole.pairs[path].a)
    assert alone.pairs[path].b.count_nonzero() == 0
