"""What an import did, module by module: as JSON for programs, as lines for people."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from graftwork.adapters.formats.untrusted import listed

REPORT_NAME = "report.json"
"""Beside a checkpoint's manifest: how a step_0 was made."""
WORDS = {
    "kept": "as they are",
    "padded": "padded to the run's rank: exact, the new directions can learn",
    "idle directions dropped": "of higher rank whose surplus directions do nothing: exact without them",
    "revived": "with directions that could never have learned (A and B zero), now with a fresh A: exact",
    "reduced": "cut to the run's rank by SVD: NOT exact",
    "rescaled": "brought to the run's scale in B: exact to rounding",
    "split": "cut out of gate above up, each with a copy of A: exact",
    "shared": "of experts that share a factor, repeated for each: exact",
    "experts added": "with experts that the adapter does not have; those start fresh",
    "fresh": "that the adapter does not have; they start fresh, B = 0: exact",
}


@dataclass
class ImportReport:
    """`done`: label of WORDS -> modules. `energies`: module -> share kept, of those that were reduced.
    `dropped`: what the user asked to leave out; the function is then another. `warnings` are to be read."""

    done: dict[str, list[str]] = field(default_factory=dict)
    energies: dict[str, float] = field(default_factory=dict)
    layouts: Counter[str] = field(default_factory=Counter)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def add(self, label: str, path: str) -> None:
        assert label in WORDS, label
        self.done.setdefault(label, []).append(path)

    @property
    def exact(self) -> bool:
        """Whether the function is the source's, to rounding."""
        return not self.energies and not self.dropped

    def to_json(self) -> dict[str, Any]:
        lowest = min(self.energies.values(), default=1.0)
        return {
            "exact": self.exact,
            "dropped": self.dropped,
            "done": {label: len(paths) for label, paths in self.done.items()},
            "modules_of": self.done,
            "layouts": dict(self.layouts),
            "energy_kept": self.energies,
            "energy_kept_lowest": lowest,
            "notes": self.notes,
            "warnings": self.warnings,
        }


def lines_of(report: dict[str, Any]) -> list[str]:
    """An import's report.json for a person, one sentence a line."""
    head = (
        f"rank {report['rank']}, alpha {report['alpha']:g} (scale {report['alpha'] / report['rank']:g}), "
        f"{report['modules']} modules"
    )
    lines = [head if report["kind"] == "fresh" else f"{head}, from {listed(report['dtype_from'])}"]
    for label, count in report.get("done", {}).items():
        named = "" if label == "kept" else f" ({listed(report['modules_of'][label], 3)})"
        lines.append(f"{count} {'module' if count == 1 else 'modules'} {WORDS[label]}{named}")
    if report.get("energy_kept"):
        lines.append(f"energy kept by the SVD: at least {report['energy_kept_lowest']:.6f} of each module's")
    if report["kind"] != "fresh":
        same = "the same function as the source's" if report["exact"] else "ANOTHER function than the source's"
        lines.append(f"the run starts as {same}")
    lines += [f"WARNING: {warning}" for warning in report.get("warnings", [])]
    return lines + [f"note: {note}" for note in report.get("notes", [])]
