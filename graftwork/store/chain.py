"""`chain.jsonl`: one line a version, from the version that the run was admitted at. The trainer writes it.

Each line names the batch that made the version, the adapter's digest and the chain over all batches so far
(`Cursor`). So whoever holds a batch, a broadcast or a checkpoint of the run can tell whether it is the one that was
trained on, published or saved. Lines are appended, as in every log: a killed trainer may leave a torn last line, or
versions that have no line yet. `begin_chain` puts that right at the next admission; `graftwork runs verify` reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from graftwork.errors import Damaged
from graftwork.store.checkpoint import Cursor
from graftwork.store.disk import Disk
from graftwork.store.files import LOG_BYTES_MAX, json_line, read_file
from graftwork.store.layout import RunTree

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}\z")]


@dataclass(frozen=True)
class Link:
    """A version and what made it. batch: digest of the batch that the step consumed; None where a chain begins.
    digest: the adapter's. chain: `Cursor.chain` after the step. skipped: the step left the weights as they were."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # read with pydantic: types and names are checked

    step: Annotated[int, Field(ge=0, le=2**53)]
    run: str
    batch: Sha256 | None
    digest: Sha256
    chain: Sha256
    skipped: bool

    def same_version(self, other: Link) -> bool:
        """Whether both tell of one version of one run, made of the same batches."""
        return (self.run, self.step, self.digest, self.chain) == (other.run, other.step, other.digest, other.chain)


LINK: TypeAdapter[Link] = TypeAdapter(Link)


def append_link(disk: Disk, tree: RunTree, link: Link) -> None:
    """For every version after the one that the run was admitted at, once it is published. The file must be on the disk
    (`Disk.sync_file`) before a checkpoint is, so that no checkpoint outlives its line."""
    disk.append_line(tree.chain_jsonl, json_line(asdict(link)))


def read_chain(tree: RunTree) -> list[Link]:
    """The links in the order of the file, without a torn last line; none if there is no file.

    Raises Damaged, naming the file and the line that is no link. Whether the links hold together is not looked at.
    """
    return _parse(tree, _read(tree))


def begin_chain(disk: Disk, tree: RunTree, link: Link) -> None:
    """At admission: make the file end with the version that the run starts from, which `link` tells of.

    The history stays where it leads to that version. It does not where the file is another run's (a copied folder),
    where its line of that step has another digest or chain or is missing (a checkpoint that was brought from
    elsewhere), or where a line is no link: then it goes to the trash, and the chain begins anew at `link`.
    """
    raw = _read(tree)
    try:
        links = _parse(tree, raw)
    except Damaged:
        links = []
    history = [older for older in links if older.step <= link.step]
    if not history or not history[-1].same_version(link):
        if raw:  # a copy, so that a kill in between leaves no run without a chain
            disk.publish_file(tree.trash / f"{tree.chain_jsonl.name}-{hashlib.sha256(raw).hexdigest()[:8]}", raw)
        _publish(disk, tree, [link])
    elif len(history) < len(links) or not raw.endswith(b"\n"):
        _publish(disk, tree, history)


def faults_in(links: Sequence[Link], run: str) -> Iterator[str]:
    """What does not hold between the lines of `run`'s chain: each names its line, what was expected and found."""
    before: Link | None = None
    for number, link in enumerate(links, start=1):
        for text in _wrong_with(link, before, run):
            yield f"line {number} (step {link.step}): {text}"
        before = link


def _wrong_with(link: Link, before: Link | None, run: str) -> Iterator[str]:
    if link.run != run:
        yield f"run: expected {run}, found {link.run}"
    if before is None:
        if link.batch is not None:
            yield f"batch: expected none where the chain begins, found {link.batch}"
        if link.step == 0 and link.chain != (chain := Cursor.start(link.digest).chain):
            yield f"chain: expected {chain} for digest {link.digest}, found {link.chain}"
    elif link.step != before.step + 1:
        yield f"step: expected {before.step + 1}; a line is missing, or stands where it does not belong"
    elif link.batch is None:
        yield "batch: expected the digest of a batch, found none"
    else:
        if link.chain != (chain := Cursor(before.step, before.chain).after(link.batch).chain):
            yield f"chain: expected {chain} after batch {link.batch}, found {link.chain}"
        if link.skipped and link.digest != before.digest:
            yield f"digest: expected {before.digest}, as the step was skipped, found {link.digest}"


def _read(tree: RunTree) -> bytes:
    try:
        return read_file(tree.chain_jsonl, LOG_BYTES_MAX)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise Damaged(f"{tree.chain_jsonl} cannot be read: {error}") from None


def _parse(tree: RunTree, raw: bytes) -> list[Link]:
    links = []
    for number, line in enumerate(raw.split(b"\n")[:-1], start=1):
        try:
            links.append(LINK.validate_json(line, strict=True))
        except ValidationError as error:
            mistake = error.errors()[0]
            where = ".".join(map(str, mistake["loc"])) or "line"
            raise Damaged(f"{tree.chain_jsonl}, line {number} is no link ({where}: {mistake['msg']})") from None
    return links


def _publish(disk: Disk, tree: RunTree, links: Sequence[Link]) -> None:
    disk.publish_file(tree.chain_jsonl, "".join(json_line(asdict(link)) + "\n" for link in links).encode())
