"""SFT, then RL from its adapter, on a task of reasoning-gym; and by how much RL raised the reward.

    python examples/reasoning_gym/demo.py [--seed 0] [--outputs outputs/reasoning_gym]

    DIR/sft        the SFT adapter
    DIR/run_spell  RL from it
    DIR/curve.csv  step, mean reward of its batch, mean reward on held-out tasks where these were asked

The exit code is 0 when the mean reward of the last 5 batches is at least 0.1 above that of the first 5. DIR has to be
new: nothing is started over in place.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

from graftwork.store.disk import Disk
from graftwork.store.layout import OutputTree, RunId

REPOSITORY = Path(__file__).resolve().parents[2]
SFT_TOML, RL_TOML = "examples/reasoning_gym/sft.toml", "examples/reasoning_gym/rl.toml"
BATCHES = 5
"""At each end of the curve."""
RISE_MIN = 0.1


def main() -> int:
    options = argparse.ArgumentParser(description="SFT -> RL on a task of reasoning-gym, on a tiny model.")
    options.add_argument("--seed", type=int, default=0, help="of data, sampling and held-out tasks")
    options.add_argument("--outputs", type=Path, default=REPOSITORY / "outputs" / "reasoning_gym", help="a new folder")
    given = options.parse_args()
    outputs, seed, began = given.outputs.absolute(), str(given.seed), time.monotonic()
    if outputs.exists():
        sys.exit(f"demo: {outputs} is there already; move it away, or choose another place with --outputs")
    graftwork("sft", SFT_TOML, "--output_dir", str(outputs / "sft"), "--seed", seed)
    places = ["--output_dir", str(outputs), "--run.init_adapter_path", str(outputs / "sft" / "adapter")]
    graftwork("rl", RL_TOML, *places, "--run.seed", seed)
    run = OutputTree(outputs).run(RunId("spell"))
    rewards, heldout = rewards_of(run.metrics_jsonl), rewards_of(run.evals_jsonl)
    Disk().publish_file(outputs / "curve.csv", curve(rewards, heldout).encode())
    in_order = [rewards[step] for step in sorted(rewards)]
    first, last = statistics.mean(in_order[:BATCHES]), statistics.mean(in_order[-BATCHES:])
    print(f"\nseed {seed}: mean reward of the first {BATCHES} batches {first:.3f}, of the last {BATCHES} {last:.3f}")
    print(f"  a rise of {last - first:.3f}, where {RISE_MIN} is asked for")
    print(f"  on held-out tasks: {', '.join(f'{reward:.3f} (step {step})' for step, reward in heldout.items())}")
    print(f"  {time.monotonic() - began:.0f} seconds; the curve: {outputs / 'curve.csv'}")
    return 0 if last - first >= RISE_MIN else 1


def graftwork(*arguments: str) -> None:
    """Run one command; ends the demo if it fails."""
    print(f"\n$ graftwork {shlex.join(arguments)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "graftwork", *arguments], cwd=REPOSITORY, check=False)
    if done.returncode != 0:
        sys.exit(f"demo: `graftwork {arguments[0]}` ended with exit code {done.returncode}; its message is above")


def rewards_of(log: Path) -> dict[int, float]:
    """The reward of each step that a log of the run names."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return {row["step"]: row["reward"] for row in rows}


def curve(rewards: dict[int, float], heldout: dict[int, float]) -> str:
    """A line a step, step 0 being the SFT adapter: its batch is that of step 1."""
    lines = ["step,reward,heldout_reward"]
    for step in sorted(rewards.keys() | heldout.keys()):
        cells = (f"{rows[step]:.4f}" if step in rows else "" for rows in (rewards, heldout))
        lines.append(f"{step},{','.join(cells)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
