"""SFT and RL render the same conversation to the same tokens; the oracle is transformers' `apply_chat_template`."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_rollouts_chat import CHATML, SPECIAL, make_base
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from graftwork.config.load import build
from graftwork.config.run import SamplingConfig
from graftwork.config.schema import SftConfig
from graftwork.rollouts.chat import ChatTokenizer
from graftwork.rollouts.collect import Request, Source, collect
from graftwork.rollouts.environment import Task, load_environment
from graftwork.rollouts.sampling import Completion
from graftwork.store.queue import Rollout
from graftwork.training.packer import Example
from graftwork.training.sft_data import conversations, example_of

SOURCE = Source("tiny@3-abababab", "ab" * 32)
SYSTEM = {"role": "system", "content": "Be brief. Sei knapp!"}
ONE = [{"role": "user", "content": "Reverse: hello"}, {"role": "assistant", "content": "olleh"}]
TWO = [{"role": "user", "content": "  and <b>twice</b>,\n\nplease?"}, {"role": "assistant", "content": "o l l e h  "}]
THREE = [{"role": "user", "content": "3 + 4 = 7, 'isn''t' it"}, {"role": "assistant", "content": "Yes: 3+4=7."}]
TALKS = {"one": ONE, "system": [SYSTEM, *ONE], "two": [*ONE, *TWO], "three": [SYSTEM, *ONE, *TWO, *THREE]}


def make_bpe_base(folder: Path) -> Path:
    """Like make_base, with byte-level BPE: pieces of several letters, spaces in front."""
    make_base(folder, CHATML)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    corpus = [m["content"] for talk in TALKS.values() for m in talk] + ["user system assistant hello olleh twice"] * 3
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=["characters", "bpe"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    return make_base(folder, CHATML) if request.param == "characters" else make_bpe_base(folder)


class Script:
    """Asks the user's turns of a conversation, one after the other."""

    def __init__(self, talk: list[dict[str, Any]]) -> None:
        self.talk = talk

    def task(self, seed: int, index: int, split: str) -> Task:
        return Task(())

    async def run(self, task: Task, policy: Any) -> float:
        new: list[dict[str, Any]] = []
        for message in self.talk:
            if message["role"] != "assistant":
                new.append(message)
            else:
                answer = await policy.ask(new)
                assert answer.text == message["content"]
                new = []
        return 1.0


class Parrot:
    """Says what it was told to, in the order that it is asked, and ends its turns."""

    def __init__(self, tokenizer: ChatTokenizer, answers: list[str]) -> None:
        self.left = [(*tokenizer.encode(answer), tokenizer.tokenizer.token_to_id("<|im_end|>")) for answer in answers]
        self.asked: list[tuple[int, ...]] = []

    async def complete(self, model: str, prompts: Any, n: int, sampling: SamplingConfig, seed: int) -> list[Completion]:
        [prompt] = prompts
        self.asked.append(tuple(prompt))
        token_ids = self.left.pop(0)
        return [Completion(token_ids, (-0.5,) * len(token_ids), "stop", SOURCE.model, SOURCE.digest)]


def answers_of(talk: list[dict[str, Any]]) -> list[str]:
    return [message["content"] for message in talk if message["role"] == "assistant"]


def by_sft(base: Path, folder: Path, talk: list[dict[str, Any]]) -> Example:
    """Through a file, as `graftwork sft` reads it."""
    (folder / "talk.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    data = {"path": str(folder / "talk.jsonl")}
    config = build(SftConfig, {"model": {"path": str(base)}, "batch_size": 1, "data": data}, source="x.toml")
    [found] = conversations(config)(1)
    return example_of(ChatTokenizer.load(base), found)


def by_rl(base: Path, environment: Any, answers: list[str], step: int = 1) -> tuple[Rollout, Parrot]:
    tokenizer = ChatTokenizer.load(base)
    sampling = SamplingConfig(prompts_per_step=1, samples_per_prompt=1)
    parrot = Parrot(tokenizer, answers)
    request = Request.of_batch("tiny", 0, step, sampling)
    collected = asyncio.run(collect(environment, tokenizer, parrot, SOURCE, request))
    [rollout] = collected.rollouts
    return rollout, parrot


def check(base: Path, folder: Path, talk: list[dict[str, Any]]) -> None:
    theirs = AutoTokenizer.from_pretrained(base).apply_chat_template(
        talk, return_dict=True, return_assistant_tokens_mask=True
    )
    learnt = by_sft(base, folder, talk)
    assert learnt.token_ids.tolist() == theirs["input_ids"]
    assert learnt.loss_mask.tolist() == [bool(flag) for flag in theirs["assistant_masks"]]
    played, _ = by_rl(base, Script(talk), answers_of(talk))
    length = len(played.token_ids)
    assert np.array_equal(played.token_ids, learnt.token_ids[:length])
    assert np.array_equal(played.loss_mask, learnt.loss_mask[:length])
    assert not learnt.loss_mask[length:].any(), "after the last end token the template writes what nobody samples"


@pytest.mark.parametrize("name", TALKS)
def test_a_conversation_is_learnt_and_played_with_the_same_tokens(base: Path, tmp_path: Path, name: str) -> None:
    check(base, tmp_path, TALKS[name])


@pytest.mark.parametrize("name", TALKS)
def test_a_row_of_prompts_asks_what_the_template_writes_before_its_answer(
    base: Path, tmp_path: Path, name: str
) -> None:
    """Earlier answers of the row are part of the question."""
    talk = TALKS[name]
    learnt = by_sft(base, tmp_path, talk)
    rows = {"path": str(tmp_path / "talk.jsonl"), "heldout_path": str(tmp_path / "other.jsonl")}
    (tmp_path / "other.jsonl").write_text('{"messages": [{"role": "user", "content": "z"}], "answer": "z"}\n')
    played, parrot = by_rl(base, load_environment("prompts", rows), [talk[-1]["content"]])
    expected = AutoTokenizer.from_pretrained(base).apply_chat_template(
        talk[:-1], add_generation_prompt=True, return_dict=False
    )
    assert parrot.asked == [tuple(expected)]
    assert np.array_equal(played.token_ids, learnt.token_ids[: len(played.token_ids)])
    assert played.loss_mask.sum() == len(played.token_ids) - len(expected) and played.reward == 1.0


def test_the_bundled_base_agrees(tmp_path: Path) -> None:
    """Its template has no marks for the answers, so the oracle of the mask is the prompt's length."""
    base = Path(__file__).parents[2] / "examples" / "reverse_text" / "base"
    theirs = AutoTokenizer.from_pretrained(base)
    whole = theirs.apply_chat_template(ONE, return_dict=False)
    prompt = theirs.apply_chat_template(ONE[:1], add_generation_prompt=True, return_dict=False)
    learnt = by_sft(base, tmp_path, ONE)
    assert learnt.token_ids.tolist() == whole and not learnt.loss_mask[: len(prompt)].any()
    assert learnt.loss_mask[len(prompt)]


printable = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="<|>"), min_size=1, max_size=8
)
turns = st.lists(st.tuples(printable, printable), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=turns, system=st.booleans())
def test_any_words_in_any_number_of_turns(
    base: Path, tmp_path: Path, turns: list[tuple[str, str]], system: bool
) -> None:
    talk = [SYSTEM] if system else []
    for question, answer in turns:
        talk += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    check(base, tmp_path, talk)
