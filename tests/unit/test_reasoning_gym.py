"""Tasks of the package reasoning-gym: right and wrong answers, one task a number, splits, options, refusals."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_rollouts_chat import CHATML, make_base
from test_rollouts_collect import SAMPLING, SOURCE, FakeSampler

from graftwork.errors import ConfigError
from graftwork.programs.processes import Programs, noted_signals
from graftwork.rollouts.chat import ChatTokenizer
from graftwork.rollouts.collect import Request, collect
from graftwork.rollouts.environment import Answer, Environment, HasAnswers, load_environment
from graftwork.rollouts.reasoning_gym import CHUNK
from graftwork.rollouts.reverse_text import split_of

pytest.importorskip("reasoning_gym", reason="it needs a compiler to install: docs/environments.md")

ROOT = Path(__file__).parents[2]
TASKS = (
    "spell_backward", "leg_counting", "basic_arithmetic", "letter_counting", "word_sorting", "chain_sum",
    "number_sorting", "caesar_cipher",
)  # fmt: skip
SPLITS = ("train", "heldout")


def load(name, /, **options):
    return load_environment(f"reasoning_gym:{name}", options)


def part(name, **config):
    """Of a composite task."""
    return {"name": name, "weight": 1.0, "config": config}


def said(text):
    return Answer(text, (1,), "stop")


def question(task):
    return task.data["entry"]["question"]


def digest(tasks):
    """Questions and answers: what a model sees and is scored by."""
    return hashlib.sha256(repr([(t.messages, t.data["entry"]["answer"]) for t in tasks]).encode()).hexdigest()


# --- score ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("tag", [None, "answer"])
def test_right_answers_earn_one_and_wrong_ones_less(name, tag):
    environment = load(name, extract=tag)
    assert isinstance(environment, Environment)
    assert isinstance(environment, HasAnswers)
    for split in SPLITS:
        for index in range(5):
            task = environment.task(0, index, split)
            right = environment.answer(task)
            assert environment.score(task, said(right)) == 1.0
            assert environment.score(task, said(f" {right}\n")) == 1.0
            for wrong in ("", "no idea", right.replace(task.data["entry"]["answer"], "?!")):
                assert environment.score(task, said(wrong)) < 0.5


def test_a_tag_is_what_counts_and_the_last_one():
    environment = load("leg_counting", extract="answer")
    task = environment.task(0, 0, "train")
    right = task.data["entry"]["answer"]
    assert environment.score(task, said(f"It is <answer>0</answer>, no: <answer> {right} </answer>.")) == 1.0
    assert environment.score(task, said(right)) < 0.5
    assert environment.answer(task) == f"<answer>{right}</answer>"
    other = load("leg_counting", extract="final")
    assert other.score(task, said(f"<final>{right}</final>")) == 1.0


def test_an_answer_that_breaks_the_verifier_earns_nothing():
    environment = load("prime_factorization")
    task = environment.task(0, 0, "train")
    with pytest.raises(ValueError, match="invalid literal"):
        environment._verifier.score_answer("no idea", task.data["entry"])
    assert environment.score(task, said("no idea")) == 0.0
    assert environment.score(task, said(environment.answer(task))) == 1.0


def test_scoring_leaves_the_task_alone():
    environment = load("word_sorting")
    task = environment.task(0, 0, "train")
    before = repr(task)
    environment.score(task, said("a, b"))
    assert repr(task) == before


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_the_prompt_is_the_question_and_the_instruction():
    def messages(**options):
        return load("spell_backward", **options).task(0, 0, "train").messages

    plain = load("spell_backward").task(0, 0, "train")
    asked = question(plain)
    assert asked.startswith("Spell this word backward")
    assert plain.messages == ({"role": "user", "content": f"{asked}\n\nReply with the answer only."},)
    (tagged,) = messages(extract="answer")
    assert tagged["content"] == f"{asked}\n\nWrite the answer between <answer> and </answer>."
    assert messages(instruction="") == ({"role": "user", "content": asked},)
    assert messages(instruction="Go.", system="You spell.") == (
        {"role": "system", "content": "You spell."},
        {"role": "user", "content": f"{asked}\n\nGo."},
    )


def test_options_reach_the_task():
    for bounds in ({"min_word_len": 9}, {"max_word_len": 4}, {"min_word_len": 5, "max_word_len": 6}):
        environment = load("spell_backward", **bounds)
        lengths = {len(environment.answer(environment.task(0, i, "train"))) for i in range(60)}
        assert lengths == set(range(bounds.get("min_word_len", 3), bounds.get("max_word_len", 10) + 1))
    products = load("basic_arithmetic", operators=["*"], min_terms=2, max_terms=2, allow_parentheses=False)
    assert all("*" in question(products.task(0, i, "train")) for i in range(20))
    assert load("word_sorting", transformation="uppercase").task(0, 0, "train").data["entry"]["answer"].isupper()


def test_a_mixture_of_tasks():
    environment = load("composite", datasets=[part("leg_counting"), part("spell_backward")])
    tasks = [environment.task(0, i, "train") for i in range(20)]
    assert {t.data["entry"]["metadata"]["source_dataset"] for t in tasks} == {"leg_counting", "spell_backward"}
    assert all(environment.score(t, said(environment.answer(t))) == 1.0 for t in tasks)


# --- one task a number ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TASKS, "list_functions", "pool_matrix", "gsm_symbolic"])
def test_a_task_is_a_function_of_seed_index_and_split(name):
    keys = [(seed, index, split) for seed in (0, 7) for split in SPLITS for index in (0, 1, 5, CHUNK - 1, CHUNK, 10**9)]
    environment = load(name)
    first = {key: digest([environment.task(*key)]) for key in keys}
    random.Random(0).shuffle(keys)
    random.seed(3)
    np.random.seed(3)
    again = load(name)
    assert {key: digest([again.task(*key)]) for key in keys} == first
    assert len(set(first.values())) > len(keys) // 2


def test_the_generators_of_the_process_are_left_alone():
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    load("list_functions").task(0, 0, "train")
    load("pool_matrix").task(0, 0, "train")
    assert (random.random(), np.random.rand()) == expected


def test_other_processes_make_the_same_tasks():
    names = [*TASKS, "list_functions", "family_relationships", "propositional_logic"]
    script = (
        "from graftwork.rollouts.environment import load_environment\n"
        f"for name in {names}:\n"
        "    e = load_environment(f'reasoning_gym:{name}', {})\n"
        "    print([(t.messages, t.data) for s in ('train', 'heldout') for t in [e.task(0, i, s) for i in range(3)]])"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(printed) == 1
    assert len(printed.pop().splitlines()) == len(names)


@pytest.mark.parametrize("hash_seed", [None, "", "random"])
def test_a_task_that_hangs_on_the_hash_seed_is_refused_where_that_is_random(monkeypatch, hash_seed):
    if hash_seed is None:
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    else:
        monkeypatch.setenv("PYTHONHASHSEED", hash_seed)
    mixture = {"datasets": [part("ransom_note")]}
    for task, options in (("ransom_note", {}), ("composite", mixture)):
        with pytest.raises(ConfigError, match=r"ransom_note.*set PYTHONHASHSEED=0"):
            load(task, **options)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert load("ransom_note").task(0, 0, "train")


def test_the_programs_that_graftwork_starts_make_the_same_tasks(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    script = (
        "from graftwork.rollouts.environment import load_environment\n"
        "for name in ('ransom_note', 'isomorphic_strings', 'word_ladder'):\n"
        "    e = load_environment('reasoning_gym:' + name, {})\n"
        "    print(*[e.task(0, i, 'heldout').data for i in range(3)])"
    )
    written = set()
    for start in range(2):
        with noted_signals() as signals, Programs(tmp_path, (sys.executable, "-c", script), signals) as programs:
            started = programs.start("orchestrator", tmp_path / f"{start}")
            assert started.process.wait() == 0
            words = started.log.read_bytes()[started.log_start :].decode()
            written.add(words.partition("\n")[2])  # after the title of this start
    assert len(written) == 1
    assert len(written.pop().splitlines()) == 3


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in TASKS), ("coin_flip", {"max_trials": 4})])
def test_no_question_is_in_both_splits(name, options):
    environment = load(name, **options)
    asked = {split: {question(environment.task(0, i, split)) for i in range(150)} for split in SPLITS}
    assert not asked["train"] & asked["heldout"]
    for split in SPLITS:
        assert {split_of(text) for text in asked[split]} == {split}


def test_a_split_without_questions_is_refused():
    environment = load("spell_backward", data_file="words3to10.txt", min_word_len=10, max_word_len=10)
    environment._chunk = lambda seed, number, split: (0, [{"question": "only one", "answer": ""}] * 10**5)
    (empty,) = {"train", "heldout"} - {split_of("only one")}
    with pytest.raises(ConfigError, match=rf"none of 128 questions belongs to the split '{empty}'.*Widen"):
        environment.task(0, 0, empty)


def test_a_dataset_that_breaks_is_made_anew():
    class Ends:
        broken = False

        def __getitem__(self, position):
            if self.broken or position % CHUNK == 1:
                self.broken = True
                raise IndexError("exhausted")
            return {"question": f"{position}", "answer": ""}

    environment = load("spell_backward")
    environment._dataset = lambda seed, size: Ends()
    expected = question(environment.task(0, 0, "train"))
    environment._task.cache_clear()
    with pytest.raises(IndexError):
        environment.task(0, 1, "train")
    assert question(environment.task(0, 0, "train")) == expected


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("spel_backward", {}, ["no task 'spel_backward'", "spell_backward"]),
        ("qqqqqqqqq", {}, ["no task 'qqqqqqqqq'", "it has", "leg_counting"]),
        ("spell_backward", {"min_word_length": 3}, ["'min_word_length'", "did you mean 'min_word_len'", "instruction"]),
        ("spell_backward", {"instructions": "x"}, ["did you mean 'instruction'"]),
        ("spell_backward", {"seed": 3}, ["seed is not an option"]),
        ("spell_backward", {"size": 3}, ["size is not an option"]),
        ("spell_backward", {"min_word_len": "3"}, ["min_word_len = '3'", "expected int, found str"]),
        ("spell_backward", {"min_word_len": True}, ["min_word_len", "found bool"]),
        ("spell_backward", {"min_word_len": 0}, ["refused its options", "min_word_len must be positive"]),
        ("spell_backward", {"data_file": "none.txt"}, ["refused its options", "none.txt"]),
        ("word_sorting", {"transformation": "sideways"}, ["transformation = 'sideways'"]),
        ("basic_arithmetic", {"operators": "+-", "max_terms": 1}, ["basic_arithmetic"]),
        ("arc_1d", {"extract": "<answer>"}, ["extract = '<answer>'", "tag's name"]),
        ("arc_1d", {"system": 3}, ["system = 3"]),
        ("arc_1d", {"allow_eval": 1}, ["allow_eval = 1", "true or false"]),
        ("arc_1d", {"task": "spell_backward"}, ["has no option 'task'"]),
        ("composite", {}, ["refused its options", "at least one dataset"]),
        ("composite", {"datasets": [{"name": "leg_counting", "wieght": 1}]}, ["datasets", "wieght"]),
        ("composite", {"datasets": [part("composite", datasets=[part("n_queens")])]}, ["refused its options"]),
    ],
)
def test_what_cannot_be_loaded_is_refused(name, options, words):
    with pytest.raises(ConfigError) as caught:
        load(name, **options)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_task_without_answers_cannot_be_learnt_from():
    environment = load("rush_hour")
    with pytest.raises(ConfigError, match="nothing to learn from"):
        environment.answer(environment.task(0, 0, "train"))


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    with pytest.raises(ConfigError, match=r"pip install 'graftwork\[reasoning-gym\]'"):
        load("spell_backward")


def test_the_package_is_imported_when_asked_for_and_never_torch():
    script = (
        "import sys, graftwork.programs.orchestrator\n"
        "from graftwork.rollouts.environment import Answer, load_environment\n"
        "load_environment('reverse_text', {})\n"
        "assert 'reasoning_gym' not in sys.modules\n"
        f"for name in {TASKS[:5]}:\n"
        "    environment = load_environment(f'reasoning_gym:{name}', {})\n"
        "    task = environment.task(0, 0, 'train')\n"
        "    assert environment.score(task, Answer(environment.answer(task), (1,), 'stop')) == 1.0\n"
        "assert 'reasoning_gym' in sys.modules\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


# --- in a batch -------------------------------------------------------------------------------------------------------


def test_a_batch_is_played_and_scored(tmp_path):
    tokenizer = ChatTokenizer.load(make_base(tmp_path, CHATML))
    environment = load("spell_backward")
    request = Request.of_batch("tiny", 5, 2, SAMPLING)
    collected = asyncio.run(collect(environment, tokenizer, FakeSampler(), SOURCE, request))
    assert collected.failed == 0
    assert len(collected.rows) == SAMPLING.prompts_per_step * SAMPLING.samples_per_prompt
    for row in collected.rows:
        task = environment.task(5, SAMPLING.prompts_per_step + row["prompt_index"], "train")
        assert row["prompt"] == task.messages[0]["content"]
        assert row["reward"] == environment.score(task, said(row["answer"]))
