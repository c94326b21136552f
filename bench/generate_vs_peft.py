"""How fast is the embedded engine against transformers' `generate` with PEFT's `adapter_names`?

32 prompts for four adapters, answers of 4 to 48 tokens, greedy. The peer is at its best: adapters in the base's dtype,
prompts of one length (no padding), one call whose longest answer decides, as `generate` computes every row until all
are done, whatever stops a row. On both sides only tokens that were asked for count. In float32 both sides must say the
same tokens; that is looked at beforehand, where the time does not count.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from bench.bases import base_folder, load
from bench.engines import ADAPTERS, answered, load_all, made_prompts, new_engine, save_all, tokens_in
from bench.harness import Measured, Ratio, Setting, at_least, interleaved, main, medians, need
from graftwork.inference.requests import GenerationRequest

ROW, NAME = 9, "generate_vs_peft"
SEQUENCES, PROMPT_TOKENS = 32, 16
ANSWER_TOKENS = (4, 48)
CHECKED_TOKENS = 8

Answers = list[list[int]]


def measure(setting: Setting) -> Iterator[Measured]:
    longest = CHECKED_TOKENS if setting.quick else ANSWER_TOKENS[1]
    agreed = _agreeing(setting)
    dtype, ours, peer, limits = _sides(setting, "auto", longest)
    wanted = sum(limits)

    def checked(side: Callable[[], Answers]) -> None:
        assert [len(answer) for answer in side()] == limits

    sides = {"engine": lambda: checked(ours), "peft": lambda: checked(peer)}
    seconds = interleaved(sides, setting.device, rounds=1 if setting.quick else 3)
    ratio = Ratio.of(seconds["peft"], seconds["engine"])
    rates = {side: round(wanted / took, 1) for side, took in medians(seconds).items()}
    yield Measured(
        ROW, NAME, ratio.median, at_least(2.0),
        {
            **ratio.figures(), "tokens_per_second": rates, "seconds": medians(seconds), "tokens": wanted,
            "rows_of_peer": SEQUENCES * max(limits), "sequences": SEQUENCES, "dtype": dtype,
            "equal_greedy_tokens_in_float32": agreed,
        },
    )  # fmt: skip


def _agreeing(setting: Setting) -> int:
    """Tokens that both sides said alike in float32: all of them."""
    _, ours, peer, limits = _sides(setting, "float32", CHECKED_TOKENS)
    one, other = ours(), peer()
    assert one == other, "the engine and PEFT disagree on greedy tokens in float32"
    return sum(limits)


def _sides(
    setting: Setting, dtype: str, longest: int
) -> tuple[str, Callable[[], Answers], Callable[[], Answers], list[int]]:
    """(dtype, engine, peer, tokens wanted of each prompt); the sides give the answers in the prompts' order."""
    path = base_folder("smollm2-135m")
    base = load(path, setting.device, dtype)
    prompts = made_prompts(base, SEQUENCES, PROMPT_TOKENS)
    names = [ADAPTERS[index % len(ADAPTERS)] for index in range(SEQUENCES)]
    spread = np.linspace(ANSWER_TOKENS[0], longest, SEQUENCES).astype(int)
    limits = np.random.default_rng(1).permutation(spread).tolist()
    requests = [
        GenerationRequest(name, [prompt], max_tokens=limit, temperature=0.0)
        for name, prompt, limit in zip(names, prompts, limits, strict=True)
    ]
    with tempfile.TemporaryDirectory() as root:
        folders = save_all(base, Path(root))
        engine = new_engine(base)
        engine.start()
        load_all(engine, folders)
        model = _peer(path, folders, base.dtype, setting.device)

    def ours() -> Answers:
        results = answered(engine, requests)
        assert tokens_in(results) == sum(limits)
        return [result.choices[0].token_ids.tolist() for result in results]

    def peer() -> Answers:
        ids = torch.tensor(prompts, device=setting.device)
        with torch.inference_mode():
            said = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, do_sample=False,
                max_new_tokens=max(limits),
            )  # fmt: skip
        rows = said[:, PROMPT_TOKENS:].tolist()
        return [row[:limit] for row, limit in zip(rows, limits, strict=True)]

    return str(base.dtype), ours, peer, limits


def _peer(path: Path, folders: dict[str, Path], dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """PEFT's model with the same adapters, all in the base's dtype."""
    need("peft")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    bare = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    bare.generation_config.eos_token_id = None  # answers end at their limit
    (first, folder), *others = folders.items()
    model = PeftModel.from_pretrained(bare, str(folder), adapter_name=first, autocast_adapter_dtype=False)
    for name, folder in others:
        model.load_adapter(str(folder), adapter_name=name, autocast_adapter_dtype=False)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    return model.eval()


if __name__ == "__main__":
    main(ROW, NAME, __doc__, measure)
