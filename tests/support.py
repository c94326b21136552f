"""Made-up adapters and batches for tests: what proofs use, too; and examples as one micro-batch."""

from collections.abc import Sequence

import torch

from graftwork.training.packer import Example, MicroBatch, pack
from proofs.made_up import VOCAB, random_adapter, random_batch

__all__ = ["VOCAB", "random_adapter", "random_batch", "whole"]


def whole(examples: Sequence[Example], weights: Sequence[float] | None = None) -> MicroBatch:
    """All of them in one micro-batch."""
    weights = [1.0] * len(examples) if weights is None else weights
    [only] = pack(examples, weights, sum(len(e.token_ids) for e in examples), torch.device("cpu"))
    assert only.micro is not None
    return only.micro
