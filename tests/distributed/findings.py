"""What the tests of several ranks look at: three starts of torchrun, on 2, 3 and 4 ranks, of which each finds much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from distributed.base_checks import make_bases

from graftwork.parallel.ranks import Ranks
from proofs import ranks_agree
from proofs.adapter_models import make_base
from proofs.on_ranks import Ask, on_ranks
from proofs.rank_memory import SMALL, write_base
from proofs.sharded import KINDS, CheckpointChain

FAULTS = "1:2,1:0,0:1,0:0,0:-1"
"""Of the operations of a checkpoint: rank 1's second (its file) and last; rank 0's first, last and the one before."""


@dataclass
class Findings:
    """Starts are made in this order, each when a test asks for it or for a later one: 4 ranks, 2, 1 (no start), 3."""

    folder: Path
    found: dict[int, Mapping[str, Any]] = field(default_factory=dict)

    @cached_property
    def chain(self) -> CheckpointChain:
        for kind in KINDS:
            make_base(kind, self.folder)
        return CheckpointChain(self.folder)

    def on(self, ranks: int) -> Mapping[str, Any]:
        """By name; "gradients" by kind of base. The checkpoints' states are in `chain`."""
        for start in (4, 2, 1, 3):
            if start not in self.found:
                self.found[start] = self._start(start)
            if start == ranks:
                break
        return self.found[ranks]

    def _start(self, ranks: int) -> Mapping[str, Any]:
        carried = self.chain.asks(ranks)
        if ranks == 1:
            for name, ask in carried.items():
                self.chain.states[name] = getattr(ranks_agree, ask.function)(Ranks.alone(), *map(str, ask.arguments))
            return {}
        asks = {} if ranks == 3 else self._asks(ranks)
        findings = on_ranks(ranks, [*carried.values(), *asks.values()], self.folder / str(ranks))
        self.chain.states |= dict(zip(carried, findings, strict=False))
        return dict(zip(asks, findings[len(carried) :], strict=True))

    def _asks(self, ranks: int) -> dict[str, Ask]:
        asks = {"fills": Ask("proofs.ranks_agree", "fills")}
        if ranks == 2:
            slots = [write_base(self.folder / "small", SMALL), "float32", "1,4"]
            asks["memory"] = Ask("proofs.rank_memory", "slots", slots)
            asks["faults"] = Ask(
                "proofs.rank_faults", "errors", [self.folder / "qwen3", self.folder / "faults", FAULTS]
            )
        asks |= {f"slots of {kind}": Ask("proofs.ranks_agree", "slots", [self.folder / kind]) for kind in KINDS}
        asks |= {kind: Ask("proofs.ranks_agree", "gradients", [self.folder / kind]) for kind in KINDS}
        return asks | {"base": Ask("distributed.base_checks", "checks", [self._bases])}

    @cached_property
    def _bases(self) -> Path:
        made = self.folder / "bases"
        made.mkdir()
        make_bases(made)
        return made
