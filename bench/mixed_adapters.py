"""What do four adapters in one batch cost the embedded engine, against the bare base?

Both sides get the same prompts in requests of the same sizes, and sample as many tokens as rollouts do, at temperature
1; one side's requests name four adapters of rank 16 on all linear layers, the other's the base. Tokens a second,
reading the prompts included. The engine works in the main thread, as in `graftwork inference`. With as many sequences
as a step of examples/smollm2 asks for at once, and with a quarter of that: products with the adapters' factors cost
about the same for both, so that few sequences pay more for them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.bases import base_folder, load
from bench.engines import ADAPTERS, BASE_NAME, answered, load_all, made_prompts, new_engine, save_all, tokens_in
from bench.harness import Measured, Ratio, Setting, at_least, interleaved, main, medians
from graftwork.inference.requests import GenerationRequest
from graftwork.model.base import BaseModel

ROW, NAME = 8, "mixed_adapters"
SEQUENCES, FEW_SEQUENCES = 128, 32
PROMPT_TOKENS, ANSWER_TOKENS = 16, 32


def measure(setting: Setting) -> Iterator[Measured]:
    base = load(base_folder("smollm2-135m"), setting.device)
    yield _measured(setting, f"{NAME}_few", base, FEW_SEQUENCES)
    yield _measured(setting, NAME, base, SEQUENCES)


def _measured(setting: Setting, name: str, base: BaseModel, sequences: int) -> Measured:
    prompts = made_prompts(base, sequences, PROMPT_TOKENS)
    answer_tokens = 4 if setting.quick else ANSWER_TOKENS
    wanted = sequences * answer_tokens
    engine = new_engine(base)

    def ask(models: tuple[str, ...]) -> None:
        requests = [
            GenerationRequest(model, prompts[index :: len(models)], max_tokens=answer_tokens, seed=index)
            for index, model in enumerate(models)
        ]
        results = answered(engine, requests)
        assert tokens_in(results) == wanted
        assert [result.version for result in results] == list(models)

    sides = {"mixed": lambda: ask(ADAPTERS), "base": lambda: ask((BASE_NAME,) * len(ADAPTERS))}

    with tempfile.TemporaryDirectory() as root:
        folders = save_all(base, Path(root))

        def front() -> dict[str, list[float]]:
            load_all(engine, folders)
            return interleaved(sides, setting.device, rounds=2 if setting.quick else 5)

        seconds = engine.work_for(front)
    ratio = Ratio.of(seconds["base"], seconds["mixed"])
    rates = {side: round(wanted / took, 1) for side, took in medians(seconds).items()}
    figures = {
        **ratio.figures(), "tokens_per_second": rates, "seconds": medians(seconds), "tokens": wanted,
        "sequences": sequences, "dtype": str(base.dtype),
    }  # fmt: skip
    return Measured(ROW, name, ratio.median, at_least(0.85), figures)


if __name__ == "__main__":
    main(ROW, NAME, __doc__, measure)
