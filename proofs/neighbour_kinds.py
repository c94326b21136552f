"""What a bad neighbour does. Each kind harms its own run's folder and touches nothing else; beside it stands what must
become of the run: the state that it ends in, and words of the reason in its status.json.

Most are forged batches: a whole batch is published, opened, changed, and published again with a manifest that fits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save

from graftwork.config.load import dump
from graftwork.config.run import RunConfig
from graftwork.store.files import MANIFEST, Manifest, read_json
from graftwork.store.layout import RunTree
from graftwork.store.queue import BATCH, Batch, Version, publish_batch
from graftwork.store.status import State
from graftwork.training.tenant import Tenant
from proofs.adapter_models import VOCAB
from proofs.neighbour_lab import (
    LONGEST,
    MAX_STEPS,
    PROMPTS,
    SAMPLES,
    SHORTEST,
    TOKENS_PER_MICRO_BATCH,
    Scene,
    made_up_batch,
)

HOUR_SECONDS = 3600.0


@dataclass
class Offender:
    """A run that behaves until it has taken `at` steps, and then does what its kind does, once.

    rollouts: in each of its batches. silent: it sends no more batches. struck: the step at which it did harm, and when.
    versions: what it could sample from, by step. removed: its folder is gone, by its own deed.
    """

    scene: Scene
    tree: RunTree
    config: RunConfig
    kind: Kind
    at: int
    rollouts: int
    rng: np.random.Generator
    versions: dict[int, Version] = field(default_factory=dict)
    silent: bool = False
    removed: bool = False
    struck: int | None = None
    struck_seconds: float = 0.0

    @property
    def tenant(self) -> Tenant | None:
        """None without a slot."""
        return self.scene.trainer.tenants.get(self.tree.id)

    @property
    def seated(self) -> Tenant:
        tenant = self.tenant
        assert tenant is not None
        return tenant

    @property
    def next_step(self) -> int:
        return self.seated.step + 1

    def turn(self) -> None:
        """What its orchestrator does between two passes."""
        if self.tenant is None or self.seated.finished or self.seated.work is not None:
            return
        here = self.seated.step
        self.versions[here] = Version(self.tree.id, here, self.seated.known[here][-1])
        if self.struck is None and here >= self.at:
            self.struck, self.struck_seconds = here, self.scene.clock.now
            self.kind.harm(self)
        elif not self.silent and not self.removed and not self.tree.batch(self.next_step).exists():
            self.publish(self.batch())

    def batch(
        self, *, after: int = 1, sampled_from: int | None = None, lengths: list[int] | None = None,
        advantage: float | None = None,
    ) -> Batch:  # fmt: skip
        """after: how many steps from here it is consumed."""
        if lengths is None:
            lengths = self.rng.integers(SHORTEST, LONGEST + 1, self.rollouts).tolist()
        here = self.seated.step
        version = self.versions[here if sampled_from is None else sampled_from]
        return made_up_batch(self.tree.id, here + after, version, self.rng, lengths, advantage)

    def publish(self, batch: Batch) -> Path:
        publish_batch(self.scene.disk, self.tree, batch)
        return self.tree.batch(batch.step)

    def forge(self, change: Change) -> None:
        """Publish a batch that `change` was done to; its manifest fits."""
        folder = self.publish(self.batch())
        facts = Manifest.read(folder).facts
        columns = load_file(folder / "batch.safetensors")
        about, state = (read_json(folder / f"{name}.json", name) for name in ("batch", "orchestrator"))
        shutil.rmtree(folder)
        data = change(self, columns, about)
        with self.scene.disk.publish_dir(folder, BATCH, facts) as staging:
            staging.write("batch.safetensors", save(columns) if data is None else data)
            staging.write_json("batch.json", about)
            staging.write_json("orchestrator.json", state)


Columns = dict[str, NDArray[Any]]
Change = Callable[[Offender, Columns, dict[str, Any]], bytes | None]
"""Changes columns and batch.json in place, or returns other bytes for batch.safetensors."""
Harm = Callable[[Offender], None]
Fate = State | Literal["goes on", "removed", "unwritten"]
"""goes on: it takes further steps. removed: its folder is gone, so nothing can say it but the trainer. unwritten: its
status cannot be written, and it is left alone."""


def at_once(offender: Offender) -> bool:
    return True


def after_steps(count: int) -> Callable[[Offender], bool]:
    def visible(offender: Offender) -> bool:
        assert offender.struck is not None
        return offender.tenant is None or offender.seated.step >= offender.struck + count

    return visible


def after_an_hour(offender: Offender) -> bool:
    return offender.scene.clock.now - offender.struck_seconds > HOUR_SECONDS


def once_removed(offender: Offender) -> bool:
    return offender.removed


def once_linked(offender: Offender) -> bool:
    return offender.scene.good.batch(1).exists()


@dataclass(frozen=True)
class Kind:
    """says: words of the reason. visible: whether the trainer could have seen the harm by now. earliest: the first step
    at which it can be done."""

    harm: Harm
    says: str = ""
    fate: Fate = "failed"
    visible: Callable[[Offender], bool] = at_once
    settings: Mapping[str, Any] = field(default_factory=dict)
    earliest: int = 0


# --- batches ----------------------------------------------------------------------------------------------------------


def forged(change: Change) -> Harm:
    return lambda offender: offender.forge(change)


def put(name: str, value: float) -> Change:
    """Into one rollout: its own entry, or that of its last token, which was sampled."""

    def change(offender: Offender, columns: Columns, about: dict[str, Any]) -> None:
        index = int(offender.rng.integers(offender.rollouts))
        if len(columns[name]) != offender.rollouts:
            index = int(columns["offsets"][index + 1]) - 1
        columns[name][index] = value

    return change


def without_a_column(offender: Offender, columns: Columns, about: dict[str, Any]) -> None:
    del columns[str(offender.rng.choice(["advantages", "logprobs"]))]


def without_rollouts(offender: Offender, columns: Columns, about: dict[str, Any]) -> None:
    columns.update({name: column[:0] for name, column in columns.items() if name != "offsets"})
    columns["offsets"] = columns["offsets"][:1]


def with_shrinking_offsets(offender: Offender, columns: Columns, about: dict[str, Any]) -> None:
    columns["offsets"][1] = -1


def with_a_short_column(offender: Offender, columns: Columns, about: dict[str, Any]) -> None:
    name = str(offender.rng.choice(["token_ids", "loss_mask", "logprobs", "version_index", "rewards"]))
    columns[name] = columns[name][:-1].copy()


def with_wide_integers(offender: Offender, columns: Columns, about: dict[str, Any]) -> None:
    columns["token_ids"] = columns["token_ids"].astype(np.int64)


def of_unknown_version(offender: Offender, columns: Columns, about: dict[str, Any]) -> None:
    unknown = Version(offender.tree.id, offender.seated.step, "f" * 64)
    about["versions"] = [{"name": unknown.name, "digest": unknown.digest, "digest_source": "engine"}]


def of_another_runs_version(offender: Offender, columns: Columns, about: dict[str, Any]) -> None:
    about["versions"][0]["name"] = replace(offender.versions[offender.seated.step], run=offender.scene.good.id).name


def of_another_step(offender: Offender, columns: Columns, about: dict[str, Any]) -> None:
    about["step"] += int(offender.rng.choice([-1, 1]))


def random_bytes(offender: Offender, columns: Columns, about: dict[str, Any]) -> bytes:
    return offender.rng.bytes(1000)


def too_long(offender: Offender) -> None:
    offender.publish(offender.batch(lengths=[SHORTEST, TOKENS_PER_MICRO_BATCH + 1]))


def too_many(offender: Offender) -> None:
    offender.publish(offender.batch(lengths=[SHORTEST] * 10 * PROMPTS * SAMPLES))


def too_large(offender: Offender) -> None:
    """A gibibyte, with holes."""
    with (offender.publish(offender.batch()) / "batch.safetensors").open("r+b") as file:
        file.truncate(2**30)


def stale(offender: Offender) -> None:
    offender.publish(offender.batch(sampled_from=offender.seated.step - 1))


def damaged(offender: Offender) -> None:
    path = offender.publish(offender.batch()) / "batch.safetensors"
    data = bytearray(path.read_bytes())
    data[int(offender.rng.integers(len(data)))] ^= 1
    path.write_bytes(data)


def manifest_is_no_json(offender: Offender) -> None:
    (offender.publish(offender.batch()) / MANIFEST).write_bytes(b'{"format": 1, "kind')


def manifest_is_a_folder(offender: Offender) -> None:
    """Such a batch is never published."""
    manifest = offender.publish(offender.batch()) / MANIFEST
    manifest.unlink()
    manifest.mkdir()
    wait_an_hour(offender)


def link_to_another_runs_batch(offender: Offender) -> None:
    link = offender.tree.batch(offender.next_step)
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(offender.scene.good.batch(1))


def not_finite(offender: Offender) -> None:
    """Three batches at once, all from the version that is there: a skipped step leaves the weights as they are."""
    for after in (1, 2, 3):
        offender.publish(offender.batch(after=after, sampled_from=offender.seated.step, advantage=3e38))


def flood(offender: Offender) -> None:
    """Every batch that the run will take, at once, and all that it will not, up to step 500."""
    steps = range(offender.next_step, MAX_STEPS + 1)
    for step in steps:
        after = step - offender.seated.step
        last = offender.publish(offender.batch(after=after, sampled_from=offender.seated.step))
    for step in range(MAX_STEPS + 1, 501):
        shutil.copytree(last, offender.tree.batch(step), copy_function=os.link)


def wait_an_hour(offender: Offender) -> None:
    offender.silent = True
    offender.scene.clock.pace_seconds = HOUR_SECONDS / 4


# --- folders and files ------------------------------------------------------------------------------------------------


def remove(offender: Offender) -> None:
    shutil.rmtree(offender.tree.root)
    offender.removed = True


def remove_in_mid_step(offender: Offender) -> None:
    """Between two micro-batches of one step and one pass: of 33, 33 and 11 tokens the first pass learns 33, and what is
    left of its 40 is enough for both others in the next."""
    tenant, before = offender.seated, offender.seated.tokens_learnt
    offender.publish(offender.batch(lengths=[LONGEST] * 7))

    def deed() -> None:
        if tenant.work is not None and len(tenant.learner.rounds) == 1 and tenant.tokens_learnt > before:
            remove(offender)
            offender.scene.clock.deeds.remove(deed)

    offender.scene.clock.deeds.append(deed)


def remove_while_published(offender: Offender) -> None:
    offender.publish(offender.batch())

    def deed(target: Path) -> None:
        if target.parent == offender.tree.broadcasts:
            remove(offender)
            offender.scene.disk.deeds.remove(deed)

    offender.scene.disk.deeds.append(deed)


def rewrite_config(data: bytes) -> Harm:
    def harm(offender: Offender) -> None:
        offender.tree.orch_toml.write_bytes(data)

    return harm


def stop(offender: Offender) -> None:
    offender.tree.orch_toml.write_bytes(dump(offender.config.model_copy(update={"stop": True})))


def delete_config(offender: Offender) -> None:
    offender.tree.orch_toml.unlink()


def spoil_status(offender: Offender) -> None:
    offender.tree.status_json.write_bytes(b'{"run": "good", "state": "finis')


def make_folder_of_status(offender: Offender) -> None:
    offender.tree.status_json.unlink()
    offender.tree.status_json.mkdir()
    offender.publish(offender.batch())


def make_file_of(name: str) -> Harm:
    """Of a folder that the trainer has to write into."""

    def harm(offender: Offender) -> None:
        folder = offender.tree.root / name
        shutil.rmtree(folder)
        folder.write_bytes(b"")
        offender.publish(offender.batch())

    return harm


MISHAPS: Mapping[str, Kind] = {
    "NaN advantage": Kind(forged(put("advantages", float("nan"))), "advantage nan"),
    "infinite advantage": Kind(forged(put("advantages", float("inf"))), "advantage inf"),
    "NaN log-prob": Kind(forged(put("logprobs", float("nan"))), "log-prob that is not finite"),
    "infinite log-prob": Kind(forged(put("logprobs", float("-inf"))), "log-prob that is not finite"),
    "log-prob above 0": Kind(forged(put("logprobs", 0.5)), "above 0"),
    "missing column": Kind(forged(without_a_column), "is not a batch (KeyError"),
    "token id below 0": Kind(forged(put("token_ids", -1)), "token id -1"),
    "token id beyond the vocabulary": Kind(forged(put("token_ids", VOCAB)), f"token id {VOCAB}"),
    "no rollouts": Kind(forged(without_rollouts), "at least one rollout"),
    "too long a rollout": Kind(too_long, f"{TOKENS_PER_MICRO_BATCH + 1} tokens"),
    "shrinking offsets": Kind(forged(with_shrinking_offsets), "offsets do not grow"),
    "short column": Kind(forged(with_a_short_column), "expected"),
    "wrong dtype": Kind(forged(with_wide_integers), "token_ids is int64"),
    "unknown version": Kind(forged(of_unknown_version), "never published"),
    "version of another run": Kind(forged(of_another_runs_version), "not one of this run's"),
    "stale batch": Kind(stale, "oldest allowed is", "goes on", settings={"max_staleness_steps": 0}, earliest=1),
    "batch of another step": Kind(forged(of_another_step), "is batch"),
    "random bytes": Kind(forged(random_bytes), "is not a batch"),
    "manifest that is no JSON": Kind(manifest_is_no_json, "is not JSON"),
    "manifest that is a folder": Kind(manifest_is_a_folder, "no batch", "evicted", after_an_hour),
    "link to another run's batch": Kind(link_to_another_runs_batch, "symbolic link", visible=once_linked),
    "damaged byte": Kind(damaged, "sha256"),
    "far too many rollouts": Kind(too_many, "the run asks for 8 at most"),
    "far too large a file": Kind(too_large, "as much as its rollouts can need"),
    "gradients that are not finite": Kind(not_finite, "not finite", "evicted", after_steps(3)),
    "no batch for an hour": Kind(wait_an_hour, "no batch", "evicted", after_an_hour),
    "flood": Kind(flood, "", "goes on"),
    "folder removed": Kind(remove, "", "removed"),
    "folder removed in mid-step": Kind(remove_in_mid_step, "", "removed", once_removed),
    "folder removed while a version is published": Kind(remove_while_published, "", "removed", once_removed),
    "half-written config": Kind(rewrite_config(b"max_steps = 6\nseed ="), "not TOML", "evicted"),
    "config with an unknown key": Kind(rewrite_config(b"max_step = 6\n"), "no such key"),
    "config deleted": Kind(delete_config, "is absent", "evicted"),
    "garbage in status.json": Kind(spoil_status, "", "goes on"),
    "status.json that is a folder": Kind(make_folder_of_status, "", "unwritten", after_steps(1)),
    "checkpoints that is a file": Kind(make_file_of("checkpoints"), "checkpoints", "failed", after_steps(2)),
    "broadcasts that is a file": Kind(make_file_of("broadcasts"), "broadcasts", "failed", after_steps(1)),
    "stop": Kind(stop, "", "stopped"),
}
