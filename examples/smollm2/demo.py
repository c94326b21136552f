"""`make demo-smollm2`: a real model. A short SFT, RL from its adapter, and what came of it on held-out prompts.

    python examples/smollm2/demo.py [--task reverse_text] [--start adapter|fresh|imported|trl] [--seed 0] [--steps 40]

start: where RL begins: at the SFT adapter, at a fresh one, at the SFT adapter imported at another rank and alpha, or at
one that TRL's SFTTrainer made (trl_sft.py; needs trl and peft).
Run it again after an interruption and it goes on. Everything is in outputs/demo_smollm2; the curve of a run that ended
is copied to docs/results/. The exit code is 1 when a run from the SFT adapter did not rise by what its task asks for.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftwork.store.disk import Disk
from graftwork.store.files import read_lines
from graftwork.store.layout import OutputTree, RunId, RunTree

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = "examples/smollm2"
OUTPUTS = REPOSITORY / "outputs" / "demo_smollm2"
RESULTS = REPOSITORY / "docs" / "results"
HELD_OUT_PROMPTS = 256
RISES = {"reverse_text": 0.15, "chain_sum": 0.10}
"""By how much the mean reward of the last five batches must be above that of the first five."""
STARTS: dict[str, tuple[str, ...]] = {
    "adapter": (),
    "fresh": ("--run.init_adapter_path", "null"),
    "imported": ("--run.adapter.rank", "32", "--run.adapter.alpha", "16"),
    "trl": (),
}
"""Flags of `graftwork rl`. Rank 32 and alpha 16 instead of 16 and 32: the same function, held in a slot of another
shape."""
COLUMNS = ("step", "reward", "mismatch_mean", "mismatch_max", "entropy", "grad_norm", "answer_tokens_mean")
"""Of metrics.jsonl. `heldout_reward` is added to the last step, and to a step 0 that has nothing else."""


@dataclass(frozen=True)
class Curve:
    """One run, from its SFT adapter to its held-out reward."""

    task: str
    start: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.start}-{self.seed}"

    @property
    def tree(self) -> RunTree:
        return OutputTree(OUTPUTS).run(RunId(self.name))

    @property
    def sft(self) -> Path:
        return OUTPUTS / f"sft_{self.task}_{self.seed}"

    @property
    def adapter(self) -> Path:
        """The PEFT folder that RL begins at, unless it starts afresh."""
        return OUTPUTS / f"trl_{self.task}_{self.seed}" if self.start == "trl" else self.sft / "adapter"

    @property
    def rl_toml(self) -> str:
        return f"{FOLDER}/{self.task}.rl.toml"

    @property
    def rl_flags(self) -> list[str]:
        places = ["--run.id", self.name, "--run.init_adapter_path", str(self.adapter)]
        return [
            self.rl_toml,
            *places,
            "--run.seed",
            str(self.seed),
            "--run.max_steps",
            str(self.steps),
            *STARTS[self.start],
        ]

    @property
    def end(self) -> Path:
        return self.tree.checkpoint(self.steps) / "weight"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=RISES, default="reverse_text")
    parser.add_argument("--start", choices=STARTS, default="adapter")
    parser.add_argument("--seed", type=int, default=0, help="of data, sampling and held-out prompts")
    parser.add_argument("--steps", type=int, default=40, help="of RL")
    given = parser.parse_args()
    curve = Curve(given.task, given.start, given.seed, given.steps)
    began = time.monotonic()
    subprocess.run([sys.executable, f"{FOLDER}/make_base.py"], cwd=REPOSITORY, check=True)
    if curve.start != "fresh":
        train_adapter(curve)
    start = held_out_reward(curve, "start", None if curve.start == "fresh" else curve.adapter)
    train_run(curve)
    end = held_out_reward(curve, f"step_{curve.steps}", curve.end)
    return tell(curve, start, end, time.monotonic() - began)


def train_adapter(curve: Curve) -> None:
    """The SFT adapter, unless it is there; goes on from its newest checkpoint."""
    if (curve.adapter / "adapter_config.json").exists():
        print(f"{curve.adapter} is there already")
        return
    if curve.start == "trl":
        flags = ["--task", curve.task, "--seed", str(curve.seed), "--prompts", str(HELD_OUT_PROMPTS)]
        subprocess.run([sys.executable, f"{FOLDER}/trl_sft.py", str(curve.adapter), *flags], cwd=REPOSITORY, check=True)
        return
    goes_on = ["--resume"] if (curve.sft / "checkpoints").exists() else []
    flags = ["--output_dir", str(curve.sft), "--seed", str(curve.seed), *goes_on]
    graftwork("sft", f"{FOLDER}/{curve.task}.sft.toml", *flags)


def train_run(curve: Curve) -> None:
    """RL to the last step, from the newest checkpoint where there is one."""
    if curve.end.exists():
        print(f"{curve.tree.root} is at step {curve.steps} already")
        return
    goes_on = ["--resume"] if curve.tree.checkpoint(0).exists() else []
    if not goes_on and curve.tree.root.exists():  # it was interrupted before there was anything to go on from
        Disk().quarantine(curve.tree.root, OUTPUTS / ".trash")
    graftwork("rl", *curve.rl_flags, *goes_on)


def held_out_reward(curve: Curve, when: str, adapter: Path | None) -> float:
    """Mean reward on prompts that no training batch holds, at temperature 1; measured once."""
    told = OUTPUTS / "held_out" / f"{curve.name}-{when}.json"
    if not told.exists():
        flags = ["--prompts", str(HELD_OUT_PROMPTS), "--seed", str(curve.seed), "--json"]
        flags += [] if adapter is None else ["--adapter", str(adapter)]
        Disk().publish_json(told, json.loads(graftwork("eval", curve.rl_toml, *flags).splitlines()[-1]))
    return float(json.loads(told.read_text())["reward"])


def graftwork(*arguments: str) -> str:
    """Run a command; what it printed on stdout, which is also shown. Ends the demo if it fails."""
    print(f"\n$ graftwork {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "graftwork", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(
            f"demo-smollm2: `graftwork {arguments[0]}` ended with exit code {done.returncode}; run it again to go on"
        )
    return done.stdout


def tell(curve: Curve, start: float, end: float, seconds: float) -> int:
    """Write report.json and the curve; the exit code."""
    rows = list(read_lines(curve.tree.metrics_jsonl))
    rewards = [float(row["reward"]) for row in rows]
    first, last = sum(rewards[:5]) / 5, sum(rewards[-5:]) / 5
    report: dict[str, Any] = {
        "task": curve.task, "start": curve.start, "seed": curve.seed, "steps": len(rows),
        "reward_first5": round(first, 4), "reward_last5": round(last, 4), "heldout_start": round(start, 4),
        "heldout_end": round(end, 4), "seconds": round(seconds, 1),
    }  # fmt: skip
    Disk().publish_json(OUTPUTS / "report.json", report)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"smollm2_{curve.task}_{curve.start}_seed{curve.seed}.csv"
    table: list[dict[str, Any]] = [{"step": 0}, *({key: round(row[key], 5) for key in COLUMNS} for row in rows)]
    table[0]["heldout_reward"], table[-1]["heldout_reward"] = round(start, 4), round(end, 4)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, "heldout_reward"), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    asked = 0.0 if curve.start == "fresh" else RISES[curve.task]
    print(f"\n{curve.name}: mean reward of the first 5 batches {first:.3f}, of the last 5 {last:.3f}")
    print(f"held-out prompts: {start:.3f} at first, {end:.3f} after {len(rows)} steps; {seconds:.0f} s in this sitting")
    for row in list(read_lines(curve.tree.samples_jsonl))[-3:]:
        print(f"  {row['prompt']!r}  ->  {row['answer']!r}   reward {row['reward']:.2f}")
    print(f"figures: {OUTPUTS / 'report.json'}, curve: {path}")
    if asked and last - first < asked:
        print(f"MISSED: it rose by {last - first:.3f}, not by {asked}")
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("demo-smollm2: stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)
