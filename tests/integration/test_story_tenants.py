"""alpha, beta and gamma on two slots, with real processes: proofs/tenants_story.py tells what happens."""

import subprocess
import sys

import pytest
import torch

from graftwork.store.chain import read_chain
from graftwork.store.files import read_json
from graftwork.store.queue import read_version
from proofs.tenants_story import END, GAMMA_FIRST, KILL_AFTER, MORE, RATES_AND_RANKS, REWARD_BAR, Story


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("tenants")
    sft = [
        sys.executable,
        "-m",
        "graftwork",
        "sft",
        "examples/reverse_text/sft.toml",
        "--output_dir",
        str(folder / "sft"),
    ]
    subprocess.run(sft, check=True, capture_output=True, timeout=900)
    story = Story(folder, prompts=32)
    story.tell(folder / "sft" / "adapter")
    return story


def test_everyone_got_a_slot_in_turn_and_finished(story: Story) -> None:
    assert story.seen == {"gamma is queued, first in line": True, GAMMA_FIRST: True}
    for name, step in (("beta", END), ("gamma", END), ("alpha2", END), ("beta2", MORE)):
        assert story.is_at(name, "finished", step)
    assert not story.tree("alpha").root.exists()
    starts = {str(tree.id): read_chain(tree)[0].step for tree in story.trees()}
    assert starts == {"alpha": 0, "beta": 0, "gamma": 0, "alpha2": KILL_AFTER, "beta2": END}


def test_everyone_learnt(story: Story) -> None:
    assert {name: reward for name, reward in story.rewards().items() if reward <= REWARD_BAR} == {}


def test_rank_and_scale_of_what_was_exported_are_the_runs_own(story: Story) -> None:
    for name, (_, rank) in RATES_AND_RANKS.items():
        tree = story.kept_alpha if name == "alpha" else story.tree(name)
        published = read_version(tree, KILL_AFTER)
        assert published is not None
        config = read_json(published.path / "adapter_config.json", "adapter")
        assert (config["r"], config["lora_alpha"]) == (rank, 32)


def test_each_runs_batches_give_the_same_versions_alone_on_a_fresh_trainer(story: Story) -> None:
    threads = torch.get_num_threads()
    try:
        assert {run: wrong for run, wrong in story.replayed().items() if wrong} == {}
    finally:
        torch.set_num_threads(threads)


def test_every_chain_holds(story: Story) -> None:
    assert {run: found for run, found in story.verified().items() if found} == {}
