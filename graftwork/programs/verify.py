"""`graftwork runs verify`: whether what lies in a run's folder is what was trained on, published and saved.

The chain is recomputed from the digests of the batches; then every batch, broadcast and checkpoint that is there is
read whole and held against its line, and what must be there is missed. Nothing is written. A run that is being trained
is looked at twice: only what is wrong both times is reported.

What this can tell, and what it cannot:

- The hashes hold one another, and nothing signs them. Whoever can write the whole folder can make a chain of their own
  from step 0 on, or drop its first lines and say that the run was admitted later; they cannot change a batch, a version
  or the masters of a checkpoint and leave the others as they are.
- The digest of an adapter covers its factors and scales. AdamW's moments are in no digest and no chain: a checkpoint
  whose moments were changed, with a manifest made to fit, passes. So do other companions in weight/ (tokenizer files),
  another tale of where the run came from (report.json, `start` and `base_fingerprint` in state.json), and another
  probe (probe.json).
- orchestrator/state.json is compared with the batch that it was copied from, reference/ with the version of step 0,
  as long as the chain reaches back to them.
- A batch may have been sampled from a version that was later replaced (a resume on another machine). Which ones
  those were is believed where it is said: in the broadcast's manifest (`replaces`), in known_digests of a checkpoint.
- A step_0 that was converted without sight of the slots is what the run's start was made from, not the start itself: it
  is verified on its own.
- A file that retention may have removed by now is not missed; an older checkpoint is not, at any time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.snapshot import STATE_FILE, Snapshot, is_unfitted, read_snapshot
from graftwork.config.load import digest as digest_of
from graftwork.config.load import load
from graftwork.config.run import RunConfig
from graftwork.errors import BadBatch, ConfigError, Damaged, GraftworkError
from graftwork.store.chain import Link, faults_in, read_chain
from graftwork.store.checkpoint import WEIGHT, Cursor, open_checkpoint
from graftwork.store.files import is_stable, verify
from graftwork.store.layout import STEP_NAME, RunTree, stable_steps
from graftwork.store.queue import BROADCAST, Published, SampledVersion, parse_version_name, read_batch, read_version
from graftwork.store.status import Status, read_status

T = TypeVar("T")
ENDED_WELL = frozenset({"finished", "stopped", "evicted"})
SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Report:
    """findings: each names a file, what was expected and what was found; none if the whole chain holds.
    checked: how many links, batches, pending batches, broadcasts, checkpoints, and versions that batches name; of
    those, `unknown_versions` are older than the chain and nothing is left that could vouch for them."""

    run: str
    findings: list[str]
    checked: dict[str, int]


@dataclass(frozen=True)
class Finding:
    path: Path
    text: str

    def __str__(self) -> str:
        return self.text if str(self.path) in self.text else f"{self.path}: {self.text}"


def verify_run(tree: RunTree) -> Report:
    """Read the whole run and say what does not hold. Raises nothing for what a folder may hold."""
    examination = Examination(tree)
    if examination.findings and examination.moves:
        again = Examination(tree)
        twice = {finding.path for finding in examination.findings}
        again.findings = [finding for finding in again.findings if finding.path in twice]
        examination = again
    texts = dict.fromkeys(map(str, examination.findings))
    return Report(str(tree.id), list(texts), dict(examination.checked))


class Examination:
    """One look at the run, from the chain outwards. Steps before the first link have no line to be held against;
    steps after the last are pending: a trainer was, or is, about to consume them."""

    def __init__(self, tree: RunTree) -> None:
        self.tree = tree
        self.findings: list[Finding] = []
        kinds = ("links", "batches", "pending", "broadcasts", "checkpoints", "versions", "unknown_versions")
        self.checked = Counter(dict.fromkeys(kinds, 0))
        self.batches: dict[int, str] = {}
        """Digests of those that are what was trained on, or pending."""
        self.orchestrator_states: dict[int, dict[str, Any]] = {}
        self.sampled: dict[int, tuple[SampledVersion, ...]] = {}
        """The versions that these were sampled from."""
        self.published: dict[int, set[str]] = {}
        """Digests that a broadcast vouches for: its own, and those that it replaced."""
        self.known: dict[int, set[str]] = {}
        """Digests that a checkpoint knows."""

        earlier = self._attempt(tree.status_json, partial(read_status, tree))
        links = self._attempt(tree.chain_jsonl, partial(read_chain, tree))
        self.status = self._attempt(tree.status_json, partial(read_status, tree))
        self.moves = earlier != self.status or (earlier is not None and earlier.state == "active")
        """Whether a trainer may be changing the folder while we look."""
        self.links = {link.step: link for link in links or ()}
        self.first, self.last = min(self.links, default=None), max(self.links, default=None)
        self.config = _config_of(tree)
        self.is_changing = self.status is not None and self.status.orch_digest != _orch_digest_of(tree)
        """Whether orch.toml says what the status does not tell of yet: an admission may be under way."""
        self.there = {p: self._steps_in(p) for p in (tree.rollouts, tree.broadcasts, tree.checkpoints)}

        self._check_links(links)
        self._check_each(tree.rollouts, self._check_batch)
        self._check_each(tree.checkpoints, self._check_checkpoint)
        self._check_each(tree.broadcasts, self._check_broadcast)
        self._check_sampled()
        self._check_nothing_is_missing()
        self._check_status(earlier)

    def _found(self, path: Path, text: str) -> None:
        self.findings.append(Finding(path, text))

    def _compare(self, path: Path, what: str, expected: object, found: object) -> bool:
        """Whether they are equal; a finding if not."""
        if expected != found:
            self._found(path, f"{what}: expected {_shown(expected)}, found {_shown(found)}")
        return expected == found

    def _attempt(self, path: Path, read: Callable[[], T]) -> T | None:
        """What `read` returns; None, and a finding about `path`, when what is there cannot be read."""
        try:
            return read()
        except (GraftworkError, OSError) as error:
            self._found(path, str(error))
            return None

    def _steps_in(self, parent: Path) -> list[int]:
        """Steps that are there, ascending. A folder without a manifest was never published."""
        for path in sorted(parent.iterdir()) if parent.is_dir() else []:
            if STEP_NAME.fullmatch(path.name) and not is_stable(path):
                self._found(path, "has no manifest (STABLE): it was not published so")
        return stable_steps(parent)

    def _check_each(self, parent: Path, check: Callable[[int], None]) -> None:
        for step in self.there[parent]:
            self._attempt(parent / f"step_{step}", partial(check, step))

    def _is_before(self, step: int) -> bool:
        """Whether there is no line for `step` because the chain begins later, or because there is none at all."""
        return self.first is None or step < self.first

    def _is_after(self, step: int) -> bool:
        return self.last is not None and step > self.last

    # --- the chain ----------------------------------------------------------------------------------------------------

    def _check_links(self, links: list[Link] | None) -> None:
        """None: they could not be read, and that was said."""
        path = self.tree.chain_jsonl
        self.checked["links"] = len(links or ())
        for text in faults_in(links or (), str(self.tree.id)):
            self._found(path, text)
        said = self.status is not None and self.status.admitted
        admitted = said or len(self.there[self.tree.broadcasts]) > 1  # the first is published just before its line
        if not self.tree.root.is_dir():
            self._found(self.tree.root, "is no folder")
        elif links == [] and admitted:
            self._found(path, "holds no line, though the run was admitted: nothing says what its files should be")

    # --- batches ------------------------------------------------------------------------------------------------------

    def _check_batch(self, step: int) -> None:
        found = read_batch(self.tree, step)
        if found is None:
            return
        batch, digest = found
        self.checked["pending" if self._is_after(step) else "batches"] += 1
        path, link = self.tree.batch(step), self.links.get(step)
        if link is not None and link.batch is not None and not self._compare(path, "digest", link.batch, digest):
            return
        self.batches[step] = digest
        self.orchestrator_states[step] = batch.orchestrator_state
        self.sampled[step] = batch.versions

    def _check_sampled(self) -> None:
        for step, versions in self.sampled.items():
            for version in versions:
                self.checked["versions"] += 1
                self._attempt(self.tree.batch(step), partial(self._check_version, step, version))

    def _check_version(self, step: int, version: SampledVersion) -> None:
        """Whether a version that batch `step` was sampled from was this run's, and published before it."""
        run, of, digest8 = parse_version_name(version.name)
        if run != self.tree.id or of >= step or not version.digest.startswith(digest8):
            raise BadBatch(
                f"was sampled from {version.name}, digest {_shown(version.digest)}: no version before {step}"
            )
        link, replaced = self.links.get(of), self.published.get(of, set())
        vouched = {link.digest} | replaced if link is not None else replaced
        if of not in self.published or self._is_before(of):
            vouched = vouched | self.known.get(of, set())
        if version.digest in vouched:
            return
        if not vouched and self._is_before(of) and self.first not in self.there[self.tree.checkpoints]:
            self.checked["unknown_versions"] += 1
            return
        raise BadBatch(
            f"was sampled from {version.name}: expected digest {' or '.join(map(_shown, sorted(vouched))) or 'none'} "
            f"for step {of}, found {_shown(version.digest)}, which was not published"
        )

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _check_checkpoint(self, step: int) -> None:
        path = self.tree.checkpoint(step)
        snapshot = read_snapshot(open_checkpoint(self.tree.checkpoints, step))
        self.checked["checkpoints"] += 1
        digest, before = snapshot.adapter.digest(), len(self.findings)
        weight = verify(path / WEIGHT, WEIGHT)
        self._compare(path / WEIGHT, "the manifest's step", step, weight.facts.get("step"))
        self._compare(path / WEIGHT, "the manifest's digest", digest, weight.facts.get("digest"))
        if self._is_after(step):
            self._found(path, f"is a checkpoint of step {step}, which {self.tree.chain_jsonl.name} does not reach")
        elif (link := self.links.get(step)) is not None and not is_unfitted(path):
            self._compare(path / STATE_FILE, "cursor.chain", link.chain, snapshot.state.cursor.chain)
            self._compare(path / "trainer", "digest of the masters", link.digest, digest)
            self._check_copies(path, step, snapshot)
        if len(self.findings) == before:
            for of, digests in snapshot.state.known_digests.items():
                self.known.setdefault(int(of), set()).update(digests)

    def _check_copies(self, path: Path, step: int, snapshot: Snapshot) -> None:
        """What a checkpoint holds that was copied or counted from what the chain tells of."""
        if step in self.orchestrator_states:
            same = self.orchestrator_states[step] == snapshot.orchestrator_state
            self._compare(path / "orchestrator" / "state.json", f"is batch {step}'s orchestrator state", True, same)
        start = self.links.get(0)
        if start is None:
            return
        if snapshot.reference is not None:
            self._compare(path / "reference", "digest", start.digest, snapshot.reference.digest())
        taken = sum(not link.skipped for link in self.links.values() if 0 < link.step <= step)
        self._compare(path / STATE_FILE, "optimizer_steps", taken, snapshot.state.optimizer_steps)

    # --- broadcasts ---------------------------------------------------------------------------------------------------

    def _check_broadcast(self, step: int) -> None:
        published = _read_published(self.tree, step)
        if published is None:
            return
        self.checked["broadcasts"] += 1
        path, link, before = published.path, self.links.get(step), len(self.findings)
        if link is not None:
            self._compare(path, "digest", link.digest, published.version.digest)
            self._compare(path, "chain", link.chain, published.facts.get("chain"))
        elif self._is_after(step):
            chain = self._pending_chain(step)
            expected = f"of batch {step}, which is not there whole" if chain is None else chain
            self._compare(path, "chain", expected, published.facts.get("chain"))
        if len(self.findings) == before:
            self.published[step] = {published.version.digest, *_replaced(published)}

    def _pending_chain(self, step: int) -> str | None:
        """The chain at a step beyond the last line, over the batches since: a trainer that was killed published these
        versions, and its successor has yet to come to them."""
        assert self.last is not None
        cursor = Cursor(self.last, self.links[self.last].chain)
        while cursor.step < step:
            if cursor.step + 1 not in self.batches:
                return None
            cursor = cursor.after(self.batches[cursor.step + 1])
        return cursor.chain

    # --- what must be there -------------------------------------------------------------------------------------------

    def _check_nothing_is_missing(self) -> None:
        """Not while the run goes back to an earlier step: what came after it is being moved to the trash."""
        goes_back = self.is_changing and self.config is not None and self.config.resume_step is not None
        if self.first is None or self.last is None or goes_back:
            return
        tree, newest = self.tree, max(self.there[self.tree.checkpoints], default=-1)
        if newest < self.first:
            self._found(tree.checkpoints, f"expected a checkpoint of step {self.first} or later: a run begins at one")
            newest = self.first
        self._miss_last_checkpoint()
        history = self.config is not None and self.config.retention.history
        oldest = self.first + 1 if history else newest + 1
        self._miss(tree.rollouts, oldest, "retention.history keeps it" if history else "no checkpoint has consumed it")
        oldest = self.first if history else self._oldest_version_needed(newest)
        self._miss(
            tree.broadcasts, oldest, "retention.history keeps it" if history else "a batch or resume may need it"
        )
        self._miss_in_between(tree.rollouts)
        self._miss_in_between(tree.broadcasts)

    def _miss_last_checkpoint(self) -> None:
        """A run that ended well left a checkpoint of its last step; one whose orch.toml was taken away did not."""
        status = self.status
        if status is None or status.step is None or status.state not in ENDED_WELL or not self._is_mine(status):
            return
        there = status.step in self.there[self.tree.checkpoints]
        if not there and (status.state != "evicted" or self.tree.orch_toml.exists()):
            self._found(self.tree.checkpoint(status.step), f"is missing, though the run {status.state} at this step")

    def _oldest_version_needed(self, newest_checkpoint: int) -> int:
        """As the trainer's retention has it, counted from the last link. What was kept before this admission began
        was kept under settings that may have been others."""
        assert self.first is not None and self.last is not None
        needed, start = newest_checkpoint, newest_checkpoint
        if self.config is not None:
            sampled = self.last - self.config.max_staleness_steps
            needed = min(sampled, newest_checkpoint - self.config.lag_steps)
        if self.status is not None and self.status.start_step is not None and not self._was_cut:
            start = self.status.start_step
        return max(self.first, start, needed)

    def _miss(self, parent: Path, oldest: int, why: str) -> None:
        there = set(self.there[parent])
        for step in sorted(self.links):
            if step >= oldest and step not in there:
                self._found(parent / f"step_{step}", f"is missing: {why}")

    def _miss_in_between(self, parent: Path) -> None:
        """A hole in what is there. The first pending batch may be missing: one that was refused is sampled anew."""
        steps = [step for step in self.there[parent] if not self._is_before(step)]
        refused = None if parent != self.tree.rollouts or self.last is None else self.last + 1
        for older, newer in pairwise(steps):
            missing = older + 1 if older + 1 != refused else older + 2
            if missing < newer:
                self._found(parent / f"step_{missing}", f"is missing between steps {older} and {newer}")

    # --- the status ---------------------------------------------------------------------------------------------------

    @property
    def _was_cut(self) -> bool:
        """Whether an admission was killed after it had cut the chain to its checkpoint, and before it said so."""
        status = self.status
        if status is None or status.step is None or self.last is None:
            return False
        cut = status.step > self.last == max(self.there[self.tree.checkpoints], default=-1)
        return cut and (status.state == "active" or self.is_changing)

    def _is_mine(self, status: Status) -> bool:
        return status.run == str(self.tree.id)

    def _check_status(self, earlier: Status | None) -> None:
        """`earlier` was read before the chain: a version's line is written before the status that tells of it."""
        status, path = self.status, self.tree.status_json
        if status is None or self.last is None or not self._compare(path, "run", str(self.tree.id), status.run):
            return
        if status.step is None or earlier is None or earlier.step is None:
            return
        if status.state == "active":
            low, high = earlier.step, status.step + 1
        elif status.state in ENDED_WELL and status.start_step is not None:
            low, high = status.step, status.step
        else:  # it ended without a slot, or in a step that could not be published
            low, high = status.step - 1, self.last
        if not self._was_cut and not low <= self.last <= high:
            self._found(path, f"step: expected {self.last}, where the chain ends, found {status.step} ({status.state})")


def _read_published(tree: RunTree, step: int) -> Published | None:
    """The version, every byte verified, its digest recomputed from its tensors. Raises Damaged, AdapterError."""
    published = read_version(tree, step)
    if published is None:
        return None
    verify(published.path, BROADCAST)
    digest = read_peft(published.path).adapter.digest()
    if digest != published.version.digest:
        found = f"the manifest says {_shown(published.version.digest)}, its tensors have {_shown(digest)}"
        raise Damaged(f"{published.path}: digest: {found}")
    return published


def _replaced(published: Published) -> list[str]:
    digests = published.facts.get("replaces", [])
    return [str(digest) for digest in digests] if isinstance(digests, list) else []


def _config_of(tree: RunTree) -> RunConfig | None:
    try:
        return load(RunConfig, tree.orch_toml)
    except ConfigError:
        return None


def _orch_digest_of(tree: RunTree) -> str | None:
    try:
        return digest_of(tree.orch_toml.read_bytes())
    except OSError:
        return None


def _shown(value: object) -> str:
    return value[:SHOWN_DIGITS] if isinstance(value, str) and len(value) == 64 else str(value)
