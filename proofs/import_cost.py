"""What an import costs: peak memory over its fp32 output, and time over a plain load, hash and save of the same bytes.

    python -m proofs.import_cost [--megabytes 256] [--rounds 5]

Both sides run in processes of their own, in turn (A B A B), after one round that is not counted; ratios are medians.
Memory is the growth of the resident set's peak (Linux: VmHWM) over what the process had with everything imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from graftwork.adapters.convert import Target, convert_adapter, import_adapter
from graftwork.adapters.formats.peft_read import open_peft
from graftwork.adapters.prepare import SlotSpec, Wish
from graftwork.store.disk import Disk

MEMORY_BAR, TIME_BAR = 1.5, 3.0
RANK, HIDDEN, MIDDLE, EXPERTS = 16, 1024, 2048, 16
TENSORS = "adapter_model.safetensors"


def make_source(folder: Path, megabytes: int, kind: str) -> Path:
    """A random adapter of about that size in float32, saved in the kind's own way."""
    folder.mkdir(parents=True)
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
    if kind == "experts":
        shapes |= {f"mlp.experts.{e}.{p}": (MIDDLE, HIDDEN) for e in range(EXPERTS) for p in ("gate_proj", "up_proj")}
        shapes |= {f"mlp.experts.{e}.down_proj": (HIDDEN, MIDDLE) for e in range(EXPERTS)}
    else:
        shapes |= {f"mlp.{p}": (MIDDLE, HIDDEN) for p in ("gate_proj", "up_proj")}
        shapes |= {"mlp.down_proj": (HIDDEN, MIDDLE)}
    layer_bytes = sum(4 * RANK * (out + width) for out, width in shapes.values())
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    tensors = {}
    for layer in range(max(1, megabytes * 2**20 // layer_bytes)):
        for path, (out, width) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.{path}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, width).to(dtype)
            tensors[f"{name}.lora_B.weight"] = torch.randn(out, RANK).to(dtype)
    save_file(tensors, folder / TENSORS)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def import_as_it_is(source: Path, out: Path) -> None:
    import_adapter(Disk(), source, out / "imported", Target())


def import_padded(source: Path, out: Path) -> None:
    with open_peft(source) as opened:
        spec = SlotSpec(2 * RANK, SlotSpec.around(opened).shapes)
    import_adapter(Disk(), source, out / "imported", Target(spec), Wish(rank=2 * RANK, alpha=16.0))


def to_step_0(source: Path, out: Path) -> None:
    convert_adapter(Disk(), source, out / "run_x")


def plain(source: Path, out: Path) -> None:
    """Load, hash and save as many bytes of float32 as the import writes."""
    tensors = {name: tensor.float() for name, tensor in load_file(source / TENSORS).items()}
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(tensor.numpy().data)
    out.mkdir()
    save_file(tensors, out / TENSORS)
    with (out / TENSORS).open("rb") as file:
        os.fsync(file.fileno())


SIDES: dict[str, Callable[[Path, Path], None]] = {
    "import": import_as_it_is, "import, padded": import_padded, "step_0": to_step_0, "plain": plain,
}  # fmt: skip


def written_bytes(out: Path) -> int:
    """Of the adapter's tensors in float32, once: a checkpoint holds them twice."""
    return max(path.stat().st_size for path in out.rglob("*.safetensors"))


def high_water() -> int:
    """Peak resident set of this process in bytes, since the last reset."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def one_side(name: str, source: Path, out: Path) -> dict[str, float]:
    """Run one side here, and measure it."""
    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = high_water(), time.perf_counter()
    SIDES[name](source, out)
    return {"seconds": time.perf_counter() - began, "bytes": high_water() - before}


def in_a_process(name: str, source: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "proofs.import_cost", "--side", name, "--source", str(source), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(megabytes: int, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Row -> memory over output, time over plain, megabytes of output."""
    rows: dict[str, dict[str, float]] = {}
    for kind in ("float32", "bfloat16", "experts"):
        source = make_source(folder / kind, megabytes, kind)
        for side in ("import", "import, padded", "step_0"):
            ratios, memory, size = [], [], 0
            for turn in range(rounds + 1):
                outs = [folder / f"{kind}-{side}-{turn}-{which}" for which in ("ours", "plain")]
                ours, theirs = in_a_process(side, source, outs[0]), in_a_process("plain", source, outs[1])
                size, plain_size = written_bytes(outs[0]), written_bytes(outs[1])
                copies = 2 if side == "step_0" else 1  # masters, and the PEFT export
                if turn:
                    ratios.append(ours["seconds"] / (theirs["seconds"] * copies * size / plain_size))
                    memory.append(ours["bytes"] / size)
                for out in outs:
                    subprocess.run(["rm", "-rf", str(out)], check=True)
            rows[f"{kind}, {side}"] = {
                "memory_over_output": max(memory), "time_over_plain": statistics.median(ratios),
                "time_spread": max(ratios) - min(ratios), "output_megabytes": math.ceil(size / 2**20),
            }  # fmt: skip
        subprocess.run(["rm", "-rf", str(source)], check=True)
    return rows


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--megabytes", type=int, default=256)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--side")
    options.add_argument("--source", type=Path)
    options.add_argument("--out", type=Path)
    given = options.parse_args()
    if given.side:
        print(json.dumps(one_side(given.side, given.source, given.out)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for row, found in measure(given.megabytes, given.rounds, Path(folder)).items():
            print(f"{row:28s} memory {found['memory_over_output']:.2f}x  time {found['time_over_plain']:.2f}x "
                  f"(spread {found['time_spread']:.2f})  {found['output_megabytes']} MB")  # fmt: skip


if __name__ == "__main__":
    main()
