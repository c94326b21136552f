"""Parts of sharded tensors, orders as data, and who is to blame: what needs no second process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Placement, Replicate, Shard

from graftwork.config.run import AdapterConfig, LossConfig, OptimizerConfig
from graftwork.parallel.parts import fill, part_of
from graftwork.parallel.watch import Beat, blame
from graftwork.training.learner import LearnerConfig, Report, Sums
from graftwork.training.orders import (
    Learn,
    Order,
    Quit,
    Say,
    Seat,
    Step,
    decode_examples,
    encode_examples,
    order_from,
)
from graftwork.training.packer import Example


@dataclass(frozen=True)
class OneOf:
    """A mesh of one axis, seen from one of its ranks."""

    ranks: int
    rank: int

    def size(self, axis: int) -> int:
        return self.ranks

    def get_local_rank(self, axis: int) -> int:
        return self.rank


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 7), st.data())
def test_the_parts_of_all_ranks_are_the_tensor_as_torch_cuts_it(
    shape: list[int], ranks: int, data: st.DataObject
) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    whole = torch.arange(int(np.prod(shape))).view(shape)
    parts = [whole[part_of(shape, OneOf(ranks, rank), [Shard(axis)])] for rank in range(ranks)]  # type: ignore[arg-type]
    assert torch.equal(torch.cat(parts, axis), whole)
    chunks = list(torch.chunk(whole, ranks, axis))
    assert all(torch.equal(part, chunk) for part, chunk in zip(parts, chunks, strict=False))
    assert all(part.numel() == 0 for part in parts[len(chunks) :])


@pytest.mark.parametrize("placement", [Replicate()])
def test_a_replicated_tensor_is_every_ranks_own(placement: Placement) -> None:
    assert part_of([3, 4], OneOf(2, 1), [placement]) == (slice(0, 3), slice(0, 4))  # type: ignore[arg-type]


def test_fill_writes_all_of_a_plain_tensor_and_needs_its_slices_only() -> None:
    class Asked:
        def __getitem__(self, where: object) -> torch.Tensor:
            return torch.ones(2, 3)[where]  # type: ignore[index]

    target = torch.zeros(2, 3)
    fill(target, Asked())
    assert target.eq(1).all()


# --- orders -----------------------------------------------------------------------------------------------------------

SEAT = Seat(
    slot=1, checkpoints="/runs/run_a/checkpoints", step=3, wish=AdapterConfig(rank=2), seed=4, digest="ab" * 32,
    learner=LearnerConfig(OptimizerConfig(learning_rate=0.1), LossConfig(kl_coefficient=0.5), 0.7, 64, 16),
)  # fmt: skip
ORDERS = [SEAT, Learn(slots=(0, 2)), Step(slot=0, batch_digest="x", norm=1.5), Say(level=40, text="ok"), Quit()]


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.kind)
def test_an_order_survives_the_way_as_data(order: Order) -> None:
    assert order_from(order.model_dump(mode="json")) == order


@pytest.mark.parametrize(
    "value", [{"kind": "run", "code": "x"}, {"kind": "step", "slot": 0}, {"kind": "quit", "x": 1}, []]
)
def test_what_is_no_order_is_refused(value: object) -> None:
    with pytest.raises(ValueError):
        order_from(value)


@given(st.lists(st.tuples(st.integers(1, 12), st.floats(allow_nan=True)), min_size=1, max_size=6), st.integers(0, 99))
def test_examples_survive_the_way_to_the_bit(sizes: list[tuple[int, float]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    examples = [
        Example(
            rng.integers(0, 2**31 - 1, size).astype(np.int32), rng.random(size) < 0.5,
            rng.normal(size=size).astype(np.float32), advantage, [None, 0, 7][size % 3],
        )
        for size, advantage in sizes
    ]  # fmt: skip
    for given_, found in zip(examples, decode_examples(encode_examples(examples)), strict=True):
        for name in ("token_ids", "loss_mask", "sampler_logprobs"):
            ours, theirs = getattr(given_, name), getattr(found, name)
            assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()
        assert given_.sample == found.sample
        assert np.float64(given_.advantage).tobytes() == np.float64(found.advantage).tobytes()


def test_a_report_survives_the_way_with_what_is_not_finite() -> None:
    sums = Sums(1.0, 2, 3, float("nan"), float("inf"), {"kl": 0.1})
    found = Report.from_json(Report(float("inf"), sums, "why").to_json())
    assert repr(found) == repr(Report(float("inf"), sums, "why"))


# --- who is to blame --------------------------------------------------------------------------------------------------


def beats(*orders: int, doing: str = "learn [0]") -> dict[int, Beat]:
    return {
        rank: Beat(7, count, doing, "training/learner.py:1 learn", f"pid {rank}") for rank, count in enumerate(orders)
    }


def later(found: dict[int, Beat], *silent: int) -> dict[int, Beat]:
    return {rank: beat if rank in silent else replace(beat, count=beat.count + 4) for rank, beat in found.items()}


def test_a_rank_that_says_nothing_more_is_named_first() -> None:
    before = beats(5, 5, 4)
    assert blame(before, later(before, 1), 3, 0).startswith(
        "rank 1 (pid 1, learn [0], training/learner.py:1 learn) is silent"
    )
    assert blame(beats(5, 5), later(beats(5, 5)), 3, 0).startswith("rank 2 is silent")


def test_then_those_that_are_behind() -> None:
    before = beats(5, 4, 4)
    assert blame(before, later(before), 3, 0).startswith("rank 1 (") and "are behind" in blame(
        before, later(before), 3, 0
    )


def test_then_rank_0_where_all_wait_for_it_and_else_nobody() -> None:
    waiting = beats(5, 5, doing="waiting for an order after learn [0]")
    assert blame(waiting, later(waiting), 2, 1).startswith("rank 0 (") and "gives no order" in blame(
        waiting, later(waiting), 2, 1
    )
    together = beats(5, 5)
    assert blame(together, later(together), 2, 0).startswith("everybody is at the same order: rank 0 (")


@pytest.mark.parametrize(("size", "judge"), list(product((2, 3), (0, 1))))
def test_nobody_blames_itself_for_silence(size: int, judge: int) -> None:
    before = beats(*[5] * size)
    assert f"rank {judge} (" not in blame(before, later(before, *range(size)), size, judge)
