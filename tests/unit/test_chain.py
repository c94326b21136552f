"""`chain.jsonl`: lines, what holds between them, and how an admission begins."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from graftwork.errors import Damaged
from graftwork.store.chain import Link, append_link, begin_chain, faults_in, read_chain
from graftwork.store.checkpoint import Cursor
from graftwork.store.disk import Disk
from graftwork.store.files import Content, json_line
from graftwork.store.layout import RunId, RunTree

DISK = Disk()


@pytest.fixture
def tree(tmp_path: Path) -> RunTree:
    return RunTree(RunId("a"), tmp_path / "run_a")


def hash_of(number: int) -> str:
    return f"{number:064x}"


def chain_of(last: int, run: str = "a") -> list[Link]:
    """Steps 0 to `last`, whole."""
    cursor = Cursor.start(hash_of(0))
    links = [Link(0, run, None, hash_of(0), cursor.chain, False)]
    for step in range(1, last + 1):
        cursor = cursor.after(hash_of(100 + step))
        links.append(Link(step, run, hash_of(100 + step), hash_of(step), cursor.chain, False))
    return links


def anchor(link: Link) -> Link:
    """What an admission at its step tells of: the batch is not known any more."""
    return replace(link, batch=None)


def write(tree: RunTree, links: list[Link], more: bytes = b"") -> None:
    DISK.publish_file(tree.chain_jsonl, "".join(json_line(asdict(link)) + "\n" for link in links).encode() + more)


# --- lines ------------------------------------------------------------------------------------------------------------


def test_a_run_without_a_file_has_no_links(tree: RunTree) -> None:
    assert read_chain(tree) == []


def test_links_come_back_and_a_torn_last_line_does_not(tree: RunTree) -> None:
    links = chain_of(3)
    begin_chain(DISK, tree, links[0])
    for link in links[1:]:
        append_link(DISK, tree, link)
    assert read_chain(tree) == links
    DISK.append(tree.chain_jsonl, b'{"step": 4, "run"')
    assert read_chain(tree) == links


LINE = asdict(chain_of(1)[1])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff", "JSON"),
        (b"[1]", "object"),
        (b"[" * 10**5, "JSON"),
        (json.dumps({**LINE, "step": -1}).encode(), "step"),
        (json.dumps({**LINE, "step": 1.0}).encode(), "step"),
        (json.dumps({**LINE, "step": True}).encode(), "step"),
        (json.dumps({**LINE, "step": 10**30}).encode(), "step"),
        (json.dumps({**LINE, "skipped": 0}).encode(), "skipped"),
        (json.dumps({**LINE, "run": None}).encode(), "run"),
        (json.dumps({**LINE, "batch": "f" * 63}).encode(), "batch"),
        (json.dumps({**LINE, "digest": "F" * 64}).encode(), "digest"),
        (json.dumps({**LINE, "chain": "f" * 64 + "\n"}).encode(), "chain"),
        (json.dumps({**LINE, "more": 1}).encode(), "more"),
        (json.dumps({k: v for k, v in LINE.items() if k != "chain"}).encode(), "chain"),
    ],
)
def test_a_line_that_is_no_link_is_named(tree: RunTree, line: bytes, said: str) -> None:
    write(tree, chain_of(1), line + b"\n")
    with pytest.raises(Damaged, match=rf"chain\.jsonl, line 3 is no link .*{said}"):
        read_chain(tree)


def test_a_file_that_cannot_be_read_is_named(tree: RunTree) -> None:
    DISK.make_folder(tree.chain_jsonl)
    with pytest.raises(Damaged, match=r"chain\.jsonl is not a plain file"):
        read_chain(tree)


# --- what holds between them ------------------------------------------------------------------------------------------


def test_a_whole_chain_has_no_faults() -> None:
    links = chain_of(5)
    assert list(faults_in(links, "a")) == list(faults_in([], "a")) == []
    assert list(faults_in([anchor(links[3]), *links[4:]], "a")) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda links: [*links[:2], *links[3:]], r"line 3 \(step 3\): step: expected 2"),
        (lambda links: [*links[:3], *links[2:]], r"line 4 \(step 2\): step: expected 3"),
        (lambda links: [*links[:2], links[3], links[2], *links[4:]], r"line 3 \(step 3\): step: expected 2"),
        (lambda links: links[1:], r"line 1 \(step 1\): batch: expected none where the chain begins"),
        (lambda links: [*links[:2], anchor(links[2]), *links[3:]], r"line 3 \(step 2\): batch: expected the digest"),
        (lambda links: [replace(links[0], digest=hash_of(9)), *links[1:]], r"line 1 \(step 0\): chain: expected"),
        (lambda links: [*links[:2], replace(links[2], batch=hash_of(9)), *links[3:]], r"line 3 \(step 2\): chain"),
        (lambda links: [*links[:2], replace(links[2], chain=hash_of(9)), *links[3:]], r"line 3 \(step 2\): chain"),
        (lambda links: [*links[:2], replace(links[2], skipped=True), *links[3:]], r"digest: .* step was skipped"),
        (lambda links: [replace(link, run="b") for link in links], r"line 1 \(step 0\): run: expected a, found b"),
    ],
)  # fmt: skip
def test_a_fault_names_its_line_and_what_was_expected(change, said: str) -> None:  # type: ignore[no-untyped-def]
    faults = list(faults_in(change(chain_of(4)), "a"))
    assert len(faults) > 0
    with pytest.raises(ValueError, match=said):
        raise ValueError(faults[0])


# --- admission --------------------------------------------------------------------------------------------------------


def test_an_admission_cuts_what_came_after_and_keeps_what_led_to_it(tree: RunTree) -> None:
    links = chain_of(5)
    write(tree, links)
    begin_chain(DISK, tree, anchor(links[3]))
    assert read_chain(tree) == links[:4] and not tree.trash.exists()


def test_an_admission_at_the_last_line_writes_nothing(tree: RunTree) -> None:
    links = chain_of(3)
    write(tree, links)
    before = tree.chain_jsonl.stat().st_ino
    begin_chain(DISK, tree, anchor(links[3]))
    assert tree.chain_jsonl.stat().st_ino == before


def test_an_admission_removes_a_torn_line_so_that_the_next_is_whole(tree: RunTree) -> None:
    links = chain_of(4)
    write(tree, links[:4], b'{"step": 4')
    begin_chain(DISK, tree, anchor(links[3]))
    append_link(DISK, tree, links[4])
    assert read_chain(tree) == links


@pytest.mark.parametrize(
    ("there", "link"),
    [
        (chain_of(5), replace(anchor(chain_of(3)[3]), digest=hash_of(9))),
        (chain_of(5), replace(anchor(chain_of(3)[3]), chain=hash_of(9))),
        (chain_of(5, run="b"), anchor(chain_of(3)[3])),
        (chain_of(2), anchor(chain_of(3)[3])),
        ([anchor(chain_of(5)[5])], anchor(chain_of(3)[3])),
    ],
    ids=["another digest", "another chain", "another run", "lines that are missing", "a chain that begins later"],
)
def test_a_history_that_does_not_lead_to_the_version_goes_to_the_trash(
    tree: RunTree, there: list[Link], link: Link
) -> None:
    write(tree, there)
    before = tree.chain_jsonl.read_bytes()
    begin_chain(DISK, tree, link)
    assert read_chain(tree) == [link]
    assert [path.read_bytes() for path in tree.trash.iterdir()] == [before]


def test_a_damaged_file_goes_to_the_trash(tree: RunTree) -> None:
    link = anchor(chain_of(3)[3])
    write(tree, chain_of(1), b"nothing of ours\n")
    begin_chain(DISK, tree, link)
    assert read_chain(tree) == [link] and len(list(tree.trash.iterdir())) == 1


class Killed(BaseException):
    pass


class Mortal(Disk):
    """Dies at its `moment`-th change."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def change(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    def write(self, path: Path, data: Content) -> None:
        self.change()
        super().write(path, data)

    def rename(self, source: Path, target: Path) -> None:
        self.change()
        super().rename(source, target)


def test_an_admission_that_is_killed_leaves_the_old_chain_or_the_new(tree: RunTree) -> None:
    link, moments = replace(anchor(chain_of(3)[3]), digest=hash_of(9)), 0
    write(tree, chain_of(5))
    while read_chain(tree) != [link]:
        try:
            begin_chain(Mortal(moments), tree, link)
        except Killed:
            moments += 1
            assert read_chain(tree) == chain_of(5)
    assert moments == 4 and len([p for p in tree.trash.iterdir() if p.name.startswith("chain")]) == 1


def test_the_chain_needs_no_torch() -> None:
    code = "import sys, graftwork.store.chain; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
