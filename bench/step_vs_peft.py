"""Row 3: how fast is a training step, against transformers with PEFT at its best?

The peer is what its users run: `model(input_ids, labels)` as shipped, equal lengths so that nothing is padded, a base
and adapters in the fast dtype (`autocast_adapter_dtype=False`), AdamW and a gradient clip. Both sides hold the same
adapter and learn the same tokens, half of which carry loss; the first loss must agree. The second line has groups of 8
answers to a prompt that is as long as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.bases import TINY, base_folder, save_adapter
from bench.harness import Measured, Ratio, Setting, at_least, interleaved, main, medians, need
from bench.steps import OneRun, Workload, one_run
from graftwork.config.run import OptimizerConfig
from graftwork.training.packer import Example

LOSSES_AGREE = 0.02
"""Relative: two ways of rounding in bfloat16."""


class PeftStep:
    """One optimizer step after another of PEFT's model."""

    def __init__(self, path: Path, adapter: Path, run: OneRun) -> None:
        need("peft")
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(path, dtype=run.base.dtype).to(run.base.device)
        self.model: Any = PeftModel.from_pretrained(base, adapter, is_trainable=True, autocast_adapter_dtype=False)
        self.tokens, self.labels = (each.to(run.base.device) for each in _padded(run.examples))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        config = OptimizerConfig()
        self.clip = config.clip_norm
        self.optimizer = torch.optim.AdamW(self.trained, lr=config.learning_rate, weight_decay=config.weight_decay)

    def __call__(self) -> float:
        loss = self.model(input_ids=self.tokens, labels=self.labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
        assert float(norm) > 0, "nothing was learnt"
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def _padded(examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, labels) [sequences, L] int64, all of one length; what carries no loss is -100."""
    tokens = torch.stack([torch.from_numpy(example.token_ids) for example in examples]).long()
    mask = torch.stack([torch.from_numpy(example.loss_mask) for example in examples])
    return tokens, torch.where(mask, tokens, -100)


def measure(setting: Setting) -> Iterator[Measured]:
    path = TINY if setting.quick else base_folder("qwen3-0.6b" if setting.on_gpu else "smollm2-135m")
    plain = Workload(16, 512, 512) if setting.on_gpu else Workload(16, 32, 32)
    grouped = dataclasses.replace(plain, group=8)
    bars = (1.5, 1.5) if setting.on_gpu else (1.3, 2.0)
    names = ("step_vs_peft", "step_vs_peft_shared_prompt")
    for name, work, bar in zip(names, (plain, grouped), bars, strict=True):
        run = one_run(path, setting.device, work, supervised=True)
        with TemporaryDirectory() as folder:
            peer = PeftStep(path, save_adapter(run.adapter, Path(folder, "adapter")), run)
        _, sums = run.step()
        losses = {"graftwork": sums.loss, "peft": peer()}
        assert abs(losses["graftwork"] - losses["peft"]) <= LOSSES_AGREE * losses["peft"], losses
        assert sums.loss_tokens == int((peer.labels != -100).sum())
        seconds = interleaved({"peft": peer, "graftwork": run.step}, setting.device, rounds=2 if setting.quick else 9)
        ratio = Ratio.of(seconds["peft"], seconds["graftwork"])
        took = medians(seconds)
        figures = {
            "dtype": str(run.base.dtype), "first loss": {key: round(value, 4) for key, value in losses.items()},
            "tokens/s": {key: round(work.tokens / each, 1) for key, each in took.items()}, "seconds": took,
            "tokens": work.tokens, "loss tokens": sums.loss_tokens, **ratio.figures(),
        }  # fmt: skip
        yield Measured(3, name, ratio.median, at_least(bar), figures)


if __name__ == "__main__":
    main(3, "step_vs_peft", __doc__, measure)
