"""What do four adapters in one batch cost the embedded engine, against the bare base?

Both sides get the same prompts in requests of the same sizes, and sample as many tokens as rollouts do, at temperature
1; one side's requests name four adapters of rank 16 on all linear layers, the other's the base. Tokens a second,
reading the prompts included.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.bases import base_folder, load
from bench.engines import ADAPTERS, BASE_NAME, answered, engine_on, made_prompts, save_all, tokens_in
from bench.harness import Measured, Ratio, Setting, at_least, interleaved, main, medians
from graftwork.inference.requests import GenerationRequest

ROW, NAME = 8, "mixed_adapters"
SEQUENCES, PROMPT_TOKENS, ANSWER_TOKENS = 32, 16, 32


def measure(setting: Setting) -> Iterator[Measured]:
    base = load(base_folder("smollm2-135m"), setting.device)
    prompts = made_prompts(base, SEQUENCES, PROMPT_TOKENS)
    answer_tokens = 4 if setting.quick else ANSWER_TOKENS
    wanted = SEQUENCES * answer_tokens
    with tempfile.TemporaryDirectory() as root:
        engine = engine_on(base, save_all(base, Path(root)))

    def ask(models: tuple[str, ...]) -> None:
        requests = [
            GenerationRequest(model, prompts[index :: len(models)], max_tokens=answer_tokens, seed=index)
            for index, model in enumerate(models)
        ]
        results = answered(engine, requests)
        assert tokens_in(results) == wanted
        assert [result.version for result in results] == list(models)

    sides = {"mixed": lambda: ask(ADAPTERS), "base": lambda: ask((BASE_NAME,) * len(ADAPTERS))}
    seconds = interleaved(sides, setting.device, rounds=2 if setting.quick else 5)
    engine.close()
    ratio = Ratio.of(seconds["base"], seconds["mixed"])
    rates = {side: round(wanted / took, 1) for side, took in medians(seconds).items()}
    yield Measured(
        ROW, NAME, ratio.median, at_least(0.85),
        {
            **ratio.figures(), "tokens_per_second": rates, "seconds": medians(seconds), "tokens": wanted,
            "sequences": SEQUENCES, "dtype": str(base.dtype),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main(ROW, NAME, __doc__, measure)
