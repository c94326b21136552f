"""The last lines of `graftwork rl`: the curves, where everything lies, what to do next with the adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from graftwork.programs.progress import clock, number
from graftwork.programs.start import Start
from graftwork.programs.vllm import room_for
from graftwork.store.files import read_json, read_lines
from graftwork.store.layout import RunTree, stable_steps

FILES = {
    "metrics.jsonl": "one line a step",
    "samples.jsonl": "prompts, answers, rewards, adapter versions",
    "reward.png": "mean reward of each batch",
    "loss.png": "loss and gradient norm",
}


def draw(start: Start) -> None:
    """reward.png and loss.png beside metrics.jsonl."""
    from graftwork.programs.plots import loss_png, reward_png  # matplotlib: a second of loading that can wait

    rows = read_lines(start.tree.metrics_jsonl)
    start.disk.publish_file(start.tree.root / "reward.png", reward_png(rows))
    start.disk.publish_file(start.tree.root / "loss.png", loss_png(rows))


def last_lines(start: Start, seconds: float) -> list[str]:
    """`seconds`: since the command began."""
    tree = start.tree
    lines = ["", f"run {tree.id}: {_summary(read_lines(tree.metrics_jsonl))} ({clock(seconds)})"]
    lines += [f"  {shown(tree.root / name)}  {meaning}" for name, meaning in FILES.items()]
    steps = [step for step in stable_steps(tree.checkpoints) if (tree.checkpoint(step) / "weight").is_dir()]
    if not steps:
        return lines
    weight = tree.checkpoint(steps[-1]) / "weight"
    lines += [f"  {shown(weight)}  the adapter after step {steps[-1]} (PEFT)", *_how_to_use(start, weight)]
    return [*lines, "go on training:", "  the same command with --resume --max-steps N"]


def what_next(tree: RunTree) -> str:
    """What a person can do after an end that came too soon."""
    steps = stable_steps(tree.checkpoints)
    if not steps:
        return "nothing was trained yet; the same command starts from the beginning"
    return f"every published file is whole; the same command with --resume goes on from step {steps[-1]}"


def _summary(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "no step was taken"
    first, last = rows[0], rows[-1]
    return (
        f"step {last['step']}; mean reward {number(first, 'reward', '.3f')} at step {first['step']}, "
        f"{number(last, 'reward', '.3f')} at step {last['step']}"
    )


def _how_to_use(start: Start, weight: Path) -> list[str]:
    base = start.config.model.path
    rank = int(read_json(weight / "adapter_config.json", "adapter").get("r", start.config.lora.max_rank))
    room = room_for(rank)
    serve = [
        "serve it:",
        f"  vllm serve {base} --enable-lora --max-lora-rank {room} --lora-modules {start.tree.id}={weight}",
    ]
    return [
        "load it in Python:",
        "  from peft import PeftModel; from transformers import AutoModelForCausalLM",
        f'  model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{weight}")',
        *(serve if room is not None else []),
    ]


def shown(path: Path) -> str:
    """Relative to the working directory when it lies below it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
