"""What vLLM does with our versions, and the guards without which it would do something else in silence."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from made_versions import BASE, MAX_ADAPTERS, TOLERANCE, Bench, Talk

from graftwork.adapters.canonical import Adapter, LoraPair
from graftwork.adapters.convert import FORMATS
from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.source import AdapterFacts
from graftwork.config.run import SamplingConfig
from graftwork.errors import Refused, WrongAdapter
from graftwork.programs.serving import Serving
from graftwork.rollouts.client import InferenceClient
from graftwork.rollouts.probe import Probe, judge
from graftwork.rollouts.sampling import Completion
from graftwork.store.queue import Published, Version

LONG = [int(token) for token in np.random.default_rng(1).integers(2, 100, 200)]
"""Longer than a block of the prefix cache (128 tokens on CPU)."""
MEAN_GAP, MAX_GAP = 0.005, 0.03
WRONG = 0.2
"""Log-probs that differ by this much are another function's."""


async def complete(
    client: InferenceClient, model: str, prompts: list[list[int]], n: int = 1, **sampling: float
) -> list[Completion]:
    settings = SamplingConfig.model_validate({"max_tokens": 12, **sampling})
    return await client.complete(model, prompts, n, settings, seed=0)


def gaps(
    bench: Bench, adapter: Adapter | None, prompt: list[int], answer: Completion, temperature: float = 1.0
) -> np.ndarray:
    """[T]: |sampler's - trainer's log-prob| of each sampled token."""
    tokens = [*prompt, *answer.token_ids]
    return np.abs(bench.logprobs(adapter, tokens, len(prompt), temperature) - np.array(answer.logprobs))


def test_each_version_takes_effect_is_verified_and_the_one_before_is_unloaded(bench: Bench, talk: Talk) -> None:
    versions = [bench.publish(bench.adapter(seed)) for seed in (1, 2)]

    async def work(client: InferenceClient, serving: Serving) -> list[list[str]]:
        seen = []
        for published in versions:
            await serving.serve(published)
            seen.append([name for name in await client.served_models() if name != BASE])
        assert serving.findings[versions[1].version.name].outcome == "verified"
        return seen

    assert talk(work) == [[published.version.name] for published in versions]


def test_a_fresh_adapter_cannot_be_told_from_the_base(bench: Bench, talk: Talk) -> None:
    fresh = Adapter({path: LoraPair(pair.a, pair.b * 0, pair.scale) for path, pair in bench.adapter(1).pairs.items()})
    published = bench.publish(fresh)

    async def work(client: InferenceClient, serving: Serving) -> str:
        await serving.serve(published)
        return serving.findings[published.version.name].outcome

    assert talk(work) == "undecided"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_trainer_agree_on_log_probs_of_the_sampled_distribution(
    bench: Bench, talk: Talk, temperature: float
) -> None:
    adapter = bench.adapter(3)
    published = bench.publish(adapter)
    prompts = [[5, 6, 7, 8], [20, 21, 22], LONG]

    async def work(client: InferenceClient, serving: Serving) -> list[Completion]:
        await serving.serve(published)
        return await complete(client, published.version.name, prompts, n=32, temperature=temperature)

    answers = talk(work)
    all_gaps = np.concatenate(
        [gaps(bench, adapter, prompts[i // 32], answer, temperature) for i, answer in enumerate(answers)]
    )
    assert len(all_gaps) > 100
    assert all_gaps.mean() <= MEAN_GAP and all_gaps.max() <= MAX_GAP
    if temperature != 1.0:  # log-probs of the logits as they are, vLLM's own default, would not do
        plain = np.concatenate([gaps(bench, adapter, prompts[i // 32], answer) for i, answer in enumerate(answers)])
        assert plain.mean() > 10 * MEAN_GAP


def test_log_probs_of_a_nucleus_are_those_of_the_cut_distribution(bench: Bench, talk: Talk) -> None:
    adapter = bench.adapter(3)
    published = bench.publish(adapter)
    prompt = [5, 6, 7, 8]

    async def work(client: InferenceClient, serving: Serving) -> list[Completion]:
        await serving.serve(published)
        return await complete(client, published.version.name, [prompt], n=32, top_p=0.5, max_tokens=1)

    firsts = {answer.token_ids[0]: answer.logprobs[0] for answer in talk(work)}
    bench.hold(adapter)
    whole = np.array([bench.logprobs(adapter, [*prompt, token], len(prompt))[0] for token in range(102)])
    order = np.argsort(-whole)
    kept = order[: int(np.searchsorted(np.cumsum(np.exp(whole[order])), 0.5)) + 1]
    share = np.exp(whole[kept]).sum()
    assert set(firsts) <= set(kept.tolist()) and share < 0.95
    for token, logprob in firsts.items():
        assert logprob == pytest.approx(whole[token] - np.log(share), abs=MAX_GAP)


def test_long_prompts_are_not_answered_from_another_versions_prefix_cache(bench: Bench, talk: Talk) -> None:
    """A fresh path and a fresh name for every version. Without them, as the second half shows, the cache is stale."""
    adapters = [bench.adapter(seed) for seed in (4, 5)]
    versions = [bench.publish(adapter) for adapter in adapters]
    place = versions[0].path.parent / "overwritten"

    async def work(client: InferenceClient, serving: Serving) -> tuple[list[Completion], list[Completion]]:
        ours, overwritten = [], []
        for published in versions:
            await serving.serve(published)
            ours += await complete(client, published.version.name, [LONG])
        await serving.unload_all_but(None)
        for published in versions:
            place.mkdir(exist_ok=True)
            for file in ("adapter_config.json", "adapter_model.safetensors"):
                (place / file).write_bytes((published.path / file).read_bytes())
            same_name = Version(bench.tree.id, 0, "0" * 64)
            await client.unload_adapter(same_name.name)
            await client.load_adapter(same_name, place)
            overwritten += await complete(client, same_name.name, [LONG])
        return ours, overwritten

    ours, overwritten = talk(work)
    for adapter, answer in zip(adapters, ours, strict=True):
        assert gaps(bench, adapter, LONG, answer).max() <= MAX_GAP
    assert gaps(bench, adapters[0], LONG, overwritten[0]).max() <= MAX_GAP
    assert gaps(bench, adapters[1], LONG, overwritten[1]).max() > WRONG, "vLLM was mended: this guard may go"


def test_the_bare_base_is_never_asked_as_an_adapter_might_answer(bench: Bench, talk: Talk) -> None:
    """The second half shows that one does: once every place has held an adapter, also if all but one are unloaded."""
    versions = [bench.publish(bench.adapter(10 + i)) for i in range(MAX_ADAPTERS)]
    prompts = [[7 + i, 30, 40 + i] for i in range(6)]

    async def work(client: InferenceClient, serving: Serving) -> list[Completion]:
        with pytest.raises(Refused, match="is no version of a run"):
            await complete(client, BASE, prompts)
        for published in versions:
            await serving.serve(published)
            await complete(client, published.version.name, prompts)
        answers = []
        async with InferenceClient(talk.url, 120) as unguarded:
            for _ in range(4):
                asked = [(client, versions[-1].version.name), (unguarded, BASE)]
                answers += (await asyncio.gather(*(complete(one, name, prompts) for one, name in asked)))[1]
        return answers

    answers = talk(work)
    worst = max(gaps(bench, None, prompts[i % 6], answer).max() for i, answer in enumerate(answers))
    assert worst > WRONG, "vLLM was mended: this guard may go"


def test_a_name_that_the_server_holds_already_is_probed_and_what_is_wrong_replaced(bench: Bench, talk: Talk) -> None:
    right, other = bench.adapter(6), bench.adapter(7)
    published = bench.publish(right)
    elsewhere = published.path.parent / "elsewhere"
    elsewhere.mkdir()
    for name, data in bench.files(other).items():
        (elsewhere / name).write_bytes(data)

    async def work(client: InferenceClient, serving: Serving) -> tuple[Completion, Completion]:
        name = published.version.name
        await client.load_adapter(published.version, elsewhere)
        [wrong] = await complete(client, name, [LONG])
        await serving.serve(published)
        [answer] = await complete(client, name, [[9, *LONG]])
        assert serving.findings[name].outcome == "verified"
        return wrong, answer

    wrong, answer = talk(work)
    assert gaps(bench, right, LONG, wrong).max() > WRONG, "without the probe this would have been sampled from"
    assert gaps(bench, right, [9, *LONG], answer).max() <= MAX_GAP


def test_a_right_one_that_is_there_already_is_not_loaded_again(bench: Bench, talk: Talk) -> None:
    published = bench.publish(bench.adapter(8))

    async def work(client: InferenceClient, serving: Serving) -> None:
        await client.load_adapter(published.version, published.path)
        moved = published.path.rename(published.path.with_name("step_away"))  # another load would fail
        await serving.serve(Published(published.version, moved, published.facts))
        assert serving.findings[published.version.name].outcome == "verified"

    talk(work)


def test_names_that_vllm_passes_over_in_silence_are_found_out(bench: Bench, talk: Talk) -> None:
    published = bench.publish(bench.adapter(9))
    foreign = {path.replace("layers.", "layers.9"): pair for path, pair in bench.adapter(9).pairs.items()}
    for name, data in bench.files(Adapter(foreign)).items():
        (published.path / name).write_bytes(data)

    async def work(client: InferenceClient, serving: Serving) -> None:
        with pytest.raises(WrongAdapter, match=r"does not hold .*; it answers as the bare base does"):
            await serving.serve(published)

    talk(work)


@pytest.mark.parametrize(
    ("rank", "scale", "targets"),
    [(1, 2.0, None), (3, 0.5, None), (8, 4.0, None), (4, 2.0, ("q_proj", "v_proj")), (4, 2.0, ("down_proj",))],
)
@pytest.mark.parametrize("layout", ["peft", "peft-per-expert", "vllm-3d"])
def test_every_layout_that_we_export_is_accepted_and_takes_effect(
    bench: Bench, talk: Talk, layout: str, rank: int, scale: float, targets: tuple[str, ...] | None
) -> None:
    """Of a base without experts the three are files of the same names. vLLM has no LoRA on experts without a GPU."""
    whole = bench.adapter(11, rank=rank, scale=scale, size=0.2)
    adapter = Adapter({p: pair for p, pair in whole.pairs.items() if targets is None or p.endswith(targets)})
    files = write_peft(adapter, AdapterFacts(BASE, bench.base.fingerprint), FORMATS[layout])
    published = bench.publish(adapter)
    folder = Path(published.path).with_name("exported")
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)

    async def work(client: InferenceClient, serving: Serving) -> None:
        await client.load_adapter(published.version, folder)
        await serving.serve(published)
        assert serving.findings[published.version.name].outcome == "verified"

    talk(work)


def test_a_client_that_goes_away_and_unloads_leaves_the_server_well(bench: Bench, talk: Talk) -> None:
    first, second = bench.publish(bench.adapter(12)), bench.publish(bench.adapter(13))

    async def work(client: InferenceClient, serving: Serving) -> None:
        await serving.serve(first)
        flying = asyncio.create_task(complete(client, first.version.name, [LONG] * 16, n=2, max_tokens=48))
        await asyncio.sleep(0.2)
        flying.cancel()
        await asyncio.gather(flying, return_exceptions=True)
        await serving.serve(second)
        await client.health()
        assert serving.findings[second.version.name].outcome == "verified"

    talk(work)


def test_the_probe_is_of_this_version_and_of_no_other(bench: Bench, talk: Talk) -> None:
    """Each version's probe against what the server says of the other one and of the base."""
    versions = [bench.publish(bench.adapter(seed)) for seed in (14, 15)]

    async def work(client: InferenceClient, serving: Serving) -> None:
        await serving.serve(versions[0])
        probe = Probe.read(versions[1].path)
        assert probe is not None
        for model, who in ((versions[0].version.name, "version before"), (BASE, "bare base")):
            served = await client.next_tokens(model, probe.prompt, 20)
            with pytest.raises(WrongAdapter, match=f"the {who} does"):
                judge(probe, served, TOLERANCE)

    talk(work)
    assert json.loads((versions[0].path / "probe.json").read_text())["previous"] is None
