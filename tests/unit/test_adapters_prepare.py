"""A saved adapter as a slot's start, and the fresh one."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support import random_adapter

from graftwork.adapters.canonical import Adapter, LoraPair
from graftwork.adapters.prepare import SlotSpec, Wish, fresh, prepare
from graftwork.adapters.source import AdapterFacts, InMemory, ModuleFacts, name_in_digest
from graftwork.errors import MisfitAdapter

SHAPES = {f"layers.{i}.{name}": (6, 8) for i in range(10) for name in ("q_proj", "v_proj")}
SPEC = SlotSpec(8, SHAPES)


def source(rank: int = 4, scale: float = 2.0, shapes: dict[str, tuple[int, int]] = SHAPES) -> InMemory:
    return InMemory(random_adapter(shapes, rank, scale=scale), AdapterFacts("base"), ("a note",))


def test_an_adapter_that_fits_is_taken_bit_for_bit_with_its_own_rank_and_alpha() -> None:
    found = source()
    prepared = prepare(found, SPEC)
    assert (prepared.rank, prepared.alpha) == (4, 8.0)
    assert prepared.adapter.digest() == found.adapter.digest() == prepared.source_digest
    assert prepare(found, SPEC, Wish(4, 8.0)).adapter.digest() == prepared.adapter.digest()


def test_the_report_is_json_and_says_what_was_kept() -> None:
    report = prepare(source(), SPEC).report
    assert json.loads(json.dumps(report)) == report
    assert (report["kind"], report["modules"], report["notes"]) == ("adapter", 20, ["a note"])
    assert report["done"] == {"kept": 20} and report["exact"] and report["warnings"] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smaller_dtypes_become_fp32_without_rounding(dtype: torch.dtype) -> None:
    pairs = {k: LoraPair(p.a.to(dtype), p.b.to(dtype), p.scale) for k, p in source().adapter.pairs.items()}
    prepared = prepare(InMemory(Adapter(pairs), AdapterFacts(), ()), SPEC)
    for path, pair in prepared.adapter.pairs.items():
        assert pair.a.dtype == pair.b.dtype == torch.float32
        assert torch.equal(pair.a, pairs[path].a.float()) and torch.equal(pair.b, pairs[path].b.float())
    assert prepared.source_digest == Adapter(pairs).digest() != prepared.adapter.digest()
    assert prepared.report["dtype_from"] == [str(dtype).removeprefix("torch.")]


def test_preparing_does_not_write_to_the_source() -> None:
    found = source()
    digest = found.adapter.digest()
    prepare(found, SPEC, Wish(rank=8, alpha=1.0))
    prepare(found, SPEC, Wish(rank=2, allow_lossy=True))
    assert found.adapter.digest() == digest


def test_tensors_are_contiguous() -> None:
    pairs = {k: LoraPair(p.a.T.contiguous().T, p.b, p.scale) for k, p in source().adapter.pairs.items()}
    prepared = prepare(InMemory(Adapter(pairs), AdapterFacts(), ()), SPEC)
    assert all(p.a.is_contiguous() and p.b.is_contiguous() for p in prepared.adapter.pairs.values())
    assert prepared.adapter.digest() == source().adapter.digest()


def test_a_scale_of_rslora_is_kept_to_the_last_bits() -> None:
    scale = 5 / math.sqrt(12)
    prepared = prepare(source(rank=8, scale=scale), SPEC)
    assert prepared.alpha / prepared.rank == pytest.approx(scale, rel=1e-15)
    assert {pair.scale for pair in prepared.adapter.pairs.values()} == {prepared.alpha / prepared.rank}


def test_every_misfit_stands_in_one_message() -> None:
    shapes = {path: shape for path, shape in SHAPES.items() if path != "layers.3.q_proj"}
    shapes |= {"layers.4.q_proj": (6, 9), "layers.5.q_proj": (7, 8), "lm_head": (9, 9)}
    with pytest.raises(MisfitAdapter) as caught:
        prepare(source(rank=16, shapes=shapes), SPEC, Wish(rank=12, alpha=1e35))
    message = str(caught.value)
    assert "1 module of the adapter that the slots do not have: lm_head." in message
    assert "layers.4.q_proj (found 6 x 9, expected 6 x 8), layers.5.q_proj (found 7 x 8, expected 6 x 8)" in message
    assert "lora.max_rank to 12" in message and "alpha 1e+35 is not between" in message
    assert "\n" not in message


def update(adapter: Adapter, path: str) -> torch.Tensor:
    pair = adapter.pairs[path]
    return pair.scale * (pair.b.double() @ pair.a.double())


def assert_same_function(found: InMemory, prepared: Adapter) -> None:
    for path in found.adapter.pairs:
        torch.testing.assert_close(update(prepared, path), update(found.adapter, path), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("wish", "rank", "alpha", "done"),
    [
        (Wish(), 4, 8.0, {"kept": 20}),
        (Wish(rank=8), 8, 16.0, {"padded": 20}),
        (Wish(alpha=1.0), 4, 1.0, {"rescaled": 20}),
        (Wish(rank=8, alpha=8.0), 8, 8.0, {"padded": 20, "rescaled": 20}),
    ],
)
def test_another_rank_or_scale_is_the_same_function(wish: Wish, rank: int, alpha: float, done: dict[str, int]) -> None:
    """A rank alone keeps the scale; an alpha alone keeps the rank."""
    found = source()
    prepared = prepare(found, SPEC, wish)
    assert (prepared.rank, prepared.alpha, prepared.report["done"]) == (rank, alpha, done)
    assert {pair.scale for pair in prepared.adapter.pairs.values()} == {alpha / rank}
    assert prepared.report["exact"]
    assert_same_function(found, prepared.adapter)


def test_padding_adds_fresh_rows_of_a_and_zero_columns_of_b() -> None:
    prepared = prepare(source(), SPEC, Wish(rank=8, seed=3)).adapter
    for path, pair in prepared.pairs.items():
        assert pair.b[:, 4:].count_nonzero() == 0
        assert torch.equal(pair.a[4:], fresh(SPEC, 8, 16.0, 3).adapter.pairs[path].a[4:])


def test_modules_that_the_adapter_has_not_start_fresh() -> None:
    shapes = {path: shape for path, shape in SHAPES.items() if path.endswith("q_proj")}
    found = source(shapes=shapes)
    prepared = prepare(found, SPEC, Wish(seed=3))
    assert prepared.report["done"] == {"kept": 10, "fresh": 10} and prepared.report["exact"]
    assert prepared.adapter.pairs.keys() == SHAPES.keys()
    pair, expected = prepared.adapter.pairs["layers.0.v_proj"], fresh(SPEC, 4, 8.0, 3).adapter.pairs["layers.0.v_proj"]
    assert torch.equal(pair.a, expected.a) and pair.b.count_nonzero() == 0
    assert_same_function(found, prepared.adapter)


def test_modules_of_several_ranks_and_scales_get_the_highest_and_the_first() -> None:
    odd = source(rank=2, scale=3.0).adapter.pairs["layers.0.v_proj"]
    found = InMemory(Adapter({**source().adapter.pairs, "layers.0.v_proj": odd}))
    prepared = prepare(found, SPEC)
    assert (prepared.rank, prepared.alpha) == (4, 8.0)
    assert prepared.report["done"] == {"kept": 19, "padded": 1, "rescaled": 1}
    assert prepared.report["modules_of"]["padded"] == ["layers.0.v_proj"]
    assert_same_function(found, prepared.adapter)


@pytest.mark.parametrize(("wish", "where"), [(Wish(), "lora.max_rank"), (Wish(rank=8), "adapter.rank")])
def test_a_rank_that_is_too_high_is_refused_unless_loss_is_allowed(wish: Wish, where: str) -> None:
    with pytest.raises(MisfitAdapter, match=rf"20 modules of a rank above 8.*Set {where} to 16, or allow"):
        prepare(source(rank=16), SPEC, wish)


def test_the_best_approximation_of_lower_rank_and_its_energy() -> None:
    """The oracle is numpy's SVD of the whole product."""
    found = source(rank=5)
    prepared = prepare(found, SPEC, Wish(rank=2, allow_lossy=True))
    assert not prepared.report["exact"] and prepared.report["done"] == {"reduced": 20}
    for path in SHAPES:
        u, s, vh = np.linalg.svd(update(found.adapter, path).numpy(), full_matrices=False)
        best = torch.from_numpy((u[:, :2] * s[:2]) @ vh[:2])
        torch.testing.assert_close(update(prepared.adapter, path), best, rtol=1e-4, atol=1e-6)
        kept = float((s[:2] ** 2).sum() / (s**2).sum())
        assert prepared.report["energy_kept"][path] == pytest.approx(kept, rel=1e-9)
    assert prepared.report["energy_kept_lowest"] == min(prepared.report["energy_kept"].values())


def test_directions_that_do_nothing_are_dropped_without_asking() -> None:
    wide = {}
    for path, pair in source(rank=12).adapter.pairs.items():
        b = pair.b.clone()
        b[:, [0, 3, 5, 6, 7]] = 0
        wide[path] = LoraPair(pair.a, b, pair.scale)
    found = InMemory(Adapter(wide))
    prepared = prepare(found, SPEC)
    assert prepared.rank == 8 and prepared.report["done"] == {"idle directions dropped": 20}
    assert prepared.report["exact"]
    assert_same_function(found, prepared.adapter)


def test_a_scale_that_fp32_cannot_reach_is_refused() -> None:
    for scale, alpha in ((1e28, 1e-28), (1e-29, 1e29)):
        with pytest.raises(MisfitAdapter, match=r"20 modules|scales that fp32 cannot bring to"):
            prepare(source(scale=scale), SPEC, Wish(alpha=alpha))


def test_directions_that_could_never_learn_get_a_fresh_a() -> None:
    """A and B both zero: no gradient would ever reach them."""
    pairs = {k: LoraPair(p.a.clone(), p.b.clone(), p.scale) for k, p in source().adapter.pairs.items()}
    pairs["layers.3.q_proj"].a[2:] = 0
    pairs["layers.3.q_proj"].b[:, 2:] = 0
    found = InMemory(Adapter(pairs))
    prepared = prepare(found, SPEC, Wish(seed=3))
    assert prepared.report["done"] == {"kept": 19, "revived": 1} and prepared.report["exact"]
    fresh_a = fresh(SPEC, 4, 8.0, 3).adapter.pairs["layers.3.q_proj"].a
    assert torch.equal(prepared.adapter.pairs["layers.3.q_proj"].a[2:], fresh_a[2:])
    assert_same_function(found, prepared.adapter)


def test_which_experts_are_there_is_part_of_an_adapters_digest() -> None:
    facts = ModuleFacts((12, 6, 8), 4, 2.0, "one expert a tensor", (0, 1))
    assert name_in_digest("x", facts) != name_in_digest("x", replace(facts, present=(0, 11)))
    assert name_in_digest("x", replace(facts, present=None)) == "x"


@pytest.mark.parametrize("written", ["base_model.model.{}", "model.language_model.{}", "language_model.model.{}"])
def test_other_prefixes_mean_the_same_modules(written: str) -> None:
    pairs = source().adapter.pairs
    spec = SlotSpec(8, {f"model.{path}": shape for path, shape in SHAPES.items()})
    renamed = Adapter({written.format(path): pair for path, pair in pairs.items()})
    prepared = prepare(InMemory(renamed), spec)
    assert torch.equal(prepared.adapter.pairs["model.layers.0.q_proj"].a, pairs["layers.0.q_proj"].a)


def test_a_fresh_adapter_is_pefts_default_and_changes_nothing() -> None:
    prepared = fresh(SlotSpec(16, {"x.q_proj": (50, 400)}), 16, 32.0, 0)
    pair = prepared.adapter.pairs["x.q_proj"]
    bound = 1 / math.sqrt(400)
    assert pair.scale == 2.0 and pair.b.count_nonzero() == 0 and pair.a.abs().max() <= bound
    reference = torch.nn.init.kaiming_uniform_(torch.empty(16, 400), a=math.sqrt(5))
    assert float(pair.a.std()) == pytest.approx(float(reference.std()), rel=0.05)
    assert prepared.report["kind"] == "fresh" and prepared.report["seed"] == 0
    assert prepared.source_digest == prepared.adapter.digest()


def test_fresh_adapters_differ_by_seed_and_by_module_and_repeat() -> None:
    one, two = fresh(SPEC, 4, 8.0, 0), fresh(SPEC, 4, 8.0, 1)
    assert one.adapter.digest() == fresh(SPEC, 4, 8.0, 0).adapter.digest() != two.adapter.digest()
    assert len({pair.a.numpy().tobytes() for pair in one.adapter.pairs.values()}) == len(SHAPES)


def test_a_fresh_adapter_has_these_very_numbers() -> None:
    """They must not change: a run's seed is in its records."""
    prepared = fresh(SlotSpec(2, {"x.q_proj": (3, 4)}), 2, 4.0, 7)
    assert prepared.adapter.digest()[:16] == "ae0a9f2ee13f0150"


@pytest.mark.parametrize("rank", [0, 9])
def test_a_fresh_rank_outside_the_slots_is_refused(rank: int) -> None:
    with pytest.raises(MisfitAdapter, match=f"rank {rank}: the slots hold 1 to 8"):
        fresh(SPEC, rank, 8.0, 0)
