"""`make proof-main`: a run that is killed at random moments ends with the bytes of the run that was never killed.

Lockstep on the embedded engine, from an SFT adapter: once without a stop, then `--repetitions` times with one to three
kill -9 of all processes each, resumed after each. Compared at the last step: the whole `trainer/` folder (fp32 masters,
both moments, cursor), the digest of every version, and that every batch was consumed once.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from graftwork.store.disk import Disk
from graftwork.store.files import read_json, read_lines
from graftwork.store.layout import RunTree
from graftwork.store.queue import read_version
from proofs.killing import MOMENTS, Kill, Moment, draw_kills, start_rl, strike
from proofs.report import Proof, run_proof

EXAMPLE = Path("examples/reverse_text")
RUN = "run_reverse"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("outputs/proof_main"))
    options = parser.parse_args()
    print(f"proof main, seed {options.seed}: replay with --seed {options.seed}", flush=True)
    return run_proof(Proof("main"), lambda proof: prove(proof, options))


def prove(proof: Proof, options: argparse.Namespace) -> None:
    folder: Path = options.folder
    if folder.exists():
        Disk().quarantine(folder, folder.parent / ".trash")
    folder.mkdir(parents=True)
    flags = ("--run.init_adapter_path", str(make_adapter(folder)), "--run.checkpoint_interval_steps", "5")
    whole = Job(folder / "whole", options.steps, flags).complete()
    print(f"without a stop: {options.steps} steps", flush=True)
    seen: Counter[Moment] = Counter()
    equal = once = 0
    rng = random.Random(options.seed)
    for repetition in range(options.repetitions):
        job = Job(folder / f"killed_{repetition}", options.steps, flags)
        moments = job.killed(draw_kills(rng, options.steps, MOMENTS[repetition % len(MOMENTS)]))
        wrong = [*compare(job.tree, whole, options.steps), *consumed_wrongly(job.tree, whole, options.steps)]
        print(f"repetition {repetition}: killed in {', '.join(moments)}: {wrong or 'equal'}", flush=True)
        proof.check(not wrong, f"repetition {repetition}: {'; '.join(wrong)}")
        seen.update(moments)
        equal += not compare(job.tree, whole, options.steps)
        once += not consumed_wrongly(job.tree, whole, options.steps)
    proof.figures.update(seed=options.seed, steps=options.steps, kills=seen.total(), kills_by_moment=dict(seen))
    proof.count("repetitions byte-equal", options.repetitions, equal)
    proof.count("repetitions that consumed each batch once", options.repetitions, once)
    for moment in MOMENTS:
        proof.count(f"kills in {moment}", 1, seen[moment])


def make_adapter(folder: Path) -> Path:
    """A short SFT; its adapter is what every run starts from."""
    flags = ["--output_dir", str(folder / "sft"), "--max-steps", "40"]
    run("sft", str(EXAMPLE / "sft.toml"), *flags, log=folder / "sft.log")
    return folder / "sft" / "adapter"


@dataclass(frozen=True)
class Job:
    """One run in an output tree of its own; `flags` go to every `graftwork rl`."""

    root: Path
    steps: int
    flags: tuple[str, ...]

    @property
    def tree(self) -> RunTree:
        return RunTree.at(self.root / RUN)

    @property
    def log(self) -> Path:
        return self.root.parent / f"{self.root.name}.log"

    @property
    def command(self) -> list[str]:
        return ["--output_dir", str(self.root), "--max-steps", str(self.steps), *self.flags]

    def complete(self, *, resume: bool = False) -> RunTree:
        """Run to the end."""
        run("rl", str(EXAMPLE / "rl.toml"), *self.command, *(["--resume"] if resume else []), log=self.log)
        return self.tree

    def killed(self, kills: Sequence[Kill]) -> list[Moment]:
        """Run to the end through kills; the moments that were hit."""
        hit = []
        for number, kill in enumerate(kills):
            flags = [*self.command, *(["--resume"] if number else [])]
            moment = strike(start_rl(EXAMPLE / "rl.toml", flags, self.log), self.tree, kill)
            if moment is None:
                break
            hit.append(moment)
        self.complete(resume=True)
        return hit


def compare(tree: RunTree, whole: RunTree, steps: int) -> list[str]:
    """What differs at the last step: nothing, if a resumed run is the run."""
    differences = []
    ours, theirs = tree.checkpoint(steps) / "trainer", whole.checkpoint(steps) / "trainer"
    for path in sorted(theirs.iterdir()):
        other = ours / path.name
        if not other.is_file() or other.read_bytes() != path.read_bytes():
            differences.append(f"{path.name} differs")
    for step in range(steps + 1):
        a, b = read_version(tree, step), read_version(whole, step)
        if a is None or b is None or a.version.digest != b.version.digest:
            differences.append(f"version {step} differs")
    return differences


def consumed_wrongly(tree: RunTree, whole: RunTree, steps: int) -> list[str]:
    """Empty if the steps are 1 to `steps`, each once, and the chain over their batches is the same."""
    rows = read_lines(tree.metrics_jsonl)
    if [row["step"] for row in rows] != list(range(1, steps + 1)):
        return [f"metrics.jsonl holds steps {[row['step'] for row in rows]}"]
    cursors = [read_json(t.checkpoint(steps) / "trainer" / "state.json", "state")["cursor"] for t in (tree, whole)]
    return [] if cursors[0] == cursors[1] else ["the chain of consumed batches differs"]


def run(*arguments: str, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        command = [sys.executable, "-m", "graftwork", *arguments]
        code = subprocess.run(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, check=False).returncode
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}; see {log}:\n{log.read_text()[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
