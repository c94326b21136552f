"""`make proof-sharded`: one trainer of several ranks, with real processes under torchrun; all parts at full size.

gradients     of a step on 2 and 4 ranks against one rank, dense and mixture of experts
checkpoints   written on 4 ranks, resumed on 2, 1 and 3; a step_0 in 8 files loaded on 3
main          the RL job of examples/reverse_text on 2 ranks and on one, three seeds each
faults        each storage operation of a checkpoint fails, or is followed by a kill, on each rank
kills         kill -9 and a stop of one rank in training: the job ends, says who, starts again, ends with the same bytes
memory        bytes a rank holds against the formula, for 1, 4 and 16 slots on 1, 2 and 4 ranks
load          a base of over 1 GB on 2 and 4 ranks
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from graftwork.adapters.convert import convert_adapter
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.model.base import load_base
from graftwork.store.disk import Disk
from graftwork.store.files import read_lines
from proofs.adapter_models import make_base
from proofs.main import Job as MainJob
from proofs.main import run as graftwork
from proofs.on_ranks import Ask, on_ranks
from proofs.rank_jobs import Job, Strike
from proofs.rank_memory import LARGE, SMALL, write_base
from proofs.report import Part, Proof, run_parts
from proofs.workload import save_adapter

KINDS = ("qwen3", "moe")
GRADIENT_BAR, REWARD_BAR, REWARD_GAP, MEMORY_BAR = 1e-5, 0.65, 0.05, 0.1
STEPS, MAIN_SEEDS = 20, 3
HANG_SECONDS = 15.0
"""rank_timeout_seconds of the job in which a rank is stopped."""
END_SECONDS = 30.0
"""A job must have ended so long after one of its ranks was killed."""
STOPPED_SECONDS = 35.0
"""So much longer it may take when a rank is stopped: torchrun waits 30 seconds before it kills what does not answer."""


def main() -> int:
    return run_parts("sharded", __doc__, PARTS, make_bases)


def make_bases(folder: Path) -> None:
    for kind in KINDS:
        make_base(kind, folder)


# --- parts ------------------------------------------------------------------------------------------------------------


def prove_gradients(proof: Proof, folder: Path, seed: int) -> None:
    found = {}
    for ranks in (2, 4):
        asks = [Ask("proofs.ranks_agree", "gradients", [folder / kind]) for kind in KINDS]
        for kind, said in zip(KINDS, on_ranks(ranks, asks, folder), strict=True):
            for how, difference in said.items():
                what = f"{kind}, {ranks} ranks, {how}"
                proof.check(difference <= GRADIENT_BAR, f"gradients: {what}: {difference:.1e} from those of one rank")
                found[what] = float(f"{difference:.2e}")
    proof.figures["gradients: |difference| / |that of one rank|"] = found


def prove_checkpoints(proof: Proof, folder: Path, seed: int) -> None:
    chain = CheckpointChain(folder)
    for ranks in chain.STARTS:
        chain.start(ranks)
    for kind in KINDS:
        wrong = chain.wrong(kind)
        proof.check(not wrong, f"checkpoints: {kind}: {wrong}")
        proof.count(f"checkpoints: {kind}: resumed on 2, 1 and 3 ranks with the bits of 4", 3, 0 if wrong else 3)
        proof.count(
            f"checkpoints: {kind}: 8 files of the converter read on 3 ranks", 1, int(chain.converted_is_read(kind))
        )


@dataclass
class CheckpointChain:
    """One run's checkpoint as 4 ranks made it, and as 2, 1 and 3 took it up and wrote it again; a base of each kind.

    STARTS: ranks -> (what, run that it reads, run that it writes). states: (kind, run) -> what its checkpoint holds.
    """

    folder: Path
    states: dict[tuple[str, str], Any] = field(default_factory=dict)
    STARTS: ClassVar[Mapping[int, Sequence[tuple[str, str, str]]]] = {
        4: [("train", "cut8", "on4")],
        2: [("carry", "on4", "on2")],
        1: [("carry", "on2", "on1"), ("carry", "cut1", "whole")],
        3: [("carry", "on1", "on3"), ("carry", "cut8", "on3from8")],
    }

    def __post_init__(self) -> None:
        for kind in KINDS:
            for files in (1, 8):
                convert_adapter(Disk(), _adapter(self.folder, kind), self.run(kind, f"cut{files}"), ranks=files)

    def run(self, kind: str, name: str) -> Path:
        return self.folder / kind / f"run_{name}"

    def asks(self, ranks: int) -> dict[tuple[str, str], Ask]:
        """(kind, run) -> how its checkpoint is made."""
        return {
            (kind, to): Ask(
                "proofs.ranks_agree", what, [self.folder / kind, self.run(kind, source), self.run(kind, to)]
            )
            for what, source, to in self.STARTS[ranks]
            for kind in KINDS
        }

    def start(self, ranks: int) -> None:
        asks = self.asks(ranks)
        self.states |= dict(zip(asks, on_ranks(ranks, list(asks.values()), self.folder), strict=True))

    def wrong(self, kind: str) -> list[str]:
        """Checkpoints that do not hold what the first one does, or not in a file for each rank."""
        first, wrong = self.states[kind, "on4"], []
        for ranks in self.STARTS:
            state = self.states[kind, f"on{ranks}"]
            if any(state[part] != first[part] for part in ("step", "masters", "moments")) or not first["moments"]:
                wrong.append(f"on {ranks} ranks: {state}, on 4: {first}")
            if len(state["files"]) != ranks + 1:
                wrong.append(f"{ranks} ranks wrote {state['files']}")
        return wrong

    def converted_is_read(self, kind: str) -> bool:
        """Whether a step_0 in 8 files is on 3 ranks what it is in one file on one rank."""
        eight, one = self.states[kind, "on3from8"], self.states[kind, "whole"]
        return bool(eight["masters"] == one["masters"] and len(eight["files"]) == 4)


def _adapter(folder: Path, kind: str) -> Path:
    """A random adapter for every module of a base."""
    path = folder / f"adapter_{kind}"
    if not path.exists():
        save_adapter(path, load_base(_model(folder / kind), LoraConfig(max_rank=4)))
    return path


def _model(base: Path) -> ModelConfig:
    return ModelConfig(path=str(base), dtype="float32", device="cpu")


def prove_main(proof: Proof, folder: Path, seed: int) -> None:
    """The demo's own job and measure: held-out reward after 20 steps, from the adapter that its SFT makes. A sum in
    another order is another sampled token some steps later, and from there on another run: so seeds are compared, not
    one."""
    sft = folder / "main" / "sft"
    graftwork("sft", "examples/reverse_text/sft.toml", "--output_dir", str(sft), log=folder / "main.log")
    rewards: dict[int, list[float]] = {1: [], 2: []}
    for ranks in rewards:
        for each in range(seed, seed + MAIN_SEEDS):
            root = folder / "main" / f"ranks_{ranks}_seed_{each}"
            flags = ("--run.init_adapter_path", str(sft / "adapter"), "--run.seed", str(each), "--ranks", str(ranks))
            tree = MainJob(root, STEPS, flags).complete()
            proof.check(len(read_lines(tree.metrics_jsonl)) == STEPS, f"main: not {STEPS} steps in {tree.root}")
            rewards[ranks].append(held_out_reward(tree.checkpoint(STEPS) / "weight", each))
    means = {ranks: sum(found) / len(found) for ranks, found in rewards.items()}
    gaps = [abs(two - one) for one, two in zip(rewards[1], rewards[2], strict=True)]
    proof.count(
        f"main: seeds on which 2 ranks are within {REWARD_GAP} of one", 2, sum(gap <= REWARD_GAP for gap in gaps)
    )
    proof.figures["main: held-out reward after 20 steps, by ranks and seed"] = rewards
    proof.figures["main: mean over the seeds, by ranks"] = means
    proof.check(min(rewards[2]) > REWARD_BAR, f"main: rewards {rewards[2]} on 2 ranks, not above {REWARD_BAR}")
    proof.check(abs(means[2] - means[1]) <= REWARD_GAP, f"main: means {means}, further apart than {REWARD_GAP}")


def held_out_reward(adapter: Path, seed: int) -> float:
    command = [sys.executable, "-m", "graftwork", "eval", "examples/reverse_text/rl.toml", "--adapter", str(adapter)]
    done = subprocess.run([*command, "--seed", str(seed), "--json"], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["reward"])


def prove_faults(proof: Proof, folder: Path, seed: int) -> None:
    base = folder / "qwen3"
    [said] = on_ranks(2, [Ask("proofs.rank_faults", "errors", [base, folder / "errors", "all"])], folder)
    proof.failures += [f"faults: {text}" for text in said["failures"]]
    proof.count(
        "faults: an operation of a checkpoint fails on a rank", said["asked"], said["asked"] - len(said["failures"])
    )
    proof.figures["faults: operations of a checkpoint, by rank"] = said["operations"]
    proof.figures["faults: slowest, seconds"] = said["slowest_seconds"]
    killed = 0
    every = [(rank, k) for rank, count in enumerate(said["operations"]) for k in range(1, count + 1)]
    for rank, k in every:
        ask = Ask("proofs.rank_faults", "kill", [base, folder / f"kill_{rank}_{k}", f"{rank}:{k}"])
        [said] = on_ranks(2, [ask], folder, restarts=1)
        proof.check(said["killed"] and said["same"], f"faults: rank {rank} killed after operation {k}: {said}")
        killed += said["killed"] and said["same"]
    proof.count("faults: a rank is killed after an operation of a checkpoint", len(every), killed)


def prove_kills(proof: Proof, folder: Path, seed: int) -> None:
    """One job that nothing happens to; then ranks are killed, and one is stopped, in others."""

    def job(name: str, **settings: Any) -> Job:
        return Job(folder / "jobs" / name, _model(folder / "qwen3"), _adapter(folder, "qwen3"), 2, settings)

    (folder / "jobs").mkdir()
    whole, again = job("whole").run(), job("again").run()
    proof.count("kills: jobs executed twice, bit-equal", 1, int(whole.outcomes() == again.outcomes()))
    proof.failures += [f"kills: {text}" for text in whole.wrong()]
    cases = [(rank, versions, signal.SIGKILL) for rank in (0, 1) for versions in (4, 8, 12)]
    cases += [(1, 6, signal.SIGSTOP), (0, 9, signal.SIGSTOP)]
    equal, seconds = 0, dict[str, float]()
    for rank, versions, number in cases:
        name = f"{signal.Signals(number).name} of rank {rank} after {versions} versions"
        stopped = number == signal.SIGSTOP
        struck = job(name.replace(" ", "_"), **({"rank_timeout_seconds": HANG_SECONDS} if stopped else {}))
        strike = Strike(struck, rank, versions, number)
        struck.run(strike)
        differ = [
            f"run {run}: {text}"
            for run, one in whole.outcomes().items()
            for text in one.differences(struck.outcomes()[run])
        ]
        proof.check(not differ and not struck.wrong(), f"kills: {name}: {differ} {struck.wrong()}")
        proof.check(strike.named() is not None, f"kills: {name}: nobody says which rank it was: {struck.tail}")
        limit = END_SECONDS + (HANG_SECONDS + STOPPED_SECONDS if stopped else 0)
        proof.check(
            strike.seconds <= limit, f"kills: {name}: the job took {strike.seconds:.0f} s to end, not {limit:g}"
        )
        seconds[name] = round(strike.seconds, 1)
        equal += not differ
    proof.count("kills: restarted jobs that ended with the digests of the unkilled one", len(cases), equal)
    proof.figures["kills: seconds until the job ended"] = seconds


def prove_memory(proof: Proof, folder: Path, seed: int) -> None:
    base, table = write_base(folder / "small", SMALL), {}
    for dtype in ("float32", "bfloat16"):
        for ranks in (1, 2, 4):
            [said] = on_ranks(ranks, [Ask("proofs.rank_memory", "slots", [base, dtype, "1,4,16"])], folder)
            for slots, row in said.items():
                what = f"{dtype}, {slots} slots, {ranks} ranks"
                table[what] = row
                proof.check(abs(row["ratio"] - 1) <= MEMORY_BAR, f"memory: {what}: {row}")
    proof.figures["memory: bytes a rank"] = table


def prove_load(proof: Proof, folder: Path, seed: int) -> None:
    small, base = write_base(folder / "small", SMALL), write_base(folder / "large", LARGE)
    for ranks in (2, 4):
        [said] = on_ranks(ranks, [Ask("proofs.rank_memory", "load", [base, small])], folder)
        proof.check(said["base_bytes"] >= 1e9, f"load: the base has {said['base_bytes']} bytes")
        proof.check(said["ratio"] <= 1, f"load: on {ranks} ranks the most memory was {said['peak_bytes']}: {said}")
        proof.figures[f"load: {ranks} ranks"] = said
    Disk().remove_tree(base)


PARTS: Mapping[str, Part] = {
    "gradients": prove_gradients,
    "checkpoints": prove_checkpoints,
    "memory": prove_memory,
    "load": prove_load,
    "kills": prove_kills,
    "faults": prove_faults,
    "main": prove_main,
}

if __name__ == "__main__":
    sys.exit(main())
