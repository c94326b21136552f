"""The peer of rl_vs_trl and reward_vs_trl: one run of TRL's GRPOTrainer with PEFT, in a process of its own.

    python -m bench.trl_grpo settings.json      writes what it did to the settings' `report`, as JSON

As quick as TRL is here: no evaluation, no log, no checkpoints, no gradient checkpointing, the base's own dtype, and one
optimizer step a batch, in passes of the size that was fastest. The task, its score and the order of its prompts are the
environment's, and AdamW has Graftwork's settings. What is TRL's own stays as it ships: its loss and its advantages.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class TrlRun(Recipe):
    """report: the file that is written at the end. pass_sequences: of a forward and backward pass; they divide
    prompts x samples. stop_at_reward: end when the mean reward of two batches is at least this."""

    base: str
    adapter: str
    out: str
    report: str
    seed: int = 0
    pass_sequences: int = 64
    options: dict[str, Any] | None = None
    device: str = "cpu"
    stop_at_reward: float | None = None

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)))
        return path


def main(run: TrlRun) -> None:
    # Imported here: who describes such a run needs none of it.
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from graftwork.rollouts.environment import Answer
    from graftwork.rollouts.reverse_text import ReverseText

    environment = ReverseText(**(run.options or {}))
    tasks = [environment.task(run.seed, index, "train") for index in range(run.steps * run.prompts)]
    rewards: list[float] = []
    rollouts: list[int] = []
    answer_tokens: list[int] = []
    ended: list[float] = []
    gradient_norms: list[float] = []

    def score(completions: list[Any], index: list[int], completion_ids: list[list[int]], **_: Any) -> list[float]:
        found = [
            environment.score(tasks[i], Answer(said[0]["content"], tuple(ids), "stop"))
            for said, i, ids in zip(completions, index, completion_ids, strict=True)
        ]
        rewards.append(sum(found) / len(found))
        rollouts.append(len(found))
        answer_tokens.append(sum(map(len, completion_ids)))
        return found

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
            gradient_norms.append(float(torch.stack(norms).norm()))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            ended.append(time.time())
            if run.stop_at_reward is not None and sum(rewards[-2:]) / 2 >= run.stop_at_reward:
                control.should_training_stop = True

    base = AutoModelForCausalLM.from_pretrained(run.base, dtype="auto")
    model = PeftModel.from_pretrained(base, run.adapter, is_trainable=True)
    config = GRPOConfig(
        output_dir=run.out, seed=run.seed, max_steps=run.steps, use_cpu=run.device == "cpu",
        per_device_train_batch_size=run.pass_sequences,
        gradient_accumulation_steps=run.prompts * run.samples // run.pass_sequences,
        num_generations=run.samples, max_completion_length=run.max_tokens, temperature=1.0, shuffle_dataset=False,
        learning_rate=run.learning_rate, lr_scheduler_type="constant_with_warmup", warmup_steps=run.warmup_steps,
        adam_beta2=0.95, weight_decay=0.0, max_grad_norm=1.0, beta=0.0,
        bf16=False, fp16=False, gradient_checkpointing=False, logging_strategy="no", save_strategy="no",
        eval_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=score, args=config, callbacks=[Watch()],
        train_dataset=Dataset.from_list([{"prompt": list(t.messages), "index": i} for i, t in enumerate(tasks)]),
        processing_class=AutoTokenizer.from_pretrained(run.base),
    )  # fmt: skip
    began = time.time()
    trainer.train()
    trainer.model.save_pretrained(run.out)
    said = {
        "training_began": began, "steps_ended": ended, "rewards": rewards, "rollouts": rollouts,
        "answer_tokens": answer_tokens, "gradient_norms": gradient_norms, "threads": torch.get_num_threads(),
    }  # fmt: skip
    Path(run.report).write_text(json.dumps(said))


if __name__ == "__main__":
    main(TrlRun(**json.loads(Path(sys.argv[1]).read_text())))
