"""Batches in, versions out: the two queues between a run's orchestrator and the trainer.

A batch is one folder, `rollouts/step_k/`, consumed by step k:

    batch.safetensors    ragged arrays: rollout i owns entries offsets[i]:offsets[i+1] of the token arrays
        token_ids        [T] int32     prompts and answers, as sampled; never re-tokenised
        loss_mask        [T] uint8     1 on tokens that the model sampled
        logprobs         [T] float32   sampler's, of the distribution that the token was drawn from; 0 elsewhere
        version_index    [T] int32     index into batch.json's versions; -1 where loss_mask is 0
        offsets          [N+1] int64
        rewards, advantages            [N] float32
        prompt_index, sample_index     [N] int32
    batch.json           run, step, temperature, versions (name, digest, digest_source, and probe: what probing the
                         server found, where only a claim vouches), sampled (what was sampled for it, with what is not
                         in it; absent in batches of older orchestrators)
    orchestrator.json    the orchestrator's state after this batch; the trainer copies it into checkpoints
    STABLE               manifest; its sha256 is the batch's digest

No wall-clock time goes into a batch: the same run sampled twice gives the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from graftwork.errors import BadBatch, BadRunId, Conflict, Damaged
from graftwork.store.disk import Disk
from graftwork.store.files import Content, Manifest, is_stable, read_json, verify
from graftwork.store.layout import RunId, RunTree

BATCH = "batch"
BROADCAST = "broadcast"
BATCH_FILES = ("batch.json", "batch.safetensors", "orchestrator.json")
JSON_BYTES_MAX = 16 * 2**20
TOKEN_BYTES, ROLLOUT_BYTES, HEADER_BYTES_MAX = 13, 24, 2**20
"""Of batch.safetensors: a token's and a rollout's entries in all columns, and the header."""
COUNT_MAX = 2**53
REWARD_MAX = float(np.finfo(np.float32).max)
"""A reward is at most this, either way; a count of what batch.json says was sampled at most COUNT_MAX."""
VERSION_NAME = re.compile(r"(?P<run>[a-z0-9][a-z0-9_-]{0,62})@(?P<step>0|[1-9][0-9]{0,17})-(?P<digest8>[0-9a-f]{8})")

DigestSource = Literal["engine", "claimed"]


@dataclass(frozen=True)
class Version:
    """A run's adapter after a step. Immutable once published."""

    run: RunId
    step: int
    digest: str

    @property
    def name(self) -> str:
        """`<run>@<step>-<digest8>`: what the inference server is told to call it."""
        return f"{self.run}@{self.step}-{self.digest[:8]}"


def parse_version_name(name: str) -> tuple[RunId, int, str]:
    """(run, step, first 8 hex digits of the digest). Raises BadRunId when the name is not a version's."""
    match = VERSION_NAME.fullmatch(name)
    if match is None:
        raise BadRunId(f"{name!r} is not the name of a version (<run>@<step>-<digest8>)")
    return RunId.parse(match["run"]), int(match["step"]), match["digest8"]


@dataclass(frozen=True)
class SampledVersion:
    """A version as a batch records it: who vouches for the digest, the engine itself or only a claim."""

    name: str
    digest: str
    digest_source: DigestSource
    probe: Mapping[str, Any] | None = None
    """What probing the server found (rollouts/probe.py), where the engine cannot vouch."""

    def to_json(self) -> dict[str, Any]:
        said = {"name": self.name, "digest": self.digest, "digest_source": self.digest_source}
        return said if self.probe is None else {**said, "probe": self.probe}


@dataclass(frozen=True)
class Rollout:
    """One answer (or one multi-turn conversation), tokens in and tokens out. Arrays are [L], parallel."""

    prompt_index: int
    sample_index: int
    token_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    logprobs: NDArray[np.float32]
    version_index: NDArray[np.int32]
    reward: float
    advantage: float


@dataclass(frozen=True)
class Sampled:
    """All that was sampled for a batch, also what was left out of it: a curve of its rewards shows the run as it is.

    answers          answers that did not fail, at least one; reward_mean, reward_std and answer_tokens are of these
    failed           answers that did
    equal_groups     prompts whose answers all earned the same
    left_out_groups  those of them that are not in the batch
    """

    rounds: int
    answers: int
    failed: int
    equal_groups: int
    left_out_groups: int
    answer_tokens: int
    reward_mean: float
    reward_std: float


@dataclass(frozen=True)
class Batch:
    """The rollouts that one step consumes. sampled None: its maker did not say."""

    run: RunId
    step: int
    temperature: float
    versions: tuple[SampledVersion, ...]
    rollouts: tuple[Rollout, ...]
    orchestrator_state: dict[str, Any]
    sampled: Sampled | None = None


def publish_batch(disk: Disk, tree: RunTree, batch: Batch) -> str:
    """Publish `rollouts/step_k`; return its digest. Raises Conflict if it exists."""
    facts = {"run": str(batch.run), "step": batch.step}
    lengths = [len(rollout.token_ids) for rollout in batch.rollouts]
    columns: dict[str, NDArray[Any]] = {
        "token_ids": np.concatenate([r.token_ids for r in batch.rollouts]).astype(np.int32),
        "loss_mask": np.concatenate([r.loss_mask for r in batch.rollouts]).astype(np.uint8),
        "logprobs": np.concatenate([r.logprobs for r in batch.rollouts]).astype(np.float32),
        "version_index": np.concatenate([r.version_index for r in batch.rollouts]).astype(np.int32),
        "offsets": np.cumsum([0, *lengths], dtype=np.int64),
        "rewards": np.array([r.reward for r in batch.rollouts], np.float32),
        "advantages": np.array([r.advantage for r in batch.rollouts], np.float32),
        "prompt_index": np.array([r.prompt_index for r in batch.rollouts], np.int32),
        "sample_index": np.array([r.sample_index for r in batch.rollouts], np.int32),
    }
    said = [version.to_json() for version in batch.versions]
    with disk.publish_dir(tree.batch(batch.step), BATCH, facts) as staging:
        staging.write("batch.safetensors", save_safetensors(columns))
        about = {**facts, "temperature": batch.temperature, "versions": said}
        if batch.sampled is not None:
            about["sampled"] = asdict(batch.sampled)
        staging.write_json("batch.json", about)
        staging.write_json("orchestrator.json", batch.orchestrator_state)
    return staging.published.sha256


@dataclass(frozen=True)
class BatchSize:
    """The largest batch that a reader takes into memory."""

    rollouts: int
    tokens: int

    @property
    def bytes(self) -> int:
        return self.tokens * TOKEN_BYTES + (self.rollouts + 1) * ROLLOUT_BYTES + HEADER_BYTES_MAX


def read_batch(tree: RunTree, step: int, most: BatchSize | None = None) -> tuple[Batch, str] | None:
    """The batch of `step` and its digest, every byte verified; None while it is not published.

    Raises BadBatch when what is there is not a batch of this run and step, or larger than `most`: by the sizes of its
    files, before they are read.
    """
    folder = tree.batch(step)
    if not is_stable(folder):
        return None
    try:
        _refuse_too_large(folder, step, most)
        manifest = verify(folder, BATCH)
        about = read_json(folder / "batch.json", "batch")
        columns = load_safetensors((folder / "batch.safetensors").read_bytes())
        state = read_json(folder / "orchestrator.json", "batch")
        versions = tuple(
            SampledVersion(str(v["name"]), str(v["digest"]), v["digest_source"], v.get("probe"))
            for v in about["versions"]
        )
        if (about["run"], about["step"]) != (str(tree.id), step):
            raise BadBatch(f"{folder} is batch {about['step']} of run {about['run']}, expected {step} of {tree.id}")
        if not isinstance(state, dict):
            raise BadBatch(f"{folder / 'orchestrator.json'} holds no table")
        rollouts = _split(columns, len(versions), folder)
        if most is not None and len(rollouts) > most.rollouts:
            raise BadBatch(f"{folder} holds {len(rollouts)} rollouts, the run asks for {most.rollouts} at most")
        batch = Batch(tree.id, step, float(about["temperature"]), versions, rollouts, state, _sampled(about, folder))
        return batch, manifest.sha256
    except Damaged as error:
        raise BadBatch(f"run {tree.id}: batch {step} is damaged: {error}") from None
    except (LookupError, TypeError, ValueError, OverflowError, OSError, SafetensorError) as error:
        raise BadBatch(f"run {tree.id}: {folder} is not a batch ({type(error).__name__}: {error})") from None


def _sampled(about: Any, folder: Path) -> Sampled | None:
    """Raises BadBatch: what is no finite number, or below 0, would go into the run's metrics."""
    if (given := about.get("sampled")) is None:
        return None
    for field in fields(Sampled):
        value = given[field.name]
        least = -REWARD_MAX if field.name == "reward_mean" else 1 if field.name in ("rounds", "answers") else 0
        is_number = type(value) is int or (type(value) is float and field.type == "float")
        if not is_number or not least <= value <= (REWARD_MAX if field.type == "float" else COUNT_MAX):
            raise BadBatch(
                f"{folder / 'batch.json'}: sampled.{field.name} is {value!r}, expected {field.type} >= {least}"
            )
    return Sampled(**{field.name: given[field.name] for field in fields(Sampled)})


def _refuse_too_large(folder: Path, step: int, most: BatchSize | None) -> None:
    """Raises Damaged, BadBatch."""
    if folder.is_symlink():
        raise BadBatch(f"{folder} is a symbolic link; a batch is a folder of the run's own")
    if extra := Manifest.read(folder).files.keys() - set(BATCH_FILES):
        raise BadBatch(f"{folder} is not a batch: it lists {min(extra)}; a batch is {', '.join(BATCH_FILES)}")
    limits = dict.fromkeys(BATCH_FILES, JSON_BYTES_MAX)
    if most is not None:
        limits["batch.safetensors"] = most.bytes
    for name, limit in limits.items():
        path = folder / name
        if path.is_file() and (size := path.stat().st_size) > limit:
            raise BadBatch(
                f"{path} has {size} bytes; a batch of this run has at most {limit}, which is as much as its rollouts "
                "can need"
            )


def _split(columns: dict[str, NDArray[Any]], versions: int, folder: Path) -> tuple[Rollout, ...]:
    """Columns back to rollouts. Raises BadBatch when their lengths or dtypes contradict one another."""
    offsets = columns["offsets"]
    if offsets.ndim != 1 or offsets.dtype != "int64":
        raise BadBatch(f"{folder}: offsets is {offsets.dtype}{list(offsets.shape)}, expected int64[rollouts + 1]")
    expected = {
        "token_ids": ("int32", int(offsets[-1])), "loss_mask": ("uint8", int(offsets[-1])),
        "logprobs": ("float32", int(offsets[-1])), "version_index": ("int32", int(offsets[-1])),
        "rewards": ("float32", len(offsets) - 1), "advantages": ("float32", len(offsets) - 1),
        "prompt_index": ("int32", len(offsets) - 1), "sample_index": ("int32", len(offsets) - 1),
    }  # fmt: skip
    for name, (dtype, length) in expected.items():
        column = columns[name]
        if column.shape != (length,) or column.dtype != dtype:
            raise BadBatch(f"{folder}: {name} is {column.dtype}{list(column.shape)}, expected {dtype}[{length}]")
    if len(offsets) < 2 or offsets[0] != 0 or (np.diff(offsets) <= 0).any():
        raise BadBatch(
            f"{folder}: offsets do not grow from 0; a batch has at least one rollout, each at least one token"
        )
    mask = columns["loss_mask"].astype(bool)
    index = columns["version_index"]
    if (index[mask] < 0).any() or (index >= versions).any():
        raise BadBatch(f"{folder}: a sampled token names a version that batch.json does not list")
    spans = [slice(int(a), int(b)) for a, b in pairwise(offsets)]
    return tuple(
        Rollout(
            prompt_index=int(columns["prompt_index"][i]),
            sample_index=int(columns["sample_index"][i]),
            token_ids=columns["token_ids"][span],
            loss_mask=mask[span],
            logprobs=columns["logprobs"][span],
            version_index=index[span],
            reward=float(columns["rewards"][i]),
            advantage=float(columns["advantages"][i]),
        )
        for i, span in enumerate(spans)
    )


@dataclass(frozen=True)
class Published:
    """A version on disk: `path` holds a PEFT adapter; `facts` is what the trainer said of it."""

    version: Version
    path: Path
    facts: dict[str, Any]

    @property
    def replaces(self) -> tuple[str, ...]:
        """Digests that were published for this step before: batches that were sampled from them still count."""
        return tuple(str(digest) for digest in self.facts.get("replaces", ()))


def read_version(tree: RunTree, step: int) -> Published | None:
    """The published version of `step`, or None while there is none. Raises Damaged. Who loads the bytes checks them."""
    folder = tree.broadcast(step)
    if not is_stable(folder):
        return None
    manifest = Manifest.read(folder)
    try:
        version = Version(
            RunId.parse(manifest.facts["run"]), int(manifest.facts["step"]), str(manifest.facts["digest"])
        )
    except (KeyError, TypeError, ValueError, BadRunId) as error:
        raise Damaged(f"{folder / 'STABLE'} names no version ({type(error).__name__}: {error})") from None
    if (version.run, version.step) != (tree.id, step):
        raise Damaged(f"{folder} is version {version.name}, expected step {step} of run {tree.id}")
    return Published(version, folder, manifest.facts)


def publish_version(
    disk: Disk, tree: RunTree, version: Version, files: Mapping[str, Content], facts: dict[str, Any]
) -> Published:
    """Publish `broadcasts/step_k`. The same step with the same digest and chain again is a no-op; with others the old
    folder is set aside (trash) first: readers that hold it open keep it, its digest stays known to the trainer.
    """
    there = read_version(tree, version.step)
    if there is not None and there.version == version and there.facts.get("chain") == facts.get("chain"):
        return there
    facts = {**facts, "run": str(version.run), "step": version.step, "digest": version.digest}
    if there is not None:
        facts["replaces"] = [*there.replaces, there.version.digest]
    target = tree.broadcast(version.step)
    if target.exists():
        disk.quarantine(target, tree.trash)
    with disk.publish_dir(target, BROADCAST, facts) as staging:
        for name, data in files.items():
            staging.write(name, data)
    published = read_version(tree, version.step)
    if published is None:
        raise Conflict(f"{target} vanished while it was published; is another trainer using the folder?")
    return published
