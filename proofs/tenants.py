"""`make proof-tenants`: many runs on one trainer, none able to hurt another; all parts of the claim at full size.

story       alpha, beta and gamma on two slots (proofs/tenants_story.py), replayed and verified
crowd       64 runs on 8 slots in one `graftwork serve`
neighbours  a good run beside offenders of every kind, bit-equal to the run alone
reconcile   sequences of events against a model
faults      every storage operation fails or is followed by a kill; kill -9 of real processes
cycles      a thousand runs come and go
forgeries   planted in the story's folders, found by `graftwork runs verify`
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import operator
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from graftwork.programs.verify import verify_run
from graftwork.store.disk import Disk
from graftwork.store.layout import RunTree
from proofs import faults, neighbours
from proofs.cycles import prove_cycles
from proofs.forgeries import FORGERIES
from proofs.many_runs import Crowd
from proofs.reconcile_machine import run_sequences
from proofs.report import Part, Proof, run_parts
from proofs.tenants_story import REWARD_BAR, Story

NEIGHBOURS, SEQUENCES, KILLS, CYCLES, RUNS, SLOTS, PROMPTS = 200, 10_000, 50, 1000, 64, 8, 64
FORGERIES_ASKED, KINDS_ASKED, PROCESSES = 10, 12, 2


def main() -> int:
    return run_parts("tenants", __doc__, PARTS)


def adapter_in(folder: Path) -> Path:
    """An SFT adapter, made when the first part needs it."""
    adapter = folder / "sft" / "adapter"
    if not adapter.is_dir():
        command = [sys.executable, "-m", "graftwork", "sft", "examples/reverse_text/sft.toml"]
        subprocess.run([*command, "--output_dir", str(adapter.parent)], check=True, capture_output=True)
    return adapter


def prove_story(proof: Proof, folder: Path, seed: int) -> None:
    story = Story(folder / "story", prompts=PROMPTS, flags=("--seed", str(seed)))
    story.tell(adapter_in(folder))
    for what, held in story.seen.items():
        proof.check(held, f"story: not so: {what}")
    rewards = story.rewards()
    proof.figures["story: reward of the last steps"] = {name: round(reward, 3) for name, reward in rewards.items()}
    for name, reward in rewards.items():
        proof.check(reward > REWARD_BAR, f"story: {name} reached {reward:.3f}, not {REWARD_BAR}")
    for what, wrong in (("replayed alone, every digest the same", story.replayed()), ("verified", story.verified())):
        for run, differences in wrong.items():
            proof.check(not differences, f"story: {run} {what}: {'; '.join(differences)}")
        proof.count(f"story: runs {what}", len(story.trees()), sum(not differences for differences in wrong.values()))
    prove_forgeries(proof, folder, story.tree("gamma"), story.tree("beta"))


def prove_forgeries(proof: Proof, folder: Path, good: RunTree, other: RunTree) -> None:
    """Each on a copy of the run; the file must be named."""
    found = 0
    for forgery in FORGERIES:
        copy = RunTree.at(Path(shutil.copytree(good.root, folder / "forged" / good.root.name)))
        forged = forgery.plant(copy, other)
        named = any(str(forged) in finding for finding in verify_run(copy).findings)
        proof.check(named, f"forgery not found: {forgery.name}")
        found += named
        shutil.rmtree(copy.root)
    proof.count("forgeries found and named", max(len(FORGERIES), FORGERIES_ASKED), found)


def prove_crowd(proof: Proof, folder: Path, seed: int) -> None:
    crowd = Crowd(folder / "crowd", RUNS, SLOTS, adapter_in(folder))
    crowd.go()
    proof.count(f"crowd: runs finished on {SLOTS} slots in one serve", RUNS, crowd.finished())
    proof.count("crowd: runs verified", RUNS, crowd.verified())
    proof.count("crowd: slots in use at once", SLOTS, crowd.most_active())
    proof.figures["crowd: times that `graftwork runs` was read"] = len(crowd.tables)
    table = crowd.tables[len(crowd.tables) // 2]
    Disk().publish_file(folder / "runs.txt", table.encode())


def prove_neighbours(proof: Proof, folder: Path, seed: int) -> None:
    figures = neighbours.scenarios(NEIGHBOURS, seed)
    proof.failures += figures.failures
    proof.count("neighbours: scenarios in which the good run is bit-equal to itself alone", NEIGHBOURS, figures.done)
    proof.count("neighbours: kinds of offenders", KINDS_ASKED, len(figures.kinds))
    proof.figures["neighbours: scenarios by kind"] = dict(figures.kinds)


def prove_reconcile(proof: Proof, folder: Path, seed: int) -> None:
    figures = run_sequences(SEQUENCES, seed)
    proof.count("reconcile: sequences", SEQUENCES, figures["sequences"])
    proof.figures["reconcile"] = figures


def prove_faults(proof: Proof, folder: Path, seed: int) -> None:
    parts = [slice(first, None, PROCESSES) for first in range(PROCESSES)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=spawn, initializer=be_quiet) as pool:
        jobs = {
            name: [pool.submit(sweep, faults.KINDS, "all", seed, None, part) for part in parts]
            for name, sweep in (("faults", faults.sweep), ("faults at a restart", faults.sweep_restarts))
        }
        swept = {
            name: functools.reduce(operator.add, (job.result() for job in shares)) for name, shares in jobs.items()
        }
    logging.disable(logging.CRITICAL)
    swept["kill -9"] = faults.real_kills(KILLS, seed)
    logging.disable(logging.NOTSET)
    for name, figures in swept.items():
        proof.failures += figures.failures
        proof.figures[f"{name}: storage operations"] = figures.operations
        for kind, asked in figures.asked.items():
            proof.count(f"{name}: {kind}", asked, figures.done[kind])


def be_quiet() -> None:
    """A process of the pool: one thread, and no word of the trainers that are broken on purpose."""
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)


def prove_many_cycles(proof: Proof, folder: Path, seed: int) -> None:
    """In a process of its own: beside what the other parts have left in memory, little growth would not show."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=be_quiet) as pool:
        part = pool.submit(cycles_alone).result()
    proof.figures |= part.figures
    proof.failures += part.failures


def cycles_alone() -> Proof:
    part = Proof("cycles")
    prove_cycles(part, CYCLES)
    return part


PARTS: Mapping[str, Part] = {
    "story": prove_story,
    "crowd": prove_crowd,
    "neighbours": prove_neighbours,
    "reconcile": prove_reconcile,
    "cycles": prove_many_cycles,
    "faults": prove_faults,
}

if __name__ == "__main__":
    sys.exit(main())
