"""Several findings in one start of torchrun, because a start costs more than most of them:

    asks = [Ask("proofs.ranks_agree", "gradients", [base]), Ask("proofs.rank_memory", "slots", [base, "float32", "1"])]
    found = on_ranks(2, asks, folder)

On every rank each function is called with its `Ranks` and the arguments, in order. What rank 0 gets is the finding.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftwork.parallel.ranks import Ranks
from graftwork.store.disk import Disk
from graftwork.store.files import read_json
from proofs.torchrun import torchrun

TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True)
class Ask:
    """`<module>.<function>(ranks, *arguments)`; arguments are texts."""

    module: str
    function: str
    arguments: Sequence[str | Path] = ()


def on_ranks(ranks: int, asks: Sequence[Ask], folder: Path, restarts: int = 0) -> list[Any]:
    """What was found on so many ranks, one finding an ask. folder: for the files in between."""
    folder.mkdir(parents=True, exist_ok=True)
    plan, out = folder / "plan.json", folder / "found.json"
    out.unlink(missing_ok=True)
    plan.write_text(json.dumps([[ask.module, ask.function, *map(str, ask.arguments)] for ask in asks]))
    torchrun("proofs.on_ranks:main", str(plan), str(out), ranks=ranks, restarts=restarts, timeout=TIMEOUT_SECONDS)
    found: list[Any] = read_json(out, "findings")
    return found


def main(plan: str, out: str) -> None:
    torch.set_num_threads(1)
    ranks = Ranks.of_torchrun(torch.device("cpu"), 300)
    found = []
    for module, function, *arguments in read_json(Path(plan), "plan"):
        found.append(getattr(importlib.import_module(module), function)(ranks, *arguments))
    if ranks.leads:
        Disk().publish_json(Path(out), found)
    ranks.exit()
