"""What rank 0 tells the others to do: data, no code. Every rank does the same orders in the same order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from graftwork.config.schema import AdapterConfig, Section
from graftwork.training.learner import LearnerConfig
from graftwork.training.packer import Example

D = TypeVar("D", bound=np.generic)


class OfSlot(Section):
    """About the run in one slot."""

    slot: int


class Seat(OfSlot):
    """Give a run its slot, from the checkpoint that rank 0 has verified. digest: of the adapter that it starts from."""

    kind: Literal["seat"] = "seat"
    checkpoints: str
    step: int
    wish: AdapterConfig
    seed: int
    learner: LearnerConfig
    digest: str


class Feed(OfSlot):
    """Begin a step of the run in this slot. The examples come as bytes, see `encode_examples`."""

    kind: Literal["feed"] = "feed"


class BeginAgain(OfSlot):
    """Forget what was learnt of the step, and begin it again."""

    kind: Literal["begin_again"] = "begin_again"


class Learn(Section):
    """Learn the next rounds of these slots, together."""

    kind: Literal["learn"] = "learn"
    slots: tuple[int, ...]


class Reduce(OfSlot):
    """Sum the slot's gradient over the ranks, and report."""

    kind: Literal["reduce"] = "reduce"


class Step(OfSlot):
    """Take the optimizer step that rank 0 decided on: the norm of the whole gradient says whether it is skipped."""

    kind: Literal["step"] = "step"
    batch_digest: str
    norm: float


class Read(OfSlot):
    """Put the slot's adapter together, for rank 0 to publish."""

    kind: Literal["read"] = "read"


class Save(OfSlot):
    """Write one's part of a checkpoint into a hidden folder that rank 0 made, and report how it went."""

    kind: Literal["save"] = "save"
    folder: str


class Vacate(OfSlot):
    """Take a slot back and zero it."""

    kind: Literal["vacate"] = "vacate"


class Say(Section):
    """Log what became of a run, or of a checkpoint: all ranks say the same."""

    kind: Literal["say"] = "say"
    level: int
    text: str


class Idle(Section):
    """Nothing; whoever waits for an order sees that rank 0 lives."""

    kind: Literal["idle"] = "idle"


class Quit(Section):
    """There is no more to do."""

    kind: Literal["quit"] = "quit"


Order = Seat | Feed | BeginAgain | Learn | Reduce | Step | Read | Save | Vacate | Say | Idle | Quit
_ORDERS: TypeAdapter[Order] = TypeAdapter(Annotated[Order, Field(discriminator="kind")])


def order_from(value: Any) -> Order:
    """An order from its `model_dump()`."""
    return _ORDERS.validate_python(value)


def describe(order: Order) -> str:
    """For messages: `learn [0, 2]`."""
    match order:
        case Learn(slots=slots):
            return f"learn {list(slots)}"
        case Say() | Idle() | Quit():
            return order.kind
        case _:
            return f"{order.kind} [{order.slot}]"


def encode_examples(examples: Sequence[Example]) -> bytes:
    """count and lengths [1 + n] int64, advantages [n] float64, then token ids int32, log-probs float32 and loss masks
    bool of all sequences, each column behind the other."""
    columns = (
        np.asarray([len(examples), *(len(one.token_ids) for one in examples)], np.int64),
        np.asarray([one.advantage for one in examples], np.float64),
        np.concatenate([one.token_ids.astype(np.int32) for one in examples]),
        np.concatenate([one.sampler_logprobs.astype(np.float32) for one in examples]),
        np.concatenate([one.loss_mask.astype(np.bool_) for one in examples]),
    )
    return b"".join(column.tobytes() for column in columns)


def decode_examples(data: bytes) -> list[Example]:
    """The examples that `encode_examples` made, to the bit."""
    count = int(np.frombuffer(data, np.int64, 1)[0])
    lengths = np.frombuffer(data, np.int64, count, 8)
    bounds = [0, *np.cumsum(lengths).tolist()]
    at = [8 * (1 + count)]

    def column(dtype: type[D], size: int) -> NDArray[D]:
        found = np.frombuffer(data, dtype, size, at[0])
        at[0] += found.nbytes
        return found

    advantages = column(np.float64, count)
    tokens, logprobs, masks = (
        column(np.int32, bounds[-1]), column(np.float32, bounds[-1]), column(np.bool_, bounds[-1])
    )  # fmt: skip
    assert at[0] == len(data), f"{len(data)} bytes of examples, expected {at[0]}"
    return [
        Example(tokens[start:stop], masks[start:stop], logprobs[start:stop], float(advantage))
        for (start, stop), advantage in zip(pairwise(bounds), advantages, strict=True)
    ]


def log_as_told(logger: logging.Logger, order: Say) -> None:
    logger.log(order.level, "%s", order.text)
