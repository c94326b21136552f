"""Graftwork: many LoRA adapters, trained by reinforcement learning on one frozen base model."""

__version__ = "0.1.0"
