"""`make proof-engines`: unplug things in the middle of runs; each goes on, or stops with the reason, and never hangs.

A `graftwork serve` stays up for a round of all kinds. Each trial submits a run, waits for a random step, unplugs
something of a random kind and waits, within a limit, for the run to be finished; or for its orchestrator to end with
the reason in its log, then mends what was unplugged, and resumes the run to its end. Every run must verify afterwards.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from graftwork.programs.start import is_held
from graftwork.programs.verify import verify_run
from graftwork.store.files import read_json, read_lines
from graftwork.store.layout import OutputTree, RunId, RunTree
from graftwork.store.status import TERMINAL, read_status
from proofs.report import Proof, run_parts

TRIALS, STEPS = 50, 5
LIMIT_SECONDS = 300.0
"""From unplugging to the end of the run, on a machine that may be several times slower than it should be. What bounds
a trial itself is far less: a request 10 s, a rollout 1 s."""
REQUEST_SECONDS, ROLLOUT_SECONDS = 10.0, 1.0
POLL_SECONDS = 0.05
COMMAND = (sys.executable, "-m", "graftwork")
RUN = {
    "max_steps": STEPS,
    "checkpoint_interval_steps": 2,
    "request_timeout_seconds": REQUEST_SECONDS,
    "sampling": {"prompts_per_step": 6, "samples_per_prompt": 4, "max_tokens": 8},
    "retention": {"history": True},
}


@dataclass(frozen=True)
class Kind:
    """Something to unplug.

    strike   does it, in the middle of the run; None: the environment's mood is all
    ends     what the orchestrator's last error must say, if it ends; None: it must not, the run goes on by itself
    must_end  whether it must not go on
    mend     undoes it, before a resume
    mood, share  of the environment
    """

    strike: Callable[[Stage, RunTree, random.Random], None] | None = None
    ends: str | None = None
    must_end: bool = False
    mend: Callable[[RunTree], None] = lambda tree: None
    mood: str = "well"
    share: float = 0.0


@dataclass
class Stage:
    """One `graftwork serve` of the demo's base."""

    outputs: OutputTree
    server: subprocess.Popen[bytes]

    @staticmethod
    def open(folder: Path) -> Stage:
        outputs = OutputTree(folder / "outputs")
        flags = ["--output_dir", str(outputs.root), "--trainer.threads", "1", "--inference.threads", "1"]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "serve.log").open("ab") as log:
            command = [*COMMAND, "serve", "examples/many_runs/serve.toml", *flags]
            server = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        stage = Stage(outputs, server)
        stage.until(outputs.serve_json.exists, LIMIT_SECONDS)
        return stage

    def close(self) -> None:
        self.server.send_signal(signal.SIGTERM)
        self.server.wait(60)

    def graftwork(self, *arguments: str) -> None:
        command = [*COMMAND, *arguments, "--output-dir", str(self.outputs.root)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)
        if done.returncode:
            raise RuntimeError(f"graftwork {arguments[0]} ended with {done.returncode}: {done.stderr}")

    def until(self, happened: Callable[[], bool], seconds: float) -> None:
        """Raises TimeoutError."""
        end = time.monotonic() + seconds
        while not happened():
            if self.server.poll() is not None:
                raise RuntimeError("graftwork serve has ended")
            if time.monotonic() > end:
                raise TimeoutError(f"not within {seconds:g} s")
            time.sleep(POLL_SECONDS)

    def pid_of_inference(self) -> int:
        return int(read_json(self.outputs.logs / "inference.json", "inference")["pid"])

    def pid_of_trainer(self) -> int:
        return int(read_json(self.outputs.trainer_json, "trainer")["pid"])


# --- what is unplugged ------------------------------------------------------------------------------------------------


def kill_inference(stage: Stage, tree: RunTree, rng: random.Random) -> None:
    kill(stage.pid_of_inference())


def kill_trainer(stage: Stage, tree: RunTree, rng: random.Random) -> None:
    kill(stage.pid_of_trainer())


def kill_both(stage: Stage, tree: RunTree, rng: random.Random) -> None:
    kill(stage.pid_of_inference())
    kill(stage.pid_of_trainer())


def kill_orchestrator(stage: Stage, tree: RunTree, rng: random.Random) -> None:
    kill(pid_of_orchestrator(tree))


def stop_inference_shortly(stage: Stage, tree: RunTree, rng: random.Random) -> None:
    pause(stage.pid_of_inference(), rng.uniform(0.2, REQUEST_SECONDS / 2))


def stop_inference_for_longer_than_a_request(stage: Stage, tree: RunTree, rng: random.Random) -> None:
    pause(stage.pid_of_inference(), REQUEST_SECONDS * rng.uniform(1.2, 2))


def stop_orchestrator(stage: Stage, tree: RunTree, rng: random.Random) -> None:
    pause(pid_of_orchestrator(tree), rng.uniform(0.2, 5))


def fill_the_disk_of_samples(stage: Stage, tree: RunTree, rng: random.Random) -> None:
    """From now on the orchestrator cannot make a file larger than samples.jsonl is now."""
    most = tree.samples_jsonl.stat().st_size
    resource.prlimit(pid_of_orchestrator(tree), resource.RLIMIT_FSIZE, (most, most))


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def pause(pid: int, seconds: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    os.kill(pid, signal.SIGCONT)


def pid_of_orchestrator(tree: RunTree) -> int:
    """Its lock names it: `the orchestrator of run a, pid 12`."""
    return int(tree.orchestrator_lock.read_text().rpartition("pid ")[2])


def plug_in(tree: RunTree) -> None:
    mended_file(tree).touch()


def mended_file(tree: RunTree) -> Path:
    return tree.root.parent / f"mended_{tree.id}"


KINDS: Mapping[str, Kind] = {
    "the server is killed": Kind(kill_inference),
    "the server stands still for a while": Kind(stop_inference_shortly),
    "the server stands still for longer than a request may take": Kind(
        stop_inference_for_longer_than_a_request, ends="no answer within"
    ),
    "the trainer is killed": Kind(kill_trainer),
    "server and trainer are killed": Kind(kill_both),
    "the orchestrator is killed": Kind(kill_orchestrator, ends=""),
    "the orchestrator stands still for a while": Kind(stop_orchestrator),
    "the environment raises now and then": Kind(mood="raises", share=0.2),
    "the environment raises too often": Kind(
        mood="raises", share=0.8, ends="max_failed_share", must_end=True, mend=plug_in
    ),
    "the environment hangs now and then": Kind(mood="hangs", share=0.2),
    "the environment hangs too often": Kind(
        mood="hangs", share=0.8, ends="max_failed_share", must_end=True, mend=plug_in
    ),
    "the disk of the samples is full": Kind(
        fill_the_disk_of_samples, ends="cannot be written ([Errno 27] File too large"
    ),
}


# --- a trial ----------------------------------------------------------------------------------------------------------


def play(stage: Stage, name: str, kind: Kind, rng: random.Random) -> list[str]:
    """What fell short in a trial."""
    tree = stage.outputs.run(RunId(name))
    options = {"mood": kind.mood, "share": kind.share, "mended": str(mended_file(tree))}
    environment = {"name": "proofs.unplugged:Unplugged", "timeout_seconds": ROLLOUT_SECONDS, "options": options}
    settings = stage.outputs.root.parent / f"{name}.toml"
    settings.write_text(tomli_w.dumps({**RUN, "environment": environment}))
    stage.graftwork("submit", str(settings), "--id", name)
    if kind.strike is not None:
        step = rng.randrange(1, STEPS - 1)
        stage.until(lambda: step_of(tree) >= step or ended(tree), LIMIT_SECONDS)
        time.sleep(rng.uniform(0, 0.3))
        kind.strike(stage, tree, rng)
    try:
        stage.until(lambda: ended(tree) or (kind.ends is not None and gone(tree)), LIMIT_SECONDS)
    except TimeoutError:
        return [f"it hangs: {read_status(tree)}"]
    short = []
    if kind.must_end and ended(tree):
        short.append("it went on to its end, and should have stopped with the reason")
    if kind.ends is not None and not ended(tree):
        if kind.ends not in (said := last_error(tree)):
            short.append(f"its orchestrator ended without the reason {kind.ends!r}: {said!r}")
        kind.mend(tree)
        stage.graftwork("resume", name)
        try:
            stage.until(lambda: ended(tree), LIMIT_SECONDS)
        except TimeoutError:
            return [*short, f"it hangs after the resume: {read_status(tree)}"]
    status = read_status(tree)
    if status is None or status.state != "finished":
        short.append(f"it should have finished: {status}")
    short += [f"verify: {finding}" for finding in verify_run(tree).findings]
    if kind.share and kind.ends is None and not any("error" in row for row in read_lines(tree.samples_jsonl)):
        short.append("no failed rollout is recorded")
    return short


def step_of(tree: RunTree) -> int:
    status = read_status(tree)
    return -1 if status is None or status.step is None else status.step


def ended(tree: RunTree) -> bool:
    status = read_status(tree)
    return status is not None and status.state in TERMINAL


def gone(tree: RunTree) -> bool:
    """Whether the run's orchestrator was there and is not any more."""
    return tree.orchestrator_lock.exists() and not is_held(tree.orchestrator_lock)


def last_error(tree: RunTree) -> str:
    lines = (tree.logs / "orchestrator.log").read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith("error: ")), "")


def draw(rng: random.Random, count: int) -> list[list[str]]:
    """Kinds of so many trials, in rounds: each kind once in a round, in random order; the last one may be shorter."""
    rounds = [rng.sample(sorted(KINDS), len(KINDS)) for _ in range(-(-count // len(KINDS)))]
    return [*rounds[:-1], rounds[-1][: count - len(KINDS) * (len(rounds) - 1)]]


def trials(stage: Stage, kinds: list[str], rng: random.Random, first: int = 0) -> tuple[Counter[str], list[str]]:
    """(trials that held, by kind; what fell short). first: number of the first."""
    held: Counter[str] = Counter()
    failures = []
    for number, title in enumerate(kinds, first):
        began = time.monotonic()
        short = play(stage, f"t{number:02d}", KINDS[title], rng)
        print(f"  t{number:02d} {title}: {'; '.join(short) or 'held'} ({time.monotonic() - began:.1f} s)", flush=True)
        failures += [f"t{number:02d}, {title}: {words}" for words in short]
        held[title] += not short
    return held, failures


def prove_trials(proof: Proof, folder: Path, seed: int) -> None:
    rng, held, tried = random.Random(seed), Counter[str](), 0
    for number, kinds in enumerate(draw(rng, TRIALS)):
        stage = Stage.open(folder / f"round_{number}")  # anew: serve gives up a child that dies too often
        try:
            well, failures = trials(stage, kinds, rng, tried)
        finally:
            stage.close()
        held, tried = held + well, tried + len(kinds)
        for failure in failures:
            proof.check(False, failure)
    figures: dict[str, Any] = dict(sorted(held.items()))
    proof.figures["held, by kind"] = figures
    proof.count("trials", TRIALS, held.total())
    proof.count("kinds", len(KINDS), sum(count > 0 for count in held.values()))


def main() -> int:
    return run_parts("engines", __doc__, {"trials": prove_trials})


if __name__ == "__main__":
    sys.exit(main())
