"""The trainer on a real tree of files, in this process, fed with made-up batches."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import random_adapter, random_batch

from graftwork.adapters.convert import convert_adapter
from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.source import AdapterFacts
from graftwork.config.load import dump
from graftwork.config.run import AdapterConfig, LossConfig, OptimizerConfig, RetentionConfig, RunConfig
from graftwork.config.schema import TrainerConfig
from graftwork.config.section import ModelConfig
from graftwork.errors import Busy, MisfitAdapter
from graftwork.model.base import BaseModel
from graftwork.store.disk import Disk
from graftwork.store.files import read_lines, verify
from graftwork.store.layout import OutputTree, RunId, RunTree, stable_steps
from graftwork.store.queue import Batch, publish_batch, read_version
from graftwork.store.status import Status, read_status
from graftwork.training.trainer import Trainer
from graftwork.training.worker import door_at

DISK = Disk()


class Lab:
    """A trainer over a temporary tree, and runs to feed it."""

    def __init__(self, root: Path, base: BaseModel, model: ModelConfig) -> None:
        self.outputs, self.base, self.model = OutputTree(root / "outputs"), base, model

    def trainer(self, slots: int = 1, door: Path | None = None, **settings: Any) -> Trainer:
        config = TrainerConfig(
            model=self.model, output_dir=str(self.outputs.root), slots=slots,
            init_adapter_path=None if door is None else str(door), tokens_per_micro_batch=40, **settings,
        )  # fmt: skip
        return Trainer(config, self.base, DISK, door_at(config.init_adapter_path))

    def run(self, name: str, **settings: Any) -> RunTree:
        """Write (or rewrite) the run's orch.toml."""
        tree = self.outputs.run(RunId(name))
        keep_all = RetentionConfig(checkpoints=100, history=True)
        settings = {"max_steps": 6, "checkpoint_interval_steps": 2, "retention": keep_all, **settings}
        DISK.publish_file(tree.orch_toml, dump(RunConfig(model=self.model, **settings)))
        return tree

    def feed(self, tree: RunTree, trainer: Trainer, last: int, change: Any = lambda batch: batch) -> None:
        """Batches up to `last`, each sampled from the version before it, with passes until all are consumed."""
        self.settle(trainer)
        while (step := status_of(tree).step) is not None and step < last:
            published = read_version(tree, step)
            assert published is not None
            publish_batch(DISK, tree, change(random_batch(tree.id, step + 1, published)))
            self.settle(trainer)
            if status_of(tree).step == step:
                return

    def settle(self, trainer: Trainer) -> None:
        while trainer.one_pass():
            pass


@pytest.fixture
def lab(tmp_path: Path, tiny: BaseModel, tiny_model_config: ModelConfig) -> Lab:
    return Lab(tmp_path, tiny, tiny_model_config)


def status_of(tree: RunTree) -> Status:
    status = read_status(tree)
    assert status is not None
    return status


def save_adapter(folder: Path, base: BaseModel, rank: int = 4, seed: int = 5, scale: float = 2.0) -> Path:
    adapter = random_adapter(base.spec.shapes, rank, seed=seed, scale=scale)
    with DISK.publish_dir(folder, "adapter", {}) as staging:
        for name, data in write_peft(adapter, AdapterFacts()).items():
            staging.write(name, data)
    return folder


def trainer_files(tree: RunTree, step: int) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((tree.checkpoint(step) / "trainer").iterdir())}


def test_a_fresh_run_publishes_step_0_before_any_rollout_and_then_every_step(lab: Lab) -> None:
    tree, trainer = lab.run("a"), lab.trainer()
    lab.settle(trainer)
    assert status_of(tree).state == "active" and status_of(tree).wanted_batch == 1
    assert read_version(tree, 0) is not None and read_version(tree, 1) is None
    lab.feed(tree, trainer, 6)
    assert status_of(tree).state == "finished" and not trainer.tenants
    assert stable_steps(tree.broadcasts) == [0, 1, 2, 3, 4, 5, 6]
    assert stable_steps(tree.checkpoints) == [0, 2, 4, 6]
    assert [row["step"] for row in read_lines(tree.metrics_jsonl)] == [1, 2, 3, 4, 5, 6]
    for step in (0, 6):
        published = read_version(tree, step)
        assert published is not None
        verify(published.path, "broadcast")
        assert read_peft(published.path).adapter.digest() == published.version.digest
    assert trainer.banks.training.weights.count_nonzero() == 0


def test_steps_change_the_adapter(lab: Lab) -> None:
    tree, trainer = lab.run("a"), lab.trainer()
    lab.feed(tree, trainer, 3)
    digests = {read_version(tree, step).version.digest for step in range(4)}  # type: ignore[union-attr]
    assert len(digests) == 4


def test_where_a_run_is_stopped_changes_nothing_before_or_after(lab: Lab, tmp_path: Path) -> None:
    """max_steps 4 and then 6 gives the bytes of max_steps 6, with a schedule that decays."""
    settings = {"optimizer": OptimizerConfig(schedule="cosine", decay_steps=8, warmup_steps=2)}
    whole, first = lab.run("a", **settings), lab.trainer()
    lab.feed(whole, first, 6)
    other = Lab(tmp_path / "other", lab.base, lab.model)
    tree, second = other.run("a", max_steps=4, **settings), other.trainer()
    other.feed(tree, second, 4)
    assert trainer_files(tree, 4) == trainer_files(whole, 4)
    other.run("a", max_steps=6, resume=True, **settings)
    other.feed(tree, second, 6)
    assert trainer_files(tree, 6) == trainer_files(whole, 6)


@pytest.mark.parametrize("kl", [0.0, 0.1])
@pytest.mark.parametrize("killed_at", [1, 2, 3, 5])
def test_a_killed_trainer_resumes_bit_equal(lab: Lab, tmp_path: Path, killed_at: int, kl: float) -> None:
    """The same recorded batches, with and without a stop: masters, moments, cursor and every published digest."""
    settings = {"loss": LossConfig(kl_coefficient=kl), "optimizer": OptimizerConfig(warmup_steps=3)}
    whole = lab.run("a", **settings)
    lab.feed(whole, lab.trainer(), 6)
    other = Lab(tmp_path / "other", lab.base, lab.model)
    tree = other.run("a", **settings)
    other.feed(tree, other.trainer(), killed_at)  # this trainer is dropped as a kill would drop it
    second = other.trainer()
    other.feed(tree, second, 6)
    assert trainer_files(tree, 6) == trainer_files(whole, 6)
    assert [read_version(tree, s).version for s in range(7)] == [read_version(whole, s).version for s in range(7)]  # type: ignore[union-attr]
    same = ("step", "loss", "reward", "grad_norm", "version", "batch")
    rows = [[{key: row[key] for key in same} for row in read_lines(t.metrics_jsonl)] for t in (tree, whole)]
    assert rows[0] == rows[1]


def test_a_kl_run_keeps_its_starting_adapter_and_measures_from_it(lab: Lab) -> None:
    tree, trainer = lab.run("a", loss=LossConfig(kl_coefficient=0.1)), lab.trainer()
    lab.feed(tree, trainer, 4)
    rows = read_lines(tree.metrics_jsonl)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[3]["kl"] > 1e-6
    start = read_version(tree, 0)
    assert start is not None
    assert read_peft(tree.checkpoint(4) / "reference").adapter.digest() == start.version.digest


def test_a_run_goes_on_after_its_config_asks_to_resume(lab: Lab) -> None:
    tree = lab.run("a", max_steps=4)
    trainer = lab.trainer()
    lab.feed(tree, trainer, 4)
    assert status_of(tree).state == "finished"
    lab.run("a", max_steps=6, resume=True)
    lab.feed(tree, trainer, 6)
    assert (status_of(tree).state, status_of(tree).start_step, status_of(tree).step) == ("finished", 4, 6)


def test_a_resume_from_a_named_earlier_step_moves_later_files_to_the_trash(lab: Lab) -> None:
    tree, trainer = lab.run("a"), lab.trainer()
    lab.feed(tree, trainer, 6)
    lab.run("a", resume=True, resume_step=2)
    lab.settle(trainer)
    assert stable_steps(tree.checkpoints) == [0, 2] and stable_steps(tree.broadcasts) == [0, 1, 2]
    assert stable_steps(tree.rollouts) == [1, 2]
    assert [row["step"] for row in read_lines(tree.metrics_jsonl)] == [1, 2]
    assert len(list(tree.trash.iterdir())) == 4 + 4 + 2  # broadcasts, batches, checkpoints


def test_a_trainer_restarted_under_a_named_step_keeps_the_batches_it_has_yet_to_replay(lab: Lab) -> None:
    tree = lab.run("a")
    lab.feed(tree, lab.trainer(), 4)
    lab.run("a", resume=True, resume_step=2)
    lab.feed(tree, lab.trainer(), 5)  # checkpoint 4, then batch 5; this trainer is dropped as a kill would drop it
    second = lab.trainer()
    second.one_pass()
    assert status_of(tree).start_step == 4 and stable_steps(tree.rollouts)[-1] == 5
    lab.settle(second)
    assert status_of(tree).step == 5


def test_digests_that_were_replaced_still_count_after_a_second_kill(lab: Lab) -> None:
    """Resumed with another learning rate, step 3 gets another digest; batch 4 was sampled from the old one."""
    tree = lab.run("a")
    lab.feed(tree, lab.trainer(), 3)
    old = read_version(tree, 3)
    assert old is not None
    publish_batch(DISK, tree, random_batch(tree.id, 4, old))
    for rate in (1e-3, 5e-4):
        lab.run("a", resume=True, max_steps=7, optimizer=OptimizerConfig(learning_rate=rate))
        before, trainer = read_version(tree, 3), lab.trainer()
        while read_version(tree, 3) == before:
            trainer.one_pass()  # the next pass would consume batch 4; this trainer is dropped before
    third = lab.trainer()
    lab.settle(third)
    assert (status_of(tree).state, status_of(tree).step) == ("active", 4)


def test_a_copied_folder_goes_on_under_its_own_name_when_it_asks(lab: Lab) -> None:
    tree, trainer = lab.run("a", max_steps=4), lab.trainer()
    lab.feed(tree, trainer, 4)
    copy = lab.outputs.run(RunId("b"))
    shutil.copytree(tree.root, copy.root)
    lab.settle(trainer)
    assert "did not ask to resume" in str(status_of(copy).reason)
    lab.run("b", max_steps=6, resume=True)
    lab.feed(copy, trainer, 6)
    assert (status_of(copy).state, status_of(copy).start_step, status_of(copy).step) == ("finished", 4, 6)


def test_an_evicted_run_that_asks_again_gets_all_its_tries(lab: Lab) -> None:
    tree, trainer = lab.run("a", max_skipped_steps=2), lab.trainer()
    lab.feed(tree, trainer, 6, overflow)
    assert (status_of(tree).state, stable_steps(tree.checkpoints)) == ("evicted", [0, 2])
    lab.run("a", resume=True, resume_step=2, max_skipped_steps=2)
    lab.feed(tree, trainer, 6)
    assert status_of(tree).state == "finished"


def test_a_run_whose_status_cannot_be_written_is_not_tried_again_in_every_pass(lab: Lab) -> None:
    tree = lab.run("a", resume=True)  # nothing to resume from
    trainer = lab.trainer()
    trainer.disk = NoStatus()
    lab.settle(trainer)  # would never end
    assert read_status(tree) is None
    second = lab.run("b")
    trainer.disk = DISK
    lab.settle(trainer)
    assert status_of(second).state == "active"


class NoStatus(Disk):
    def publish_file(self, path: Path, data: bytes, *, make_folder: bool = True) -> None:
        raise OSError(28, "No space left on device")


def test_a_damaged_checkpoint_fails_the_resume_and_names_the_file(lab: Lab) -> None:
    tree, trainer = lab.run("a", max_steps=4), lab.trainer()
    lab.feed(tree, trainer, 4)
    path = tree.checkpoint(4) / "trainer" / "rank_0.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    lab.run("a", max_steps=6, resume=True)
    lab.settle(trainer)
    status = status_of(tree)
    assert status.state == "failed" and "rank_0.safetensors" in str(status.reason)
    assert stable_steps(tree.broadcasts) == [0, 1, 2, 3, 4]


def test_a_checkpoint_of_another_base_is_refused(lab: Lab) -> None:
    tree, trainer = lab.run("a", max_steps=2), lab.trainer()
    lab.feed(tree, trainer, 2)
    other = replace(lab.base, fingerprint="0" * 64)
    lab.run("a", max_steps=4, resume=True)
    second = Trainer(trainer.config, other, DISK, None)
    lab.settle(second)
    assert "another base" in str(status_of(tree).reason)


def test_a_converted_adapter_starts_a_run_whose_config_names_none(lab: Lab, tmp_path: Path) -> None:
    source = save_adapter(tmp_path / "adapter", lab.base)
    tree = lab.outputs.run(RunId("a"))
    convert_adapter(DISK, source, tree.root)
    lab.run("a")
    trainer = lab.trainer()
    lab.settle(trainer)
    published = read_version(tree, 0)
    assert published is not None
    assert published.version.digest == read_peft(source).adapter.digest()
    report = json.loads((published.path / "report.json").read_text())
    assert report["source_digest"] == read_peft(source).adapter.digest()
    lab.feed(tree, trainer, 6)
    assert status_of(tree).state == "finished"


def test_the_trainers_door(lab: Lab, tmp_path: Path) -> None:
    """Slot 0 starts from the init adapter at set-up, slots 1, 10 and 11 at admission; nothing else moves."""
    source = save_adapter(tmp_path / "adapter", lab.base)
    digest = read_peft(source).adapter.digest()
    trainer = lab.trainer(slots=12, door=source)
    claim = trainer.open()
    assert trainer.banks.training.read(0).digest() == digest
    bank = trainer.banks.training
    assert bank.gradients is not None
    trees = {}
    for slot in range(12):
        tree = trees[slot] = lab.run(f"r{slot:02d}")
        bank.gradients.normal_(generator=torch.Generator().manual_seed(slot))
        others = [other for other in range(12) if other != slot]
        before = bank.weights[others].clone(), bank.gradients[others].clone(), moments(trainer)
        trainer.one_pass()
        assert status_of(tree).slot == slot
        assert torch.equal(bank.weights[others], before[0]) and torch.equal(bank.gradients[others], before[1])
        assert all(torch.equal(a, b) for a, b in zip(moments(trainer), before[2], strict=False))
        assert bank.read(slot).digest() == digest
        bank.gradients.zero_()
        if slot < 11:
            lab.feed(tree, trainer, 1)  # so that every slot has weights and moments of its own
    for slot in (0, 1, 10, 11):
        published = read_version(trees[slot], 0)
        assert published is not None and published.version.digest == digest
    claim.release()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def moments(trainer: Trainer) -> list[torch.Tensor]:
    kept = [tenant.learner.optimizer.moments for _, tenant in sorted(trainer.tenants.items())]
    return [tensor.clone() for pair in kept if pair for tensor in pair]


def test_a_step_0_converted_without_sight_of_the_slots_is_brought_to_them(
    lab: Lab, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Attention alone, rank 2, into slots of everything at rank 4 and alpha 12: logged, and published; the folder
    stays as it is, and a trainer that starts from it again starts from the same."""
    attention = {path: shape for path, shape in lab.base.spec.shapes.items() if "self_attn" in path}
    source = save_adapter(
        tmp_path / "adapter", replace(lab.base, spec=replace(lab.base.spec, shapes=attention)), rank=2
    )
    tree = lab.outputs.run(RunId("a"))
    convert_adapter(DISK, source, tree.root)
    lab.run("a", adapter=AdapterConfig(rank=4, alpha=12.0))
    before = contents(tree.checkpoint(0))
    with caplog.at_level("INFO"):
        lab.feed(tree, lab.trainer(), 1)
    assert "8 modules padded" in caplog.text and contents(tree.checkpoint(0)) == before
    published = read_version(tree, 0)
    assert published is not None
    brought = read_peft(published.path).adapter
    assert brought.pairs.keys() == lab.base.spec.shapes.keys()
    assert {(pair.rank, pair.scale) for pair in brought.pairs.values()} == {(4, 3.0)}
    lab.settle(lab.trainer())  # from step_0 again, and batch 1 again
    assert read_version(tree, 0) == published and status_of(tree).step == 1
    lab.feed(tree, lab.trainer(), 2)
    caplog.clear()
    lab.settle(lab.trainer())
    assert "padded" not in caplog.text and status_of(tree).step == 2


def test_a_trainers_own_step_0_is_not_changed_by_another_wish(lab: Lab) -> None:
    tree = lab.run("a", adapter=AdapterConfig(rank=2))
    lab.settle(lab.trainer())
    before = trainer_files(tree, 0)
    lab.run("a", adapter=AdapterConfig(rank=4))
    lab.settle(lab.trainer())
    assert status_of(tree).state == "failed" and "adapter.rank is 4" in str(status_of(tree).reason)
    assert trainer_files(tree, 0) == before


def test_a_door_that_does_not_fit_ends_the_trainer_at_set_up(lab: Lab, tmp_path: Path) -> None:
    other = replace(lab.base.spec, shapes={"model.layers.9.self_attn.q_proj": (64, 32)})
    source = save_adapter(tmp_path / "adapter", replace(lab.base, spec=other))
    with pytest.raises(MisfitAdapter, match=r"1 module of the adapter that the slots do not have: model\.layers\.9"):
        lab.trainer(door=source).open()


def test_a_second_trainer_is_refused(lab: Lab) -> None:
    claim = lab.trainer().open()
    with pytest.raises(Busy, match="in use by a trainer"):
        lab.trainer().open()
    claim.release()


def test_a_rank_below_the_slots_stays_so_through_training(lab: Lab) -> None:
    tree, trainer = lab.run("a", adapter=AdapterConfig(rank=2, alpha=3.0)), lab.trainer()
    lab.feed(tree, trainer, 6)
    final = read_version(tree, 6)
    assert final is not None
    pairs = read_peft(final.path).adapter.pairs.values()
    assert {pair.rank for pair in pairs} == {2} and {pair.scale for pair in pairs} == {1.5}
    assert all(pair.b.count_nonzero() for pair in pairs)


def spoil(field: str, value: Any) -> Any:
    def change(batch: Batch) -> Batch:
        if batch.step < 3:
            return batch
        if field in ("temperature", "versions"):
            return replace(batch, **{field: value(batch) if callable(value) else value})
        first = batch.rollouts[0]
        wrong = value(getattr(first, field)) if callable(value) else value
        return replace(batch, rollouts=(replace(first, **{field: wrong}), *batch.rollouts[1:]))

    return change


def overflow(batch: Batch) -> Batch:
    """Finite advantages whose gradients are not."""
    return replace(batch, rollouts=tuple(replace(rollout, advantage=3e38) for rollout in batch.rollouts))


def _set(index: int, value: float) -> Any:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[index] = value
        return array

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoil("advantage", float("nan")), "must be finite"),
        (spoil("advantage", float("inf")), "must be finite"),
        (spoil("logprobs", _set(-1, float("nan"))), "not finite or above 0"),
        (spoil("logprobs", _set(-1, 2.0)), "not finite or above 0"),
        (spoil("token_ids", _set(0, -1)), "token id -1"),
        (spoil("token_ids", _set(0, 64)), "token id 64, the vocabulary has 0 to 63"),
        (spoil("loss_mask", _set(0, True)), "names a version that batch.json does not list"),
        (spoil("temperature", 0.5), "sampled at temperature 0.5, the run's is 1.0"),
        (spoil("versions", lambda b: (replace(b.versions[0], digest="f" * 64),)), "is not one of this run's"),
        (
            spoil("versions", lambda b: (replace(b.versions[0], name="b@0-00000000", digest="0" * 64),)),
            "not one of this run's",
        ),
        (
            spoil("versions", lambda b: (replace(b.versions[0], name="a@2-00000000", digest="0" * 64),)),
            "never published",
        ),
    ],
)
def test_a_bad_batch_ends_its_run_and_no_other(lab: Lab, change: Any, reason: str) -> None:
    bad, good = lab.run("a"), lab.run("b")
    trainer = lab.trainer(slots=2)
    lab.feed(bad, trainer, 6, change)
    assert status_of(bad).state == "failed" and reason in str(status_of(bad).reason)
    assert status_of(bad).step == 2 and stable_steps(bad.checkpoints) == [0, 2]
    lab.feed(good, trainer, 6)
    assert status_of(good).state == "finished"


def test_a_stale_batch_is_set_aside_and_another_is_awaited(lab: Lab) -> None:
    tree, trainer = lab.run("a", max_staleness_steps=1), lab.trainer()
    lab.feed(tree, trainer, 3)
    old = read_version(tree, 0)
    assert old is not None
    publish_batch(DISK, tree, random_batch(tree.id, 4, old))
    lab.settle(trainer)
    status = status_of(tree)
    assert status.state == "active" and status.wanted_batch == 4 and "oldest allowed is 2" in str(status.reason)
    assert not tree.batch(4).exists()
    lab.feed(tree, trainer, 6)
    assert status_of(tree).state == "finished"


def test_a_gradient_that_is_not_finite_skips_steps_and_then_evicts(lab: Lab) -> None:
    tree, trainer = lab.run("a", max_skipped_steps=2), lab.trainer()
    lab.feed(tree, trainer, 1)
    lab.feed(tree, trainer, 6, overflow)
    assert status_of(tree).state == "evicted" and "2 steps in a row" in str(status_of(tree).reason)
    versions = [read_version(tree, step) for step in range(4)]
    assert versions[1].version.digest == versions[3].version.digest  # type: ignore[union-attr]
    assert [v.facts["skipped"] for v in versions if v] == [False, False, True, True]


def test_a_sampler_that_is_another_model_evicts_where_a_limit_is_set(lab: Lab) -> None:
    """Made-up log-probs are far from the trainer's. The step is taken, recorded and checkpointed; no other follows."""
    tree, free, trainer = lab.run("a", max_mismatch=0.5), lab.run("b"), lab.trainer(slots=2)
    lab.feed(tree, trainer, 6)
    lab.feed(free, trainer, 6)
    [row] = read_lines(tree.metrics_jsonl)
    assert row["mismatch_mean"] > 0.5 and stable_steps(tree.checkpoints) == [0, 1]
    assert status_of(tree).state == "evicted" and "max_mismatch is 0.5" in str(status_of(tree).reason)
    assert status_of(free).state == "finished"
    assert row["equal_groups"] == 0


def test_fed_the_same_batches_a_run_is_bit_equal_alone_and_beside_others(lab: Lab, tmp_path: Path) -> None:
    alone = Lab(tmp_path / "alone", lab.base, lab.model)
    tree = alone.run("b", seed=3)
    alone.feed(tree, alone.trainer(), 6)
    beside = lab.trainer(slots=3)
    trees = [lab.run("a", seed=1), lab.run("b", seed=3), lab.run("c", seed=2)]
    lab.settle(beside)
    for step in range(6):
        for other in trees:
            published = read_version(other, step)
            assert published is not None
            batch = random_batch(other.id, step + 1, published)
            publish_batch(DISK, other, overflow(batch) if other.id == RunId("c") else batch)
        for _ in range(20):
            beside.one_pass()
        trees = [other for other in trees if status_of(other).state != "evicted"]
    assert [str(other.id) for other in trees] == ["a", "b"]
    assert trainer_files(trees[1], 6) == trainer_files(tree, 6)


def test_a_folder_that_vanishes_frees_its_slot(lab: Lab) -> None:
    tree, trainer = lab.run("a"), lab.trainer()
    lab.settle(trainer)
    DISK.quarantine(tree.root, lab.outputs.root / "gone")
    second = lab.run("b")
    lab.settle(trainer)
    assert status_of(second).state == "active" and not tree.root.exists()


def test_a_folder_with_a_bad_name_is_left_alone(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    (lab.outputs.root / "run_Bad.Name" / "control").mkdir(parents=True)
    trainer = lab.trainer()
    lab.settle(trainer)
    assert "run_Bad.Name" in caplog.text and "is not a run id" in caplog.text
    assert [p.name for p in (lab.outputs.root / "run_Bad.Name").iterdir()] == ["control"]
