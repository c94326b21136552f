"""Row 6: how long does a run take, from the start of its processes, to a reward of 0.65, against TRL's GRPOTrainer?

The task, the SFT adapter, the batch (64 prompts x 8 answers) and what is scored are those of rl_vs_trl, on three seeds.
A side is there at the end of the first step at which the mean training reward (temperature 1) of the last two batches
is at least 0.65; 30 steps at most, and who is not there by then counts as never. TRL has the best of three learning
rates, chosen on the first seed; Graftwork has that of examples/reverse_text, and leaves groups whose rewards are all
equal out of its batches, as it does unless told otherwise. One run in lockstep samples and learns in turn, so that each
of the two has both cores. Each round is a seed: TRL's run, then Graftwork's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from bench import harness
from bench.graftwork_rl import FOLDER, Told, Work, sft_adapter, train
from bench.harness import Measured, Ratio, Setting, at_most, need
from bench.rl_vs_trl import PASS_SEQUENCES, PEER, TrlTold, trl_of, trl_run

REWARD = 0.65
BATCHES = 2
STEPS_MAX = 30
SEEDS = (0, 1, 2)
TRL_LEARNING_RATES = (1e-3, 2e-3, 4e-3)


def is_there(rewards: Sequence[float], wanted: float) -> bool:
    """Whether `rewards`, one a batch, end with a running mean that is high enough."""
    return len(rewards) >= BATCHES and sum(rewards[-BATCHES:]) / BATCHES >= wanted


def first_step(rewards: Sequence[float], wanted: float) -> int | None:
    return next((step for step in range(1, len(rewards) + 1) if is_there(rewards[:step], wanted)), None)


def trl_seconds(told: TrlTold, wanted: float) -> float:
    """Until it was there; infinity: never."""
    step = first_step(told.about["rewards"], wanted)
    return math.inf if step is None else float(told.about["steps_ended"][step - 1]) - told.began


def measure(setting: Setting) -> Iterator[Measured]:
    need(*PEER)
    seeds, rates = (SEEDS[:1], TRL_LEARNING_RATES[:1]) if setting.quick else (SEEDS, TRL_LEARNING_RATES)
    wanted = 0.4 if setting.quick else REWARD
    sft_adapter(setting.device)

    def peer(seed: int, rate: float) -> TrlTold:
        settings = {"learning_rate": rate, "steps": STEPS_MAX, "stop_at_reward": wanted}
        return trl_run(trl_of(seed, setting.device, FOLDER / "reward_trl", pass_sequences=PASS_SEQUENCES, **settings))

    def ours(seed: int) -> Told:
        work = Work(
            device=setting.device,
            seeds=(seed,),
            steps=STEPS_MAX,
            skip_equal_groups=True,
            trainer_threads=2,
            inference_threads=2,
        )
        return train(work, FOLDER / "reward", lambda rows: is_there([row["reward"] for row in rows], wanted))

    tried = {rate: peer(seeds[0], rate) for rate in rates}
    best = min(rates, key=lambda rate: (trl_seconds(tried[rate], wanted), rate))
    trl, graftwork = [tried[best]], [ours(seeds[0])]
    for seed in seeds[1:]:
        trl.append(peer(seed, best))
        graftwork.append(ours(seed))
    theirs = [trl_seconds(told, wanted) for told in trl]
    mine = [math.inf if told.reached[0] is None else told.reached[0] for told in graftwork]
    if math.inf in mine:
        yield Measured(
            6, "reward_vs_trl", None, at_most(0.5), {"missing": "a run did not get there", "ours": told_of(mine)}
        )
        return
    ratio = Ratio.of(mine, theirs)
    figures = {
        **ratio.figures(),
        "reward": wanted,
        "seeds": list(seeds),
        "seconds": {"graftwork": told_of(mine), "trl": told_of(theirs)},
        "steps": {
            "graftwork": [len(told.rows[0]) for told in graftwork],
            "trl": [first_step(told.about["rewards"], wanted) for told in trl],
        },
        "start_up_seconds": {
            "graftwork": [round(told.admitted, 1) for told in graftwork],
            "trl": [round(told.start_up, 1) for told in trl],
        },
        "trl_learning_rate": best,
        "trl_seconds_by_learning_rate": dict(
            zip(map(str, rates), told_of([trl_seconds(tried[rate], wanted) for rate in rates]), strict=True)
        ),
        "rewards_of_seed_0": {
            "graftwork": [round(row["reward"], 3) for row in graftwork[0].rows[0]],
            "trl": {str(rate): [round(reward, 3) for reward in tried[rate].about["rewards"]] for rate in rates},
        },
    }
    yield Measured(6, "reward_vs_trl", ratio.median, at_most(0.5), figures)


def told_of(seconds: Sequence[float]) -> list[Any]:
    """For JSON: null is never."""
    return [None if math.isinf(each) else round(each, 1) for each in seconds]


if __name__ == "__main__":
    harness.main(6, "reward_vs_trl", __doc__, measure)
