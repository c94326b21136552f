"""Runs that come and go on one trainer, in this process: stop, resume, retention, settings of their own, admission."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import random_batch
from test_trainer import DISK, Lab, save_adapter, status_of, trainer_files

from graftwork.adapters.convert import convert_adapter
from graftwork.adapters.formats.peft_read import read_peft
from graftwork.config.run import AdapterConfig, LossConfig, OptimizerConfig, RetentionConfig
from graftwork.config.section import ModelConfig
from graftwork.model.base import BaseModel
from graftwork.store.chain import read_chain
from graftwork.store.disk import Disk
from graftwork.store.files import read_json, read_lines
from graftwork.store.layout import stable_steps
from graftwork.store.queue import publish_batch, read_version
from graftwork.training.trainer import Trainer


@pytest.fixture
def lab(tmp_path: Path, tiny: BaseModel, tiny_model_config: ModelConfig) -> Lab:
    return Lab(tmp_path, tiny, tiny_model_config)


# --- stop and resume --------------------------------------------------------------------------------------------------


def test_a_stopped_run_is_checkpointed_and_goes_on_bit_equal(lab: Lab, tmp_path: Path) -> None:
    whole = Lab(tmp_path / "whole", lab.base, lab.model)
    reference = whole.run("a")
    whole.feed(reference, whole.trainer(), 6)

    tree, trainer = lab.run("a"), lab.trainer()
    lab.feed(tree, trainer, 3)
    lab.run("a", stop=True)
    trainer.one_pass()
    status = status_of(tree)
    assert (status.state, status.step, status.reason, status.slot) == ("stopped", 3, None, None)
    assert not trainer.tenants and trainer.banks.training.weights.count_nonzero() == 0
    assert stable_steps(tree.checkpoints) == [0, 2, 3]
    assert not trainer.one_pass()  # the wish is carried out once

    lab.run("a", resume=True)
    lab.feed(tree, trainer, 6)
    assert status_of(tree).state == "finished" and status_of(tree).start_step == 3
    assert trainer_files(tree, 6) == trainer_files(reference, 6)


def test_a_stop_in_the_middle_of_a_batch_keeps_the_batch_for_the_resume(lab: Lab) -> None:
    tree, trainer = lab.run("a"), lab.trainer()
    lab.feed(tree, trainer, 1)
    published = read_version(tree, 1)
    assert published is not None
    publish_batch(DISK, tree, random_batch(tree.id, 2, published))
    assert trainer.tenants[tree.id].head() is not None  # the batch is taken, nothing of it is learnt yet
    lab.run("a", stop=True)
    trainer.one_pass()
    assert (status_of(tree).state, status_of(tree).step) == ("stopped", 1)
    lab.run("a", resume=True)
    lab.settle(trainer)
    assert (status_of(tree).state, status_of(tree).step) == ("active", 2)


def test_a_queued_run_that_is_stopped_leaves_the_line(lab: Lab) -> None:
    first, second, third = (lab.run(name) for name in "abc")
    trainer = lab.trainer()
    lab.settle(trainer)
    assert [status_of(tree).place for tree in (first, second, third)] == [None, 1, 2]
    lab.run("b", stop=True)
    lab.settle(trainer)
    assert status_of(second).state == "stopped" and status_of(third).place == 1


def test_the_wish_to_stop_reaches_a_trainer_that_was_down(lab: Lab) -> None:
    tree = lab.run("a")
    lab.feed(tree, lab.trainer(), 3)
    lab.run("a", stop=True)
    trainer = lab.trainer()  # another one: the first was killed
    lab.settle(trainer)
    assert (status_of(tree).state, status_of(tree).step) == ("stopped", 2)  # the newest checkpoint
    lab.run("a", resume=True)
    lab.settle(trainer)
    assert status_of(tree).step == 3  # batch 3 was kept, and is consumed again


def test_an_evicted_run_gets_all_its_tries_when_it_is_resumed(lab: Lab) -> None:
    def spoil(batch: Any) -> Any:
        return replace(batch, rollouts=tuple(replace(r, advantage=1e38) for r in batch.rollouts))

    tree, trainer = lab.run("a", max_skipped_steps=2), lab.trainer()
    lab.feed(tree, trainer, 1)
    lab.feed(tree, trainer, 3, spoil)
    assert status_of(tree).state == "evicted" and "not finite" in str(status_of(tree).reason)
    assert status_of(tree).step == 3 and stable_steps(tree.checkpoints) == [0, 2, 3]
    lab.run("a", max_skipped_steps=2, resume=True)
    lab.feed(tree, trainer, 6)
    assert status_of(tree).state == "finished"
    assert [row["skipped"] for row in read_lines(tree.metrics_jsonl)] == [False, True, True, False, False, False]


def test_a_bad_batch_is_set_aside_so_that_a_resume_gets_another(lab: Lab) -> None:
    tree, trainer = lab.run("a"), lab.trainer()
    lab.feed(tree, trainer, 2)
    (tree.batch(3)).mkdir(parents=True)
    (tree.batch(3) / "STABLE").write_text("{}")
    lab.settle(trainer)
    assert status_of(tree).state == "failed" and not tree.batch(3).exists()
    lab.run("a", resume=True)
    lab.feed(tree, trainer, 6)
    assert status_of(tree).state == "finished"


# --- what a folder can do to its run ----------------------------------------------------------------------------------


def test_a_config_that_stays_unreadable_evicts_the_run_with_a_checkpoint(lab: Lab) -> None:
    tree, trainer = lab.run("a"), lab.trainer()
    lab.feed(tree, trainer, 1)
    good = tree.orch_toml.read_bytes()
    tree.orch_toml.write_bytes(b"seed = ")
    trainer.one_pass()
    assert tree.id in trainer.tenants  # it may be half-written
    trainer.one_pass()
    status = status_of(tree)
    assert status.state == "evicted" and "is not TOML" in str(status.reason) and not trainer.tenants
    assert stable_steps(tree.checkpoints) == [0, 1]
    tree.orch_toml.write_bytes(good)  # mended, but nobody asked to go on
    lab.settle(trainer)
    assert status_of(tree).state == "evicted"
    lab.run("a", resume=True)
    lab.feed(tree, trainer, 6)
    assert status_of(tree).state == "finished"


def test_a_config_that_is_being_saved_ends_nothing(lab: Lab) -> None:
    tree, trainer = lab.run("a"), lab.trainer()
    lab.feed(tree, trainer, 1)
    good = tree.orch_toml.read_bytes()
    for _ in range(3):
        tree.orch_toml.write_bytes(good[:10])
        trainer.one_pass()
        tree.orch_toml.write_bytes(good)
        trainer.one_pass()
    assert status_of(tree).state == "active" and tree.id in trainer.tenants


def test_a_folder_that_is_being_deleted_is_not_written_to(lab: Lab) -> None:
    tree, trainer = lab.run("a"), lab.trainer()
    lab.feed(tree, trainer, 1)
    shutil.rmtree(tree.root / "control")
    before = sorted(tree.root.rglob("*"))
    for _ in range(3):
        trainer.one_pass()
    assert not trainer.tenants and sorted(tree.root.rglob("*")) == before


def test_no_batch_for_an_hour_evicts(lab: Lab) -> None:
    now = [0.0]
    tree = lab.run("a")
    trainer = Trainer(lab.trainer().config, lab.base, DISK, None, clock=lambda: now[0])
    lab.feed(tree, trainer, 1)
    now[0] = 3599.0
    trainer.one_pass()
    assert status_of(tree).state == "active"
    now[0] = 3601.0
    trainer.one_pass()
    assert status_of(tree).state == "evicted" and "no batch 2 for 3600 seconds" in str(status_of(tree).reason)


def test_a_bug_in_one_runs_turn_ends_that_run_alone(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Disk):
        def append(self, path: Path, data: bytes) -> None:
            if path == bad.metrics_jsonl:
                raise ZeroDivisionError("a bug of ours")
            super().append(path, data)

    good, bad = lab.run("good"), lab.run("bad")
    trainer = Trainer(lab.trainer(slots=2).config, lab.base, Broken(), None)
    lab.feed(bad, trainer, 1)
    assert status_of(bad).state == "failed" and "ZeroDivisionError: a bug of ours" in str(status_of(bad).reason)
    assert "Traceback" in caplog.text
    lab.feed(good, trainer, 6)
    assert status_of(good).state == "finished"


# --- settings of their own --------------------------------------------------------------------------------------------


def test_a_run_may_train_fewer_modules_and_its_files_hold_no_others(lab: Lab) -> None:
    some = lab.run("some", adapter=AdapterConfig(rank=2, alpha=3.0, target_modules=("q_proj", "v_proj")))
    every, trainer = lab.run("every"), lab.trainer(slots=2)
    lab.feed(some, trainer, 6)
    lab.feed(every, trainer, 6)
    expected = {path for path in lab.base.spec.shapes if path.endswith(("q_proj", "v_proj"))}
    for folder in (some.broadcast(6), some.checkpoint(6) / "weight"):
        adapter = read_peft(folder).adapter
        assert adapter.pairs.keys() == expected
        config = read_json(folder / "adapter_config.json", "adapter")
        assert (config["r"], config["lora_alpha"]) == (2, 3.0)
        assert {pair.rank for pair in adapter.pairs.values()} == {2} and next(iter(adapter.pairs.values())).scale == 1.5
        assert all(bool(pair.b.any()) for pair in adapter.pairs.values())
    assert read_peft(every.broadcast(6)).adapter.pairs.keys() == lab.base.spec.shapes.keys()


def test_modules_that_a_run_does_not_train_stay_zero_in_its_slot(lab: Lab) -> None:
    tree = lab.run(
        "a", adapter=AdapterConfig(target_modules=("down_proj",)), optimizer=OptimizerConfig(weight_decay=0.1)
    )
    trainer = lab.trainer()
    lab.feed(tree, trainer, 3)
    slot = trainer.tenants[tree.id].learner.slot
    bank = trainer.banks.training
    for path, factors in bank.factors.items():
        assert bool(factors.b[slot].any()) == path.endswith("down_proj")
        assert bool(factors.a[slot].any()) == path.endswith("down_proj")


def test_a_module_that_the_trainer_has_not_fails_the_run_by_name(lab: Lab) -> None:
    tree, trainer = lab.run("a", adapter=AdapterConfig(target_modules=("q_proj", "lm_head"))), lab.trainer()
    lab.settle(trainer)
    assert status_of(tree).state == "failed" and "lm_head, which the slots do not have" in str(status_of(tree).reason)


def test_a_resume_with_other_modules_is_refused(lab: Lab) -> None:
    tree, trainer = lab.run("a", adapter=AdapterConfig(target_modules=("q_proj",))), lab.trainer()
    lab.feed(tree, trainer, 2)
    for targets in (None, ("q_proj", "k_proj"), ("k_proj",)):
        lab.run("a", resume=True, adapter=AdapterConfig(target_modules=targets))
        lab.settle(trainer)
        assert status_of(tree).state == "failed" and "target_modules" in str(status_of(tree).reason)


def test_runs_of_different_kinds_share_a_trainer_and_each_is_as_if_alone(lab: Lab, tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "slow": {"optimizer": OptimizerConfig(learning_rate=1e-4, schedule="linear", decay_steps=9, beta2=0.99)},
        "kl": {"loss": LossConfig(kl_coefficient=0.1), "adapter": AdapterConfig(rank=3, alpha=1.0)},
        "few": {"adapter": AdapterConfig(rank=1, target_modules=("o_proj", "up_proj")),
                "loss": LossConfig(normaliser="sequence_mean", ratio="mask")},
    }  # fmt: skip
    together = lab.trainer(slots=4)
    trees = {name: lab.run(name, **settings) for name, settings in kinds.items()}
    lab.settle(together)
    for step in range(1, 7):  # in step, so that each pass holds work of all
        for tree in trees.values():
            published = read_version(tree, step - 1)
            assert published is not None
            publish_batch(DISK, tree, random_batch(tree.id, step, published))
        lab.settle(together)
    for name, settings in kinds.items():
        alone = Lab(tmp_path / name, lab.base, lab.model)
        tree = alone.run(name, **settings)
        alone.feed(tree, alone.trainer(), 6)
        assert trainer_files(tree, 6) == trainer_files(trees[name], 6)
        assert [link.digest for link in read_chain(tree)] == [link.digest for link in read_chain(trees[name])]


# --- admission --------------------------------------------------------------------------------------------------------


def test_a_warm_started_run_is_admitted_in_one_pass_beside_a_run_that_trains(lab: Lab, tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "adapter", lab.base, rank=2)
    old, trainer = lab.run("old"), lab.trainer(slots=2)
    lab.feed(old, trainer, 2)
    new = lab.run("new", init_adapter_path=str(source))
    trainer.one_pass()
    assert status_of(new).state == "queued"  # its orchestrator has not converted the adapter yet
    convert_adapter(DISK, source, new.root)
    trainer.one_pass()
    published = read_version(new, 0)
    assert published is not None and published.version.digest == read_peft(source).adapter.digest()
    assert status_of(new).state == "active" and status_of(old).state == "active"


def test_a_freed_slot_goes_to_the_first_in_line_in_the_next_pass(lab: Lab) -> None:
    trees, trainer = [lab.run(name) for name in "cab"], lab.trainer()
    lab.settle(trainer)
    assert [status_of(lab.run(name)).state for name in "abc"] == ["active", "queued", "queued"]
    shutil.rmtree(trees[1].root)  # a
    trainer.one_pass()
    assert not trainer.tenants
    trainer.one_pass()
    assert [status_of(lab.run(name)).state for name in "bc"] == ["active", "queued"]
    assert read_json(lab.outputs.liveness_json, "liveness")["pid"] > 0


# --- retention --------------------------------------------------------------------------------------------------------


def test_disk_use_is_bounded_and_a_killed_trainer_still_resumes_bit_equal(lab: Lab, tmp_path: Path) -> None:
    settings = {
        "max_steps": 30, "checkpoint_interval_steps": 5, "max_staleness_steps": 2,
        "retention": RetentionConfig(checkpoints=2),
    }  # fmt: skip
    whole = Lab(tmp_path / "whole", lab.base, lab.model)
    reference = whole.run("a", **{**settings, "retention": RetentionConfig(checkpoints=99, history=True)})
    whole.feed(reference, whole.trainer(), 30)
    tree, trainer = lab.run("a", **settings), lab.trainer()
    for step in (7, 14, 23, 30):
        lab.feed(tree, trainer, step)
        assert len(stable_steps(tree.checkpoints)) <= 2
        assert len(stable_steps(tree.rollouts)) <= 5
        assert len(stable_steps(tree.broadcasts)) <= 5 + 2 + 1
        assert not list(tree.trash.iterdir())
        trainer = lab.trainer()  # the other one was killed
    assert stable_steps(tree.checkpoints) == [25, 30]
    assert trainer_files(tree, 30) == trainer_files(reference, 30)
    assert [link.digest for link in read_chain(tree)] == [link.digest for link in read_chain(reference)]


def test_what_was_being_retired_when_the_trainer_was_killed_is_gone_after_the_next_start(lab: Lab) -> None:
    tree = lab.run("a")
    lab.feed(tree, lab.trainer(), 2)
    DISK.quarantine(tree.broadcast(0), tree.trash, "retired-")
    DISK.quarantine(tree.broadcast(1), tree.trash)  # set aside: a person's
    lab.settle(lab.trainer())
    assert [path.name.split("-")[0] for path in tree.trash.iterdir()] == ["step_1"]


# --- folders that are not what they seem ------------------------------------------------------------------------------


def test_a_folder_made_again_under_the_same_name_is_another_run(lab: Lab) -> None:
    tree, trainer = lab.run("a"), lab.trainer()
    lab.feed(tree, trainer, 1)
    tree.root.rename(tree.root.with_name("kept"))  # so that its inode cannot be given away again
    lab.run("a")
    lab.settle(trainer)
    assert status_of(tree).state == "active" and (status_of(tree).step, status_of(tree).start_step) == (0, 0)
    lab.feed(tree, trainer, 6)
    assert status_of(tree).state == "finished"


def test_a_run_whose_folder_is_a_link_is_left_alone(lab: Lab) -> None:
    tree, trainer = lab.run("a"), lab.trainer(slots=2)
    (lab.outputs.root / "run_b").symlink_to(tree.root)
    lab.feed(tree, trainer, 6)
    assert status_of(tree).state == "finished" and len(trainer.outputs.scan()[1]) == 1


def test_a_run_with_a_linked_folder_is_refused_before_anything_is_written(lab: Lab) -> None:
    good, trainer = lab.run("a"), lab.trainer(slots=2)
    lab.feed(good, trainer, 2)
    bad = lab.run("b", stop=True)
    (bad.root / "checkpoints").symlink_to(good.checkpoints)
    before = sorted(good.root.rglob("*"))
    lab.run("b", resume=True)
    lab.settle(trainer)
    assert status_of(bad).state == "failed" and "is a symbolic link" in str(status_of(bad).reason)
    assert sorted(good.root.rglob("*")) == before


def test_a_batch_that_is_there_counts_however_long_a_pass_took(lab: Lab) -> None:
    now = [0.0]
    tree = lab.run("a")
    trainer = Trainer(lab.trainer().config, lab.base, DISK, None, clock=lambda: now[0])
    lab.feed(tree, trainer, 1)
    published = read_version(tree, 1)
    assert published is not None
    publish_batch(DISK, tree, random_batch(tree.id, 2, published))
    now[0] = 10_000.0
    lab.settle(trainer)
    assert (status_of(tree).state, status_of(tree).step) == ("active", 2)
