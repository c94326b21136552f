"""Feed the batches that a run recorded to a fresh trainer with nothing else to do, and compare what it publishes."""

from __future__ import annotations

import shutil
from pathlib import Path

from graftwork.config.schema import TrainerConfig
from graftwork.model.base import BaseModel
from graftwork.store.chain import Link, read_chain
from graftwork.store.disk import Disk
from graftwork.store.layout import OutputTree, RunTree
from graftwork.training.trainer import Trainer


def replay(recorded: RunTree, config: TrainerConfig, base: BaseModel, folder: Path) -> list[str]:
    """What differs; empty if every version since the run's admission has the digest that it had.

    recorded  a run with retention.history = true, whose first checkpoint is still there
    config    of the trainer that it ran on; only slots and output_dir are changed
    folder    is made, and holds the second run afterwards
    """
    links = read_chain(recorded)
    first = links[0].step
    outputs = OutputTree(folder.absolute())
    tree = outputs.run(recorded.id)
    shutil.copytree(recorded.checkpoint(first), tree.checkpoint(first))
    for link in links[1:]:
        shutil.copytree(recorded.batch(link.step), tree.batch(link.step))
    tree.orch_toml.parent.mkdir()
    shutil.copy(recorded.orch_toml, tree.orch_toml)
    alone = config.model_copy(update={"output_dir": str(outputs.root), "slots": 1, "init_adapter_path": None})
    trainer = Trainer(alone, base, Disk(), None)
    while trainer.one_pass():
        pass
    return differences(links, read_chain(tree))


def differences(ours: list[Link], theirs: list[Link]) -> list[str]:
    if len(ours) != len(theirs):
        return [f"{len(ours)} versions were recorded, {len(theirs)} came out of the replay"]
    return [f"version {a.step} differs" for a, b in zip(ours, theirs, strict=True) if a != b]
