"""Made-up adapters and batches for tests: what proofs use, too."""

from proofs.made_up import VOCAB, random_adapter, random_batch

__all__ = ["VOCAB", "random_adapter", "random_batch"]
