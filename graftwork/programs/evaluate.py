"""`graftwork eval`: the mean reward of an adapter (or of the bare base) on held-out tasks."""

from __future__ import annotations

import asyncio
from pathlib import Path

from graftwork.config.schema import RlConfig
from graftwork.inference.local import LocalSampler
from graftwork.programs.inference import build_engine
from graftwork.rollouts.chat import ChatTokenizer
from graftwork.rollouts.collect import Evaluation, Source, evaluate
from graftwork.rollouts.environment import load_environment

ADAPTER_NAME = "evaluated"


def main(config: RlConfig, adapter: Path | None, prompts: int, seed: int) -> float:
    """One answer to each of `prompts` held-out tasks, at the run's temperature, from the adapter in a PEFT folder
    (None: the bare base), everything in this process. Raises ConfigError, ModelError, AdapterError, RunError."""
    environment = load_environment(config.run.environment.name, config.run.environment.options)
    tokenizer = ChatTokenizer.load(config.model.path)
    engine = build_engine(config.model, config.lora, config.inference, tokenizer)

    def evaluated() -> Evaluation:
        source = Source(engine.base_name)
        if adapter is not None:
            source = Source(ADAPTER_NAME, engine.load(ADAPTER_NAME, adapter).digest)
        return asyncio.run(
            evaluate(
                environment, tokenizer, LocalSampler(engine), source, n_prompts=prompts, seed=seed,
                sampling=config.run.sampling,
            )
        )  # fmt: skip

    return engine.work_for(evaluated).mean_reward
