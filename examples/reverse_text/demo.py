"""The story of `make demo`, told with the command line: SFT -> RL -> checkpoint -> resume, and what came of it.

    python examples/reverse_text/demo.py [--seed 0] [--outputs outputs]

    DIR/sft               the SFT adapter
    DIR/run_reverse       RL from it to step 20, resumed to step 25
    DIR/demo/cold         the same budget from a fresh adapter
    DIR/demo/replay       a trainer without a stop, fed the 25 batches that run_reverse recorded
    DIR/demo/report.json  the figures; the exit code is 0 when all of them reach their bars

What an earlier demo left in these places is moved to DIR/.trash.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graftwork.config.load import dump, load
from graftwork.config.run import RunConfig
from graftwork.errors import Busy
from graftwork.programs.start import refuse_held
from graftwork.store.disk import Disk
from graftwork.store.layout import OutputTree, RunId, RunTree

REPOSITORY = Path(__file__).resolve().parents[2]
SFT_TOML, RL_TOML = "examples/reverse_text/sft.toml", "examples/reverse_text/rl.toml"
HELD_OUT_PROMPTS = 256
STOP_STEP, LAST_STEP = 20, 25


@dataclass
class Story:
    """Where the demo writes, and how long each part took in seconds."""

    outputs: Path
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def run(self) -> RunTree:
        return OutputTree(self.outputs).run(RunId("reverse"))

    @property
    def demo(self) -> Path:
        return self.outputs / "demo"

    @property
    def rl_flags(self) -> list[str]:
        """rl.toml with this story's seed and places."""
        adapter = str(self.outputs / "sft" / "adapter")
        places = ["--output_dir", str(self.outputs), "--run.init_adapter_path", adapter]
        return [RL_TOML, *places, "--run.seed", str(self.seed)]


def main() -> int:
    options = argparse.ArgumentParser(description="SFT -> RL -> checkpoint -> resume on a tiny model.")
    options.add_argument("--seed", type=int, default=0, help="of data, sampling and held-out prompts")
    options.add_argument("--outputs", type=Path, default=REPOSITORY / "outputs", help="where everything goes")
    given = options.parse_args()
    story, began = Story(given.outputs.absolute(), given.seed), time.monotonic()
    move_earlier_demo_aside(story)
    figures = tell(story)
    figures["seconds"] = round(time.monotonic() - began, 1)
    shortfalls = missed_bars(figures)
    about = {"seed": story.seed, "parts_seconds": story.seconds, "cores": os.cpu_count(), "machine": platform.machine()}
    report = {**figures, **about, "ok": not shortfalls, "failures": shortfalls}
    Disk().publish_json(story.demo / "report.json", report)
    print("\n".join(summary(report, story)))
    return 1 if shortfalls else 0


def tell(story: Story) -> dict[str, Any]:
    """Every part of the story in turn; the figures of report.json."""
    figures: dict[str, Any] = {}
    adapter = story.outputs / "sft" / "adapter"
    graftwork(story, "sft", "sft", SFT_TOML, "--output_dir", str(story.outputs / "sft"), "--seed", str(story.seed))
    figures["reward_start"] = held_out_reward(story, "eval start", adapter)
    graftwork(story, "rl", "rl", *story.rl_flags, "--max-steps", str(STOP_STEP))
    figures["reward_step20"] = held_out_reward(story, "eval step 20", weight(story.run, STOP_STEP))
    graftwork(story, "resume", "rl", *story.rl_flags, "--resume", "--max-steps", str(LAST_STEP))
    figures["reward_resumed_step25"] = held_out_reward(story, "eval step 25", weight(story.run, LAST_STEP))
    figures["resume_bit_equal"], figures["resume_differs_in"] = replay(story)
    cold = OutputTree(story.demo / "cold").run(RunId("cold"))
    cold_flags = ["--output_dir", str(cold.root.parent), "--run.id", "cold", "--run.init_adapter_path", "null"]
    graftwork(story, "cold", "rl", *story.rl_flags, *cold_flags, "--max-steps", str(STOP_STEP))
    figures["reward_cold_step20"] = held_out_reward(story, "eval cold", weight(cold, STOP_STEP))
    return figures


def move_earlier_demo_aside(story: Story) -> None:
    disk, trash = Disk(), OutputTree(story.outputs).trash
    try:
        refuse_held(OutputTree(story.outputs).trainer_lock)
    except Busy as error:
        sys.exit(f"demo: {error} (--outputs DIR)")
    for place in (story.outputs / "sft", story.run.root, story.demo):
        if place.exists():
            print(f"moved {place} to {disk.quarantine(place, trash)}")


def graftwork(story: Story, part: str, *arguments: str) -> str:
    """Run one command; return what it printed on stdout, which is also shown. Ends the demo if it fails."""
    print(f"\n$ graftwork {shlex.join(arguments)}", flush=True)
    began = time.monotonic()
    command = [sys.executable, "-m", "graftwork", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="", flush=True)
    story.seconds[part] = round(time.monotonic() - began, 1)
    if done.returncode != 0:
        sys.exit(f"demo: `graftwork {arguments[0]}` ended with exit code {done.returncode}; its message is above")
    return done.stdout


def held_out_reward(story: Story, part: str, adapter: Path) -> float:
    """Mean reward on prompts that no training batch holds, at temperature 1."""
    flags = ["--adapter", str(adapter), "--prompts", str(HELD_OUT_PROMPTS), "--seed", str(story.seed), "--json"]
    return float(json.loads(graftwork(story, part, "eval", RL_TOML, *flags).splitlines()[-1])["reward"])


def weight(tree: RunTree, step: int) -> Path:
    return tree.checkpoint(step) / "weight"


def replay(story: Story) -> tuple[bool, list[str]]:
    """Feed a fresh trainer, which never stops, the batches that were recorded; compare step 25 byte for byte.

    Returns whether all files of checkpoints/step_25/trainer are equal, and the names of those that are not.
    """
    source, tree = story.run, OutputTree(story.demo / "replay").run(story.run.id)
    shutil.copytree(source.checkpoint(0), tree.checkpoint(0))
    for step in range(1, LAST_STEP + 1):
        shutil.copytree(source.batch(step), tree.batch(step))
    uninterrupted = load(RunConfig, source.orch_toml).model_copy(update={"resume": False, "resume_step": None})
    Disk().publish_file(tree.orch_toml, dump(uninterrupted))
    trainer_toml = str(OutputTree(story.outputs).logs / "trainer.toml")
    graftwork(story, "replay", "trainer", trainer_toml, "--output_dir", str(tree.root.parent))
    return compare(source.checkpoint(LAST_STEP) / "trainer", tree.checkpoint(LAST_STEP) / "trainer")


def compare(resumed: Path, replayed: Path) -> tuple[bool, list[str]]:
    names = sorted({path.name for folder in (resumed, replayed) for path in folder.glob("*")})
    differ = [name for name in names if bytes_of(resumed / name) != bytes_of(replayed / name)]
    return bool(names) and not differ, differ if names else ["everything: no checkpoint to compare"]


def bytes_of(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def missed_bars(figures: dict[str, Any]) -> list[str]:
    """Every promise that the figures do not keep."""
    start, warm, cold = figures["reward_start"], figures["reward_step20"], figures["reward_cold_step20"]
    resumed, seconds = figures["reward_resumed_step25"], figures["seconds"]
    bars = {
        f"reward_start is {start:.3f}, not between 0.3 and 0.65": 0.3 <= start <= 0.65,
        f"reward_step20 is {warm:.3f}, not above 0.65": warm > 0.65,
        f"reward_step20 is only {warm - start:.3f} above reward_start, not 0.15": warm - start >= 0.15,
        f"reward_step20 is only {warm - cold:.3f} above reward_cold_step20, not 0.3": warm - cold >= 0.3,
        f"reward_resumed_step25 is {resumed:.3f}, not above 0.65": resumed > 0.65,
        f"the resumed run differs from the replayed one in {figures['resume_differs_in']}": figures["resume_bit_equal"],
        f"it took {seconds:.0f} s, more than 600": seconds <= 600,
    }
    return [message for message, kept in bars.items() if not kept]


def summary(report: dict[str, Any], story: Story) -> list[str]:
    equal = "yes, every byte" if report["resume_bit_equal"] else f"NO: {', '.join(report['resume_differs_in'])}"
    return [
        "",
        f"demo, seed {report['seed']}: mean reward on {HELD_OUT_PROMPTS} held-out prompts, temperature 1",
        f"  {report['reward_start']:.3f}  SFT adapter, where RL starts",
        f"  {report['reward_step20']:.3f}  after 20 steps of RL",
        f"  {report['reward_resumed_step25']:.3f}  stopped, resumed, after step 25",
        f"  {report['reward_cold_step20']:.3f}  20 steps of RL from a fresh adapter instead",
        f"  resumed trainer equals one that never stopped: {equal}",
        f"  {report['seconds']:.0f} seconds",
        *(f"  MISSED: {message}" for message in report["failures"]),
        f"figures: {story.demo / 'report.json'}",
        f"curves and answers: {story.run.root}",
    ]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("demo: stopped; it begins anew when it is started again", file=sys.stderr)
        sys.exit(130)
