"""What an orchestrator refuses before it samples anything."""

from pathlib import Path
from typing import Any

import pytest

from graftwork.config.schema import AdapterConfig, ModelConfig, RunConfig
from graftwork.errors import ConfigError, RunError
from graftwork.programs.orchestrator import Orchestrator, refuse_another_source
from graftwork.store.disk import Disk
from graftwork.store.layout import RunTree
from graftwork.store.status import Status, write_status


@pytest.fixture
def tree(tmp_path: Path) -> RunTree:
    return RunTree.at(tmp_path / "run_a")


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
    with pytest.raises(RunError, match="is gone; the run was removed"):
        orchestrator(tree).look()
