"""Batches in, versions out."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import random_batch

from graftwork.errors import BadBatch, BadRunId, Damaged
from graftwork.store.disk import Disk
from graftwork.store.layout import RunId, RunTree
from graftwork.store.queue import (
    Published,
    Sampled,
    Version,
    parse_version_name,
    publish_batch,
    publish_version,
    read_batch,
    read_version,
)

RUN = RunId("a")
VERSION = Version(RUN, 4, "ab" * 32)


@pytest.fixture
def tree(tmp_path: Path) -> RunTree:
    return RunTree.at(tmp_path / "run_a")


def published(tree: RunTree) -> Published:
    return Published(VERSION, tree.broadcast(4), {})


def test_a_batch_is_read_back_equal_with_its_digest(tree: RunTree) -> None:
    batch = random_batch(RUN, 5, published(tree))
    digest = publish_batch(Disk(), tree, batch)
    found = read_batch(tree, 5)
    assert found is not None
    read, read_digest = found
    assert read_digest == digest
    assert (read.versions, read.temperature, read.orchestrator_state) == (batch.versions, 1.0, {"next_step": 6})
    for ours, theirs in zip(read.rollouts, batch.rollouts, strict=True):
        for name in ("token_ids", "loss_mask", "logprobs", "version_index"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name))
        assert ours.reward == np.float32(theirs.reward) and ours.advantage == np.float32(theirs.advantage)


def test_equal_batches_have_equal_bytes(tree: RunTree, tmp_path: Path) -> None:
    batch = random_batch(RUN, 5, published(tree))
    other = RunTree.at(tmp_path / "elsewhere" / "run_a")
    assert publish_batch(Disk(), tree, batch) == publish_batch(Disk(), other, batch)


SAMPLED = Sampled(2, 12, 1, 3, 2, 90, 0.25, 0.5)


def test_what_was_sampled_travels_with_a_batch_and_may_be_absent(tree: RunTree) -> None:
    publish_batch(Disk(), tree, replace(random_batch(RUN, 5, published(tree)), sampled=SAMPLED))
    publish_batch(Disk(), tree, random_batch(RUN, 6, published(tree)))
    told, older = read_batch(tree, 5), read_batch(tree, 6)
    assert told is not None and told[0].sampled == SAMPLED
    assert older is not None and older[0].sampled is None


@pytest.mark.parametrize(
    ("name", "value"),
    [("reward_mean", -1e39), ("reward_std", -0.5), ("reward_std", 1e39), ("answers", 0), ("answers", True),
     ("failed", -1), ("equal_groups", 1.5), ("answer_tokens", 10**30), ("rounds", "2")],
)  # fmt: skip
def test_what_metrics_cannot_hold_is_refused(tree: RunTree, name: str, value: object) -> None:
    wrong = replace(SAMPLED, **{name: value})  # type: ignore[arg-type]
    publish_batch(Disk(), tree, replace(random_batch(RUN, 5, published(tree)), sampled=wrong))
    with pytest.raises(BadBatch, match=rf"sampled\.{name} is"):
        read_batch(tree, 5)


def test_a_batch_that_is_not_there_yet_is_none(tree: RunTree) -> None:
    assert read_batch(tree, 5) is None
    (tree.batch(5)).mkdir(parents=True)
    assert read_batch(tree, 5) is None


def test_a_changed_byte_is_refused(tree: RunTree) -> None:
    publish_batch(Disk(), tree, random_batch(RUN, 5, published(tree)))
    path = tree.batch(5) / "batch.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadBatch, match=r"batch 5 is damaged: .*batch\.safetensors has sha256"):
        read_batch(tree, 5)


def test_another_runs_batch_is_refused(tree: RunTree) -> None:
    publish_batch(Disk(), tree, replace(random_batch(RUN, 5, published(tree)), run=RunId("b")))
    with pytest.raises(BadBatch, match="is batch 5 of run b, expected 5 of a"):
        read_batch(tree, 5)


def test_a_token_of_no_listed_version_is_refused(tree: RunTree) -> None:
    batch = random_batch(RUN, 5, published(tree))
    wrong = replace(batch.rollouts[0], version_index=np.full_like(batch.rollouts[0].version_index, 3))
    publish_batch(Disk(), tree, replace(batch, rollouts=(wrong, *batch.rollouts[1:])))
    with pytest.raises(BadBatch, match=r"names a version that batch\.json does not list"):
        read_batch(tree, 5)


def test_version_names() -> None:
    assert VERSION.name == "a@4-abababab"
    assert parse_version_name("a@4-abababab") == (RUN, 4, "abababab")
    for name in ("a@4", "a@04-abababab", "a@4-ABABABAB", "A@4-abababab", "a@4-abababab "):
        with pytest.raises(BadRunId):
            parse_version_name(name)


def test_publishing_the_same_version_again_changes_nothing(tree: RunTree) -> None:
    publish_version(Disk(), tree, VERSION, {"x": b"1"}, {"skipped": False})
    inode = tree.broadcast(4).stat().st_ino
    publish_version(Disk(), tree, VERSION, {"x": b"1"}, {"skipped": False})
    assert tree.broadcast(4).stat().st_ino == inode


def test_another_digest_at_the_same_step_sets_the_old_folder_aside(tree: RunTree) -> None:
    publish_version(Disk(), tree, VERSION, {"x": b"1"}, {})
    other = Version(RUN, 4, "cd" * 32)
    publish_version(Disk(), tree, other, {"x": b"2"}, {})
    found = read_version(tree, 4)
    assert found is not None and found.version == other
    (old,) = tree.trash.iterdir()
    assert (old / "x").read_bytes() == b"1"


def test_a_broadcast_of_another_run_is_refused(tree: RunTree) -> None:
    publish_version(Disk(), tree, VERSION, {"x": b"1"}, {})
    path = tree.broadcast(4) / "STABLE"
    manifest = json.loads(path.read_text())
    manifest["facts"]["run"] = "b"
    path.write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match="expected step 4 of run a"):
        read_version(tree, 4)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("batch.json", lambda about: about["versions"].append(3)),
        ("batch.json", lambda about: about.update(temperature=[])),
        ("batch.json", lambda about: about.update(versions=None)),
        ("batch.json", lambda about: about["versions"][0].update(name=7, digest=None)),
    ],
)
def test_a_batch_whose_json_is_not_ours_is_a_bad_batch_whatever_it_holds(tree: RunTree, name: str, change) -> None:
    """Written with a good manifest, as a careless orchestrator would."""
    good = publish_batch(Disk(), tree, random_batch(RUN, 5, published(tree)))
    about = json.loads((tree.batch(5) / name).read_text())
    change(about)
    files = {p.name: p.read_bytes() for p in tree.batch(5).iterdir() if p.name not in ("STABLE", name)}
    Disk().quarantine(tree.batch(5), tree.trash)
    with Disk().publish_dir(tree.batch(5), "batch", {}) as staging:
        staging.write_json(name, about)
        for other, data in files.items():
            staging.write(other, data)
    try:
        found = read_batch(tree, 5)
    except BadBatch:
        return
    assert found is not None and found[1] != good and isinstance(found[0].versions[0].name, str)
