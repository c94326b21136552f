"""`verify_run` on folders that a trainer left, whole, in the middle of a write, and forged."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import random_batch
from test_trainer import DISK, Lab, overflow, status_of

from graftwork.config.run import LossConfig, OptimizerConfig, RetentionConfig
from graftwork.config.section import ModelConfig
from graftwork.model.base import BaseModel
from graftwork.programs import verify
from graftwork.programs.verify import Report, verify_run
from graftwork.store.chain import read_chain
from graftwork.store.disk import Disk
from graftwork.store.files import Content
from graftwork.store.layout import RunId, RunTree, stable_steps
from graftwork.store.queue import Batch, publish_batch, read_version
from proofs.forgeries import FORGERIES, OF_KL_RUNS, Forgery, remake

HISTORY = {"loss": LossConfig(kl_coefficient=0.1), "retention": RetentionConfig(history=True)}
SHORT = {
    "retention": RetentionConfig(checkpoints=2), "max_staleness_steps": 2, "checkpoint_interval_steps": 3,
    "max_steps": 20,
}  # fmt: skip


def skipping(batch: Batch) -> Batch:
    """Step 3 has no finite gradient."""
    return overflow(batch) if batch.step == 3 else batch


@pytest.fixture
def lab(tmp_path: Path, tiny: BaseModel, tiny_model_config: ModelConfig) -> Lab:
    return Lab(tmp_path, tiny, tiny_model_config)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, tiny: BaseModel, tiny_model_config: ModelConfig) -> Lab:
    """Runs that nobody touches: a and b finished at step 6 with all their history, c and d are at step 8 of 20."""
    lab = Lab(tmp_path_factory.mktemp("good"), tiny, tiny_model_config)
    trainer = lab.trainer()
    for name in ("a", "b"):
        lab.feed(lab.run(name, seed=ord(name), **HISTORY), trainer, 6, skipping)
    for name in ("c", "d"):
        tree, trainer = lab.run(name, seed=ord(name), **SHORT), lab.trainer()
        lab.feed(tree, trainer, 8, skipping)
        trainer.tenants.clear()
        tree.orch_toml.rename(tree.root / "orch.toml")  # so that the next trainer leaves it alone
    for name in ("c", "d"):
        tree = lab.outputs.run(RunId(name))
        (tree.root / "orch.toml").rename(tree.orch_toml)
    return lab


def copy_of(lab: Lab, name: str, folder: Path) -> RunTree:
    source = lab.outputs.run(RunId(name))
    shutil.copytree(source.root, folder / source.root.name)
    return RunTree.at(folder / source.root.name)


def contents(root: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in sorted(root.rglob("*"))}


def holds(tree: RunTree) -> Report:
    report = verify_run(tree)
    assert report.findings == []
    return report


# --- good runs --------------------------------------------------------------------------------------------------------


def test_a_run_with_all_its_history_holds_and_nothing_is_written(good: Lab) -> None:
    tree = good.outputs.run(RunId("a"))
    assert [link.skipped for link in read_chain(tree)] == [False, False, False, True, False, False, False]
    before = contents(tree.root)
    assert holds(tree).checked == {
        "links": 7, "batches": 6, "pending": 0, "broadcasts": 7, "checkpoints": 4, "versions": 6, "unknown_versions": 0,
    }  # fmt: skip
    assert contents(tree.root) == before


def test_a_run_with_default_retention_holds(good: Lab) -> None:
    tree = good.outputs.run(RunId("c"))
    assert status_of(tree).state == "active" and stable_steps(tree.rollouts) == [7, 8]
    assert holds(tree).checked == {
        "links": 9, "batches": 2, "pending": 0, "broadcasts": 3, "checkpoints": 2, "versions": 2, "unknown_versions": 0,
    }  # fmt: skip


class Watched(Disk):
    """Before each change on the disk, verifies the run as a kill at this moment would leave it."""

    def __init__(self, tree: RunTree) -> None:
        self.tree, self.moments = tree, 0
        self.findings: list[str] = []

    def look(self) -> None:
        self.moments += 1
        self.findings += verify_run(self.tree).findings

    def write(self, path: Path, data: Content) -> None:
        self.look()
        super().write(path, data)

    def append(self, path: Path, data: bytes) -> None:
        self.look()
        super().append(path, data)

    def rename(self, source: Path, target: Path) -> None:
        self.look()
        super().rename(source, target)

    def remove_tree(self, path: Path) -> None:
        self.look()
        super().remove_tree(path)


def test_a_run_holds_at_every_moment_at_which_it_may_be_killed(lab: Lab) -> None:
    """Admission, steps, checkpoints, retention, the end; a resume that replays, one after a bad batch, one that goes
    back. Each trainer is dropped as a kill would drop it."""
    settings = {**SHORT, "max_staleness_steps": 1, "max_steps": 7}
    tree = lab.run("a", **settings)
    disk = Watched(tree)

    def goes_on(last: int, change: Any = lambda batch: batch) -> None:
        trainer = lab.trainer()
        trainer.disk = disk
        lab.feed(tree, trainer, last, change)

    goes_on(5)
    goes_on(6, lambda batch: replace(batch, temperature=0.5))
    assert (status_of(tree).state, status_of(tree).step) == ("failed", 5)
    lab.run("a", **settings, resume=True)
    goes_on(7)
    assert (status_of(tree).state, stable_steps(tree.checkpoints)) == ("finished", [6, 7])
    lab.run("a", **settings, resume=True, resume_step=6)
    goes_on(7)
    assert (status_of(tree).state, status_of(tree).start_step) == ("finished", 6)
    assert disk.findings == [] and disk.moments > 150


def test_a_run_that_moves_while_we_look_holds(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the chain and the rest, a step is taken, and its batch is gone with a checkpoint."""
    tree, trainer = lab.run("a", **{**SHORT, "checkpoint_interval_steps": 1}), lab.trainer()
    lab.feed(tree, trainer, 3)

    def slowly(tree: RunTree) -> Any:
        links = read_chain(tree)
        lab.feed(tree, trainer, len(links))
        return links

    monkeypatch.setattr(verify, "read_chain", slowly)
    holds(tree)
    assert status_of(tree).step == 5  # it was looked at twice
    (tree.broadcast(5) / "adapter_model.safetensors").write_bytes(b"")
    assert any("step_5/adapter_model" in finding for finding in verify_run(tree).findings)


def test_the_ends_that_a_run_can_come_to_hold(lab: Lab) -> None:
    evicted, failed, trainer = lab.run("a", **SHORT), lab.run("b", **SHORT), lab.trainer(slots=2)
    lab.feed(evicted, trainer, 4)
    lab.feed(evicted, trainer, 20, overflow)
    assert status_of(evicted).state == "evicted"
    lab.feed(failed, trainer, 4)
    lab.feed(failed, trainer, 5, lambda batch: replace(batch, temperature=0.5))
    assert status_of(failed).state == "failed"
    stopped = lab.run("c", **SHORT)
    lab.feed(stopped, trainer, 4)
    lab.run("c", **SHORT, stop=True)
    lab.settle(trainer)
    assert status_of(stopped).state == "stopped" and stable_steps(stopped.checkpoints)[-1] == 4
    killed = lab.run("d", **SHORT)
    lab.feed(killed, trainer, 5)
    lab.run("d", **SHORT, stop=True)
    lab.settle(lab.trainer())  # it never held a slot of this trainer
    assert (status_of(killed).state, status_of(killed).step) == ("stopped", 3)
    for tree in (evicted, failed, stopped, killed):
        assert holds(tree).checked["links"] > 4


def test_a_run_that_was_never_admitted_holds(lab: Lab) -> None:
    lab.run("a")
    tree, trainer = lab.run("b"), lab.trainer()
    lab.settle(trainer)
    assert status_of(tree).state == "queued"
    assert holds(tree).checked["links"] == 0
    assert "is no folder" in verify_run(lab.outputs.run(RunId("c"))).findings[0]


def test_resumes_hold(lab: Lab) -> None:
    """From the newest checkpoint, from an earlier one, and with other arithmetic, under which old batches count."""
    tree = lab.run("a", max_steps=8)
    lab.feed(tree, lab.trainer(), 5)
    old = read_version(tree, 5)
    assert old is not None
    publish_batch(DISK, tree, random_batch(tree.id, 6, old))
    lab.run("a", resume=True, max_steps=8, optimizer=OptimizerConfig(learning_rate=1e-3))
    lab.feed(tree, lab.trainer(), 7)
    now = read_version(tree, 5)
    assert now is not None and now.replaces == (old.version.digest,)
    assert holds(tree).checked["batches"] == 7
    lab.run("a", resume=True, resume_step=2, max_steps=8)
    lab.feed(tree, lab.trainer(), 4)
    assert holds(tree).checked["links"] == 5


def test_a_copied_folder_holds_once_it_is_admitted_under_its_own_name(lab: Lab) -> None:
    trainer = lab.trainer()
    lab.feed(lab.run("a", max_steps=4), trainer, 4)
    copy = copy_of(lab, "a", lab.outputs.root / "aside").root.rename(lab.outputs.run(RunId("b")).root)
    lab.run("b", max_steps=6, resume=True)
    lab.feed(RunTree.at(copy), trainer, 6)
    assert holds(RunTree.at(copy)).checked == {
        "links": 3, "batches": 2, "pending": 0, "broadcasts": 3, "checkpoints": 4, "versions": 2, "unknown_versions": 0,
    }  # fmt: skip


def test_a_mixtures_run_holds(tmp_path: Path, moe: BaseModel, moe_model_config: ModelConfig) -> None:
    lab = Lab(tmp_path, moe, moe_model_config)
    tree = lab.run("a", max_steps=2)
    lab.feed(tree, lab.trainer(), 2)
    assert holds(tree).checked["broadcasts"] == 3


# --- forged runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("forgery", [*FORGERIES, *OF_KL_RUNS], ids=lambda forgery: forgery.name)
def test_forgeries_of_a_run_with_all_its_history_are_found(good: Lab, tmp_path: Path, forgery: Forgery) -> None:
    tree = copy_of(good, "a", tmp_path)
    named = forgery.plant(tree, good.outputs.run(RunId("b")))
    findings = verify_run(tree).findings
    assert any(str(named) in finding for finding in findings), findings


@pytest.mark.parametrize("forgery", FORGERIES, ids=lambda forgery: forgery.name)
def test_forgeries_of_a_run_with_default_retention_are_found(good: Lab, tmp_path: Path, forgery: Forgery) -> None:
    tree = copy_of(good, "c", tmp_path)
    named = forgery.plant(tree, good.outputs.run(RunId("d")))
    findings = verify_run(tree).findings
    assert any(str(named) in finding for finding in findings), findings


def test_forgeries_of_a_run_that_went_on_from_a_copy_are_found(lab: Lab, tmp_path: Path) -> None:
    """Its chain begins at step 4."""
    trainer, settings = lab.trainer(), {**HISTORY, "max_steps": 10, "resume": True}
    lab.feed(lab.run("a", max_steps=4, **HISTORY), trainer, 4)
    for name in ("b", "c"):
        copy_of(lab, "a", tmp_path / name).root.rename(lab.outputs.run(RunId(name)).root)
        lab.feed(
            lab.run(name, seed=ord(name), optimizer=OptimizerConfig(learning_rate=ord(name) / 1e5), **settings),
            trainer,
            10,
        )
    assert read_chain(lab.outputs.run(RunId("b")))[0].step == 4
    holds(lab.outputs.run(RunId("b")))
    for number, forgery in enumerate([*FORGERIES, *OF_KL_RUNS]):
        if forgery.name in ("optimizer steps of a checkpoint", "reference of a checkpoint"):
            continue  # counted, and compared, from step 0 on
        tree = copy_of(lab, "b", tmp_path / str(number))
        named = forgery.plant(tree, lab.outputs.run(RunId("c")))
        findings = verify_run(tree).findings
        assert any(str(named) in finding for finding in findings), (forgery.name, findings)


def places(tree: RunTree) -> Iterator[Path]:
    yield from (tree.chain_jsonl, tree.status_json, tree.batch(3) / "STABLE", tree.broadcast(3) / "STABLE")
    yield from (tree.checkpoint(4) / "STABLE", tree.checkpoint(4) / "weight" / "STABLE")
    yield from (tree.checkpoint(4) / "trainer" / "state.json", tree.batch(3) / "batch.json")


@pytest.mark.parametrize("garbage", [b"\xff\xfe\n", b"[]\n", b'{"format": 1}\n', b"[" * 10**5 + b"\n"])
def test_garbage_is_found_and_raises_nothing(good: Lab, tmp_path: Path, garbage: bytes) -> None:
    tree = copy_of(good, "a", tmp_path)
    for path in places(tree):
        whole = path.read_bytes()
        path.write_bytes(garbage)
        findings = verify_run(tree).findings
        assert any(str(path) in finding for finding in findings), (path, findings)
        path.unlink()
        path.mkdir()
        assert verify_run(tree).findings
        path.rmdir()
        path.write_bytes(whole)
    holds(tree)


UNCHAINED = ("STABLE", "report.json", "probe.json")


@pytest.mark.parametrize(("name", "other"), [("a", "b"), ("c", "d")])
def test_every_file_of_another_run_is_found(good: Lab, tmp_path: Path, name: str, other: str) -> None:
    """Each in the place of the run's own, under manifests that fit; but for what both have alike, and the report of
    where step_0 came from and the probes, which no hash but their manifest's covers."""
    tree, source = copy_of(good, name, tmp_path), good.outputs.run(RunId(other)).root
    for folder in (p for parent in (tree.rollouts, tree.broadcasts, tree.checkpoints) for p in parent.iterdir()):
        for path in [p for p in folder.rglob("*") if p.is_file() and p.name not in UNCHAINED]:
            whole, foreign = path.read_bytes(), (source / path.relative_to(tree.root)).read_bytes()
            if whole != foreign:
                path.write_bytes(foreign)
                forge_manifests(folder)
                assert any(str(folder) in finding for finding in verify_run(tree).findings), path
                path.write_bytes(whole)
                forge_manifests(folder)
    holds(tree)


def forge_manifests(folder: Path) -> None:
    for manifest in sorted(folder.rglob("STABLE"), reverse=True):
        remake(manifest.parent)


def test_every_flipped_byte_is_found(good: Lab, tmp_path: Path) -> None:
    """One in each file of each published folder."""
    tree = copy_of(good, "c", tmp_path)
    files = [p for parent in (tree.rollouts, tree.broadcasts, tree.checkpoints) for p in parent.rglob("*")]
    for path in (p for p in files if p.is_file()):
        whole = path.read_bytes()
        path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        findings = verify_run(tree).findings
        assert any(str(path.parent) in finding for finding in findings), (path, findings)
        path.write_bytes(whole)
    holds(tree)
