"""`python -m bench [NAME...]`: the named benchmarks, or all but the long one, each in a process of its own.

The exit code is 0 when every one was measured, at its bar or not.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

NAMES = (
    "step_flops", "step_speed", "step_vs_peft", "many_runs", "rl_vs_trl", "slot_memory", "mixed_adapters",
    "generate_vs_peft", "admission", "version_to_sampler", "checkpoint_stall",
)  # fmt: skip
LONG = ("reward_vs_trl",)
GPU_ONLY = ("long_sequences",)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES + LONG + GPU_ONLY)}")
    parser.add_argument("--quick", action="store_true", help="see that they run; nothing is recorded")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in NAMES + LONG + GPU_ONLY]:
        parser.error(f"there is no benchmark {unknown[0]}; there are {', '.join(NAMES + LONG + GPU_ONLY)}")
    failed = []
    for name in options.names or NAMES:
        began = time.monotonic()
        command = [sys.executable, "-m", f"bench.{name}", *(["--quick"] if options.quick else [])]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        print(f"not measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
