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
from pathlib import Path

from graftwork.store.disk import Disk, read_json, read_lines
from graftwork.store.layout import RunTree
from graftwork.store.queue import read_version
from proofs.killing import MOMENTS, Moment, draw_kills, start_rl, strike
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
    adapter = make_adapter(folder)
    whole = complete(folder / "whole", adapter, options.steps)
    print(f"without a stop: {options.steps} steps", flush=True)
    seen: Counter[Moment] = Counter()
    equal = once = kills = 0
    rng = random.Random(options.seed)
    for repetition in range(options.repetitions):
        root = folder / f"killed_{repetition}"
        moments = killed(root, adapter, options.steps, rng, MOMENTS[repetition % len(MOMENTS)])
        tree = RunTree.at(root / RUN)
        differences, doubles = compare(tree, whole, options.steps), consumed_wrongly(tree, whole, options.steps)
        print(
            f"repetition {repetition}: killed in {', '.join(moments)}: {differences or 'equal'}",
            flush=True,
        )
        proof.check(not differences, f"repetition {repetition}: {'; '.join(differences)}")
        proof.check(not doubles, f"repetition {repetition}: {doubles}")
        seen.update(moments)
        equal, once, kills = equal + (not differences), once + (not doubles), kills + len(moments)
    proof.figures.update({"seed": options.seed, "steps": options.steps, "kills": kills, "kills_by_moment": dict(seen)})
    proof.count("repetitions byte-equal", options.repetitions, equal)
    proof.count("repetitions that consumed each batch once", options.repetitions, once)
    for moment in MOMENTS:
        proof.count(f"kills in {moment}", 1, seen[moment])


def make_adapter(folder: Path) -> Path:
    """A short SFT; its adapter is what every run starts from."""
    run(
        "sft",
        str(EXAMPLE / "sft.toml"),
        "--output_dir",
        str(folder / "sft"),
        "--max-steps",
        "40",
        log=folder / "sft.log",
    )
    return folder / "sft" / "adapter"


def flags(root: Path, adapter: Path, steps: int) -> list[str]:
    return ["--output_dir", str(root), "--run.init_adapter_path", str(adapter), "--max-steps", str(steps),
            "--run.checkpoint_interval_steps", "5"]  # fmt: skip


def complete(root: Path, adapter: Path, steps: int, resume: bool = False) -> RunTree:
    """Run to the end."""
    more = ["--resume"] if resume else []
    run("rl", str(EXAMPLE / "rl.toml"), *flags(root, adapter, steps), *more, log=root.parent / f"{root.name}.log")
    return RunTree.at(root / RUN)


def killed(root: Path, adapter: Path, steps: int, rng: random.Random, first: Moment) -> list[Moment]:
    """Run to the end through kills; the moments that were hit."""
    tree, hit = RunTree.at(root / RUN), []
    log = root.parent / f"{root.name}.log"
    for number, kill in enumerate(draw_kills(rng, steps, first)):
        more = ["--resume"] if number else []
        moment = strike(start_rl(EXAMPLE / "rl.toml", [*flags(root, adapter, steps), *more], log), tree, kill)
        if moment is None:
            break
        hit.append(moment)
    complete(root, adapter, steps, resume=True)
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


def consumed_wrongly(tree: RunTree, whole: RunTree, steps: int) -> str:
    """Empty if the steps are 1 to `steps`, each once, and the chain over their batches is the same."""
    rows = read_lines(tree.metrics_jsonl)
    if [row["step"] for row in rows] != list(range(1, steps + 1)):
        return f"metrics.jsonl holds steps {[row['step'] for row in rows]}"
    cursors = [read_json(t.checkpoint(steps) / "trainer" / "state.json", "state")["cursor"] for t in (tree, whole)]
    return "" if cursors[0] == cursors[1] else "the chain of consumed batches differs"


def run(*arguments: str, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        command = [sys.executable, "-m", "graftwork", *arguments]
        code = subprocess.run(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, check=False).returncode
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}; see {log}:\n{log.read_text()[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
