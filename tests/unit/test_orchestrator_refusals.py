"""What an orchestrator refuses before it samples anything, and how it looks at what the trainer says."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from graftwork.config.run import AdapterConfig, RunConfig
from graftwork.config.section import ModelConfig
from graftwork.errors import ConfigError, RunError, ServerGone
from graftwork.programs import orchestrator as module
from graftwork.programs import serving
from graftwork.programs.orchestrator import Orchestrator, Pauses, RunStopped
from graftwork.programs.serving import Serving
from graftwork.programs.warm_start import refuse_another_source
from graftwork.store.disk import Disk
from graftwork.store.layout import RunTree
from graftwork.store.status import Status, write_status


@pytest.fixture
def tree(tmp_path: Path) -> RunTree:
    tree = RunTree.at(tmp_path / "run_a")
    Disk().make_folder(tree.status_json.parent)
    return tree


def orchestrator(tree: RunTree) -> Orchestrator:
    unused: Any = None
    config = RunConfig(model=ModelConfig(path="base"))
    return Orchestrator(tree, config, "mine", Disk(), unused, unused, unused)


def test_a_step_0_of_another_adapter_is_not_taken_for_the_one_that_is_named(tree: RunTree) -> None:
    Disk().publish_json(tree.checkpoint(0) / "report.json", {"source": "/adapters/a"})
    refuse_another_source(tree, "/adapters/a", AdapterConfig(), [0])
    with pytest.raises(ConfigError, match=r"was made from /adapters/a, init_adapter_path says /adapters/b"):
        refuse_another_source(tree, "/adapters/b", AdapterConfig(), [0])


def test_a_step_0_that_was_imported_otherwise_is_not_taken_for_what_is_asked_now(tree: RunTree) -> None:
    asked = {"adapter_name": "policy", "ignore": ["lm_head"], "allow_lossy": False}
    Disk().publish_json(tree.checkpoint(0) / "report.json", {"source": "/adapters/a", "asked": asked})
    refuse_another_source(tree, "/adapters/a", AdapterConfig(adapter_name="policy", ignore=("lm_head",)), [0])
    for other in (AdapterConfig(adapter_name="critic", ignore=("lm_head",)), AdapterConfig(adapter_name="policy")):
        with pytest.raises(ConfigError, match=r"was imported with .*policy.*import again"):
            refuse_another_source(tree, "/adapters/a", other, [0])


def test_an_orch_toml_that_changed_under_it_ends_it(tree: RunTree) -> None:
    write_status(Disk(), tree, Status("a", "active", "mine", 1))
    assert orchestrator(tree).look().state == "active"
    write_status(Disk(), tree, Status("a", "active", "another", 1))
    with pytest.raises(ConfigError, match="changed under this orchestrator"):
        orchestrator(tree).look()


def test_a_run_that_failed_ends_it_with_the_trainers_reason(tree: RunTree) -> None:
    write_status(Disk(), tree, Status("a", "failed", "mine", 1, reason="batch 3: token id -1"))
    with pytest.raises(RunError, match="batch 3: token id -1"):
        orchestrator(tree).look()


def test_a_folder_that_is_gone_ends_it(tree: RunTree) -> None:
    shutil.rmtree(tree.root)
    with pytest.raises(RunError, match="is gone; the run was removed"):
        orchestrator(tree).look()


def test_a_stopped_run_is_no_error_whatever_orch_toml_the_status_is_about(tree: RunTree) -> None:
    for about in ("mine", "the one that asks to stop"):
        write_status(Disk(), tree, Status("a", "stopped", about, 1, step=4))
        with pytest.raises(RunStopped, match="stopped at step 4"):
            orchestrator(tree).look()
    write_status(Disk(), tree, Status("b", "stopped", "mine", 1))
    with pytest.raises(ConfigError, match="changed under this orchestrator"):
        orchestrator(tree).look()


def test_a_status_is_parsed_when_it_has_changed(tree: RunTree, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Status | None] = []

    def read(of: RunTree) -> Status | None:
        reads.append(module_read(of))
        return reads[-1]

    module_read = module.read_status
    monkeypatch.setattr(module, "read_status", read)
    watcher = orchestrator(tree)
    assert watcher.status() is None
    for step in (1, 2):
        write_status(Disk(), tree, Status("a", "active", "mine", 1, step=step))
        assert [watcher.look().step for _ in range(5)] == [step] * 5
    assert len(reads) == 3
    tree.status_json.unlink()
    with pytest.raises(RunError, match=r"status\.json is gone"):
        watcher.look()


def test_pauses_grow_up_to_a_limit() -> None:
    pauses, lengths = Pauses(longest_seconds=2e-4, seconds=1e-4), []

    async def wait() -> None:
        for _ in range(5):
            lengths.append(pauses.seconds)
            await pauses.pause()

    asyncio.run(wait())
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (1e-4, 2e-4)


def test_a_server_that_is_gone_or_silent_does_not_keep_it(tree: RunTree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "LEAVE_SECONDS", 0.05)

    class Gone:
        async def served_models(self) -> list[str]:
            raise ServerGone("gone")

    class Silent:
        async def served_models(self) -> list[str]:
            await asyncio.sleep(3600)
            return []

    for client in (Gone(), Silent()):
        asyncio.run(Serving(tree.id, client, 0.03).leave_inference())  # type: ignore[arg-type]
