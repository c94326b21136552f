"""A saved adapter as a slot's start, and the fresh one."""

from __future__ import annotations

import json
import math

import pytest
import torch
from support import random_adapter

from graftwork.adapters.canonical import Adapter, LoraPair
from graftwork.adapters.formats.peft import PeftAdapter, PeftFacts
from graftwork.adapters.prepare import SlotSpec, fresh, prepare
from graftwork.errors import MisfitAdapter

SHAPES = {f"layers.{i}.{name}": (6, 8) for i in range(10) for name in ("q_proj", "v_proj")}
SPEC = SlotSpec(8, SHAPES)


def source(rank: int = 4, scale: float = 2.0, shapes: dict[str, tuple[int, int]] = SHAPES) -> PeftAdapter:
    return PeftAdapter(random_adapter(shapes, rank, scale=scale), PeftFacts("base"), ("a note",))


def test_an_adapter_that_fits_is_taken_bit_for_bit_with_its_own_rank_and_alpha() -> None:
    found = source()
    prepared = prepare(found, SPEC, None, None)
    assert (prepared.rank, prepared.alpha) == (4, 8.0)
    assert prepared.adapter.digest() == found.adapter.digest() == prepared.source_digest
    assert prepare(found, SPEC, 4, 8.0).adapter.digest() == prepared.adapter.digest()


def test_the_report_is_json_and_says_what_was_kept() -> None:
    report = prepare(source(), SPEC, None, None).report
    assert json.loads(json.dumps(report)) == report
    assert (report["kind"], report["modules"], report["kept"], report["notes"]) == ("adapter", 20, 20, ["a note"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_smaller_dtypes_become_fp32_without_rounding(dtype: torch.dtype) -> None:
    pairs = {k: LoraPair(p.a.to(dtype), p.b.to(dtype), p.scale) for k, p in source().adapter.pairs.items()}
    prepared = prepare(PeftAdapter(Adapter(pairs), PeftFacts(), ()), SPEC, None, None)
    for path, pair in prepared.adapter.pairs.items():
        assert pair.a.dtype == pair.b.dtype == torch.float32
        assert torch.equal(pair.a, pairs[path].a.float()) and torch.equal(pair.b, pairs[path].b.float())
    assert prepared.source_digest == Adapter(pairs).digest() != prepared.adapter.digest()
    assert prepared.report["dtype_from"] == [str(dtype).removeprefix("torch.")]


def test_what_is_prepared_is_a_copy() -> None:
    found = source()
    prepared = prepare(found, SPEC, None, None)
    prepared.adapter.pairs["layers.0.q_proj"].a.zero_()
    assert found.adapter.pairs["layers.0.q_proj"].a.count_nonzero() > 0


def test_tensors_are_contiguous() -> None:
    pairs = {k: LoraPair(p.a.T.contiguous().T, p.b, p.scale) for k, p in source().adapter.pairs.items()}
    prepared = prepare(PeftAdapter(Adapter(pairs), PeftFacts(), ()), SPEC, None, None)
    assert all(p.a.is_contiguous() and p.b.is_contiguous() for p in prepared.adapter.pairs.values())
    assert prepared.adapter.digest() == source().adapter.digest()


def test_a_scale_of_rslora_is_kept_to_the_last_bits() -> None:
    scale = 5 / math.sqrt(12)
    prepared = prepare(source(rank=8, scale=scale), SPEC, None, None)
    assert prepared.alpha / prepared.rank == pytest.approx(scale, rel=1e-15)
    assert {pair.scale for pair in prepared.adapter.pairs.values()} == {prepared.alpha / prepared.rank}


def test_every_misfit_stands_in_one_message() -> None:
    shapes = {path: shape for path, shape in SHAPES.items() if path != "layers.3.q_proj"}
    shapes |= {"layers.4.q_proj": (6, 9), "layers.5.q_proj": (7, 8), "lm_head": (9, 9)}
    with pytest.raises(MisfitAdapter) as caught:
        prepare(source(rank=16, shapes=shapes), SPEC, 12, None)
    message = str(caught.value)
    assert "1 module of the adapter that the slots do not have: lm_head." in message
    assert "1 module of the slots that the adapter does not have: layers.3.q_proj." in message
    assert "layers.4.q_proj (found 6 x 9, expected 6 x 8), layers.5.q_proj (found 7 x 8, expected 6 x 8)" in message
    assert "20 modules whose rank is not 12" in message and "and 15 more" in message
    assert "lora.max_rank to 12" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("rank", "alpha", "says"),
    [
        (8, None, "20 modules whose rank is not 8, the run's: layers.0.q_proj (rank 4)"),
        (2, None, "Leave adapter.rank out"),
        (4, 16.0, "20 modules whose scale is not 4, alpha 16 / rank 4 of the run: layers.0.q_proj (scale 2)"),
        (None, 8.001, "Leave adapter.alpha out"),
        (4, 1e35, "not between"),
    ],
)
def test_another_rank_or_scale_is_refused_and_says_what_to_do(rank: int | None, alpha: float | None, says: str) -> None:
    with pytest.raises(MisfitAdapter) as caught:
        prepare(source(), SPEC, rank, alpha)
    assert says in str(caught.value)


def test_a_rank_above_the_slots_is_refused() -> None:
    with pytest.raises(MisfitAdapter, match=r"Set lora\.max_rank to 16"):
        prepare(source(rank=16), SPEC, None, None)


def test_modules_of_several_ranks_or_scales_are_refused() -> None:
    odd = source(rank=2).adapter.pairs["layers.0.v_proj"]
    mixed = Adapter({**source().adapter.pairs, "layers.0.v_proj": odd})
    with pytest.raises(MisfitAdapter, match=r"1 module whose rank is not 4, that of layers\.0\.q_proj: layers\.0\.v"):
        prepare(PeftAdapter(mixed, PeftFacts(), ()), SPEC, None, None)
    odd = source(scale=3.0).adapter.pairs["layers.0.v_proj"]
    mixed = Adapter({**source().adapter.pairs, "layers.0.v_proj": odd})
    with pytest.raises(MisfitAdapter, match=r"1 module whose scale is not 2.*layers\.0\.v_proj \(scale 3\)"):
        prepare(PeftAdapter(mixed, PeftFacts(), ()), SPEC, None, None)


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
