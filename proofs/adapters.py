"""`make proof-adapters`: what comes in computes what it computed before, or is refused by name; and what that costs.

1. the table of imports (adapter_cases.py), each exact row told twice against PEFT, each other row a refusal;
2. drawn combinations of base, rank, scale, targets, layout and names, from a seed;
3. hostile files (hostile_adapters.py): a named error in under a second, little memory, nothing written, imported or
   opened elsewhere;
4. an import's peak memory and time (import_cost.py).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from proofs.adapter_cases import EXPORT_BAR, SLOT_BAR, Case, Lab, Outcome, exact_cases, refused_cases, run
from proofs.hostile_adapters import CASES, MEMORY_BYTES_MAX, SECONDS_MAX, run_all
from proofs.import_cost import MEMORY_BAR, TIME_BAR, measure
from proofs.report import Proof, run_proof

EXACT_ASKED, HOSTILE_ASKED = 60, 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the drawn combinations")
    parser.add_argument("--drawn", type=int, default=300)
    parser.add_argument("--megabytes", type=int, default=256)
    options = parser.parse_args()
    print(f"proof adapters, seed {options.seed}: replay with --seed {options.seed}", flush=True)
    torch.set_num_threads(1)
    return run_proof(Proof("adapters"), lambda proof: prove(proof, options))


def prove(proof: Proof, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        table(proof, Path(folder))
        hostile(proof, Path(folder) / "hostile")
        cost(proof, options.megabytes, Path(folder) / "cost")
    drawn(proof, options.seed, options.drawn)


def table(proof: Proof, folder: Path) -> None:
    lab = Lab(folder / "bases")
    outcomes = {case.name: told(proof, case, lab, folder) for case in [*exact_cases(), *refused_cases()]}
    exact = [o for o in outcomes.values() if o is not None and o.export_error is not None]
    refusals = {name: o.refusal for name, o in outcomes.items() if o is not None and o.refusal is not None}
    proof.count("exact cases", max(EXACT_ASKED, len(exact_cases())), len(exact))
    proof.count("refusals", len(refused_cases()), len(refusals))
    worst = {
        "file, PEFT in float64": (max(o.export_error or 0 for o in exact), EXPORT_BAR),
        "slot, trainer in float32": (max(o.slot_error or 0 for o in exact), SLOT_BAR),
    }
    proof.figures["worst error over the adapter's effect"] = {
        k: {"found": v, "bar": bar} for k, (v, bar) in worst.items()
    }
    proof.figures["refusals by name"] = refusals
    for name, (value, bar) in worst.items():
        print(f"{name}: worst error {value:.2e} of the effect (bar {bar:.0e})", flush=True)
    print(f"table: {len(exact)} exact, {len(refusals)} refused", flush=True)


def told(proof: Proof, case: Case, lab: Lab, folder: Path) -> Outcome | None:
    place = Path(tempfile.mkdtemp(dir=folder))
    try:
        return run(case, lab, place)
    except AssertionError as error:
        proof.check(False, str(error))
        return None


def hostile(proof: Proof, folder: Path) -> None:
    findings = run_all(folder)
    good = 0
    for finding in findings:
        wrong = finding.wrong()
        proof.check(not wrong, f"hostile {finding.name}: {'; '.join(wrong)}")
        good += not wrong
    proof.count("hostile files", max(HOSTILE_ASKED, len(CASES)), good)
    proof.figures["hostile files, worst"] = {
        "seconds": {"found": max(f.seconds for f in findings), "bar": SECONDS_MAX},
        "memory bytes": {"found": max(f.memory_bytes for f in findings), "bar": MEMORY_BYTES_MAX},
    }
    proof.figures["hostile files by error"] = dict(Counter(finding.error for finding in findings))
    print(f"hostile: {good} of {len(findings)}", flush=True)


def cost(proof: Proof, megabytes: int, folder: Path) -> None:
    folder.mkdir()
    rows = measure(megabytes, 5, folder)
    proof.figures["import cost"] = rows
    for name, row in rows.items():
        memory, seconds = row["memory_over_output"], row["time_over_plain"]
        print(
            f"cost, {name}: memory {memory:.2f}x (bar {MEMORY_BAR}), time {seconds:.2f}x (bar {TIME_BAR})", flush=True
        )
        proof.check(memory <= MEMORY_BAR, f"{name}: peak memory is {memory:.2f}x the output")
        proof.check(seconds <= TIME_BAR, f"{name}: time is {seconds:.2f}x a plain load, hash and save")


def drawn(proof: Proof, seed: int, count: int) -> None:
    """The property test of `make test`, with more examples and a seed that is told."""
    test = "tests/properties/test_adapter_imports.py"
    command = [sys.executable, "-m", "pytest", test, f"--hypothesis-seed={seed}"]
    settings = {**os.environ, "GRAFTWORK_DRAWN_IMPORTS": str(count), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=settings)
    equal = count if done.returncode == 0 else 0
    proof.figures["drawn combinations"] = {"asked": count, "done": equal, "seed": seed}
    proof.check(done.returncode == 0, f"drawn combinations, seed {seed}: {done.stdout[-2000:]}")
    print(f"drawn: {count} combinations, {'all equal' if done.returncode == 0 else 'NOT all equal'}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
