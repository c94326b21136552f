"""A LoRA adapter from outside: TRL's SFTTrainer and PEFT, as a person would use them, on the data of a demo's SFT.

    python examples/smollm2/trl_sft.py outputs/demo_smollm2/trl_0 [--seed 0]      (pip install trl peft)

Writes the folder that PEFT's `save_pretrained` writes, and heldout.json: the mean reward that transformers' `generate`
earns with it on held-out prompts. Nothing of it goes through Graftwork but the words of the task and their score.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from graftwork.config.load import load
from graftwork.config.schema import RlConfig, SftConfig
from graftwork.rollouts.environment import Answer, load_environment

FOLDER = Path(__file__).parent
BATCH = 64
"""Prompts that are answered at a time."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", default="reverse_text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=256, help="held-out ones")
    given = parser.parse_args()
    sft = load(SftConfig, FOLDER / f"{given.task}.sft.toml")
    rl = load(RlConfig, FOLDER / f"{given.task}.rl.toml")
    assert sft.data.environment is not None
    environment: Any = load_environment(sft.data.environment.name, sft.data.environment.options)
    train(sft, environment, given.out, given.seed)
    reward = held_out_reward(rl, environment, given.out, given.seed, given.prompts)
    (given.out / "heldout.json").write_text(json.dumps({"prompts": given.prompts, "reward": reward}))
    print(f"{given.out}: mean reward of {given.prompts} held-out prompts, sampled with transformers: {reward:.3f}")


def train(sft: SftConfig, environment: Any, out: Path, seed: int) -> None:
    """The steps of the .sft.toml, on the same words."""
    tasks = [environment.task(seed, index, "train") for index in range(sft.max_steps * sft.batch_size)]
    rows = [
        {
            "prompt": list(task.messages),
            "completion": [{"role": "assistant", "content": environment.answer(task)}],
        }
        for task in tasks
    ]
    base = AutoModelForCausalLM.from_pretrained(sft.model.path, dtype=torch.float32)
    lora = LoraConfig(
        r=sft.adapter.rank, lora_alpha=sft.adapter.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    config = SFTConfig(
        output_dir=str(out), seed=seed, max_steps=sft.max_steps, per_device_train_batch_size=sft.batch_size,
        learning_rate=sft.optimizer.learning_rate, lr_scheduler_type="constant_with_warmup",
        warmup_steps=sft.optimizer.warmup_steps, logging_steps=1, save_strategy="no", report_to="none",
        use_cpu=not torch.cuda.is_available(), bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(sft.model.path)
    trainer = SFTTrainer(
        model=base, args=config, train_dataset=Dataset.from_list(rows), peft_config=lora, processing_class=tokenizer
    )
    trainer.train()
    trainer.model.save_pretrained(out)


@torch.inference_mode()
def held_out_reward(rl: RlConfig, environment: Any, adapter: Path, seed: int, prompts: int) -> float:
    """As `graftwork eval` measures it: one answer at temperature 1 to each prompt."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(rl.model.path, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(rl.model.path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    total = 0.0
    for first in range(0, prompts, BATCH):
        tasks = [environment.task(seed, index, "heldout") for index in range(first, min(first + BATCH, prompts))]
        asked = tokenizer.apply_chat_template(
            [list(task.messages) for task in tasks], add_generation_prompt=True, padding=True,
            return_tensors="pt", return_dict=True,
        )  # fmt: skip
        answers = model.generate(
            **asked, do_sample=True, temperature=rl.run.sampling.temperature, top_k=0, top_p=1.0,
            max_new_tokens=rl.run.sampling.max_tokens, pad_token_id=tokenizer.pad_token_id,
        )[:, asked["input_ids"].shape[1] :]  # fmt: skip
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        total += sum(
            environment.score(task, Answer(text, tuple(ids), "stop"))
            for task, text, ids in zip(tasks, texts, answers.tolist(), strict=True)
        )
    return total / prompts


if __name__ == "__main__":
    main()
