"""What rank 0 tells the others to do: data, no code. Every rank does the same orders in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter
from safetensors.numpy import load, save

from graftwork.config.run import AdapterConfig
from graftwork.config.section import Section
from graftwork.training.learner import LearnerConfig
from graftwork.training.packer import Example


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


class Probe(OfSlot):
    """Ask the slot's adapter what it says after the probe's prompt."""

    kind: Literal["probe"] = "probe"


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


Order = Seat | Feed | BeginAgain | Learn | Reduce | Step | Read | Probe | Save | Vacate | Say | Idle | Quit
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
    """Columns in safetensors: lengths, advantages and samples [n] (-1: none), and behind one another the sequences'
    tokens, log-probs and loss masks."""
    return save(
        {
            "lengths": np.array([len(one.token_ids) for one in examples], np.int64),
            "advantages": np.array([one.advantage for one in examples], np.float64),
            "samples": np.array([-1 if one.sample is None else one.sample for one in examples], np.int64),
            "token_ids": np.concatenate([one.token_ids for one in examples]),
            "logprobs": np.concatenate([one.sampler_logprobs for one in examples]),
            "loss_mask": np.concatenate([one.loss_mask for one in examples]),
        }
    )


def decode_examples(data: bytes) -> list[Example]:
    """The examples that `encode_examples` made, to the bit."""
    columns = load(data)
    ends = np.cumsum(columns["lengths"])[:-1]
    sequences = (np.split(columns[name], ends) for name in ("token_ids", "loss_mask", "logprobs"))
    return [
        Example(tokens, mask, logprobs, float(advantage), None if sample < 0 else int(sample))
        for tokens, mask, logprobs, advantage, sample in zip(
            *sequences, columns["advantages"], columns["samples"], strict=True
        )
    ]
