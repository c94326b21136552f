"""Slots: one row a run, nothing else touched."""

import pytest
import torch
from support import random_adapter

from graftwork.adapters.prepare import PreparedInitAdapter, SlotSpec
from graftwork.lora.slots import SlotBank

SPEC = SlotSpec(4, {"layer.q_proj": (6, 10), "layer.down_proj": (10, 7)})


def bank(slots: int = 12, dtype: torch.dtype = torch.float32) -> SlotBank:
    return SlotBank(SPEC, slots, device=torch.device("cpu"), dtype=dtype, gradients=True)


def prepared(rank: int, seed: int = 0) -> PreparedInitAdapter:
    return PreparedInitAdapter(random_adapter(SPEC.shapes, rank, seed=seed), rank, 2.0 * rank, "", {})


@pytest.mark.parametrize("rank", [1, 3, 4])
def test_what_is_written_is_read_back_bit_equal_at_the_runs_rank(rank: int) -> None:
    slots = bank()
    slots.write(10, prepared(rank))
    assert slots.read(10).digest() == prepared(rank).adapter.digest()


def test_writing_and_resetting_a_slot_touches_no_byte_of_another() -> None:
    slots = bank()
    assert slots.gradients is not None
    for slot in range(12):
        slots.write(slot, prepared(4, seed=slot))
    slots.gradients.normal_()
    before = slots.weights.clone(), slots.gradients.clone()
    slots.reset(10)
    slots.write(10, prepared(2, seed=99))
    others = [slot for slot in range(12) if slot != 10]
    assert torch.equal(slots.weights[others], before[0][others])
    assert torch.equal(slots.gradients[others], before[1][others])
    assert slots.gradients[10].count_nonzero() == 0


def test_a_slot_in_use_is_not_overwritten() -> None:
    slots = bank()
    slots.write(0, prepared(4))
    with pytest.raises(AssertionError, match="slot 0 is in use"):
        slots.write(0, prepared(4))


def test_factors_are_views_of_the_rows() -> None:
    slots = bank()
    slots.write(3, prepared(4))
    pair = prepared(4).adapter.pairs["layer.q_proj"]
    assert torch.equal(slots.factors["layer.q_proj"].a[3], pair.a)
    assert torch.equal(slots.factors["layer.q_proj"].b[3], pair.b)


def test_a_bfloat16_base_computes_with_a_rounded_copy_and_keeps_fp32_masters() -> None:
    slots = bank(dtype=torch.bfloat16)
    slots.write(3, prepared(4))
    pair = prepared(4).adapter.pairs["layer.q_proj"]
    assert torch.equal(slots.factors["layer.q_proj"].a[3], pair.a.bfloat16())
    assert torch.equal(slots.read(3).pairs["layer.q_proj"].a, pair.a)
