"""`graftwork sft`: supervised fine-tuning. A run with one slot, another loss, and the same checkpoints as RL."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftwork.adapters.companions import read_companions
from graftwork.adapters.formats.peft_read import Choice, read_peft
from graftwork.adapters.formats.peft_write import peft_files
from graftwork.adapters.report import lines_of
from graftwork.adapters.snapshot import write_snapshot
from graftwork.adapters.source import AdapterFacts, digest_of
from graftwork.config.schema import SftConfig
from graftwork.errors import ConfigError
from graftwork.logs import say
from graftwork.model.base import BaseModel, load_base
from graftwork.programs.plots import loss_png
from graftwork.programs.progress import ProgressView
from graftwork.programs.trainer import use_threads
from graftwork.rollouts.chat import ChatTokenizer
from graftwork.store.checkpoint import save_checkpoint
from graftwork.store.disk import Disk, Staging
from graftwork.store.files import json_line, read_lines
from graftwork.store.layout import stable_steps
from graftwork.training.learner import Banks, Learner, LearnerConfig
from graftwork.training.packer import Example
from graftwork.training.sft_data import conversations, digest_of_examples, example_of
from graftwork.training.start import make_step_0, open_start

log = logging.getLogger(__name__)


def main(config: SftConfig) -> None:
    """Train to max_steps, write checkpoints on the way, and output_dir/adapter at the end."""
    use_threads(config.threads)
    disk, output = Disk(), Path(config.output_dir).absolute()
    claim = disk.claim(output / ".lock", "graftwork sft")
    data, tokenizer = conversations(config), ChatTokenizer.load(config.model.path)
    base = load_base(config.model, config.lora)
    learner = start(disk, config, base)
    disk.cut_log(output / "metrics.jsonl", learner.state.step)
    log.info("sft: steps %d to %d on %s", learner.state.step + 1, config.max_steps, config.model.path)
    with ProgressView(config.max_steps) as view, told_where_to_go_on(output):
        view.begin(learner.state.step)
        while learner.state.step < config.max_steps:
            examples = [example_of(tokenizer, messages) for messages in data(learner.state.step + 1)]
            _refuse_long(examples, config, base)
            row = one_step(learner, examples)
            disk.append_line(output / "metrics.jsonl", json_line(row))
            view.show(row)
            if learner.state.step % config.checkpoint_interval_steps == 0 or learner.state.step == config.max_steps:
                save(disk, output, learner, config)
    export(disk, output / "adapter", learner, config)
    disk.publish_file(output / "loss.png", loss_png(read_lines(output / "metrics.jsonl")))
    log.info("sft: the adapter is in %s, the curve in %s", output / "adapter", output / "loss.png")
    claim.release()


@contextmanager
def told_where_to_go_on(output: Path) -> Iterator[None]:
    """Ctrl-C ends the block with a line that says what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        step = stable_steps(output / "checkpoints")[-1]
        say(f"stopped by SIGINT; the same command with --resume goes on from step {step}")
        raise


def one_step(learner: Learner, examples: Sequence[Example]) -> dict[str, Any]:
    """Learn from `examples`; return the step's line for metrics.jsonl."""
    began = time.monotonic()
    outcome, sums = learner.learn_from(examples, digest_of_examples(examples))
    return {
        "step": learner.state.step,
        "loss": sums.loss,
        "entropy": sums.means()["entropy"],
        "grad_norm": outcome.gradient_norm,
        "learning_rate": outcome.learning_rate,
        "tokens": sums.tokens,
        "loss_tokens": sums.loss_tokens,
        "skipped": outcome.skipped,
        "tokens_per_second": sums.tokens / (time.monotonic() - began),
    }


def start(disk: Disk, config: SftConfig, base: BaseModel) -> Learner:
    """The learner at the step that the configuration asks for. Raises ConfigError rather than start over."""
    checkpoints = Path(config.output_dir).absolute() / "checkpoints"
    disk.sweep(checkpoints)
    steps = stable_steps(checkpoints)
    if steps and steps[-1] > 0 and not config.resume:
        raise ConfigError(
            f"{checkpoints} goes up to step {steps[-1]}: --resume goes on from there, or choose another output_dir"
        )
    source, companions = None, dict[str, bytes]()
    if config.init_adapter_path and not config.resume:
        folder = Path(config.init_adapter_path)
        source = read_peft(folder, Choice(config.adapter.ignore, config.adapter.adapter_name))
        companions = read_companions(folder)
    facts, said = AdapterFacts(config.model.path, base.fingerprint), list[str]()
    if not steps and not config.resume:
        made = make_step_0(disk, checkpoints, base, source, config.adapter, config.seed, facts, companions)
        said = lines_of(made.report)
    for line in said:
        log.info("sft: start: %s", line)
    _, snapshot = open_start(checkpoints, None, base, config.adapter, config.seed, needs_reference=False)
    if source is not None and snapshot.state.start.get("source_digest") != digest_of(source):
        raise ConfigError(
            f"{checkpoints}/step_0 is not made from {config.init_adapter_path}; move it away, or drop that setting"
        )
    learner_config = LearnerConfig(
        optimizer=config.optimizer,
        loss=None,
        temperature=1.0,
        tokens_per_micro_batch=config.tokens_per_micro_batch,
        logprob_chunk_tokens=config.logprob_chunk_tokens,
    )
    return Learner(Banks.of(base, 1), 0, learner_config, snapshot)


def save(disk: Disk, output: Path, learner: Learner, config: SftConfig) -> None:
    """Publish the checkpoint of the step that the learner is at."""

    def fill(staging: Staging) -> None:
        write_snapshot(staging, learner.snapshot(None), AdapterFacts(config.model.path, learner.state.base_fingerprint))

    save_checkpoint(disk, output / "checkpoints", learner.state.step, fill)


def export(disk: Disk, target: Path, learner: Learner, config: SftConfig) -> None:
    """Publish the PEFT adapter; an older one goes to the trash beside it."""
    if target.exists():
        disk.quarantine(target, target.parent / ".trash")
    adapter = learner.adapter()
    with disk.publish_dir(target, "adapter", {"digest": adapter.digest(), "step": learner.state.step}) as staging:
        files = peft_files(adapter, AdapterFacts(config.model.path, learner.state.base_fingerprint))
        for name, pieces in files.items():
            staging.write(name, pieces)
        for name, data in learner.companions.items():
            staging.write(name, data)


def _refuse_long(examples: Sequence[Example], config: SftConfig, base: BaseModel) -> None:
    longest = max(len(example.token_ids) for example in examples)
    most = min(config.tokens_per_micro_batch, base.max_positions)
    if longest > most:
        raise ConfigError(
            f"a conversation has {longest} tokens, at most {most} fit (tokens_per_micro_batch, positions)"
        )
