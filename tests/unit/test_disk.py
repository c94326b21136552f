"""The commit protocol: whole or not at all, and damage is named."""

from pathlib import Path

import pytest

from graftwork.errors import Busy, Conflict, Damaged
from graftwork.store.disk import STAGING_PREFIX, Disk
from graftwork.store.files import MANIFEST, is_stable, read_lines, verify


def publish(target: Path) -> None:
    with Disk().publish_dir(target, "thing", {"a": 1}) as staging:
        staging.write("one.bin", b"123")
        staging.write("sub/two.bin", b"4567")


def test_a_published_folder_verifies_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    publish(tmp_path / "x")
    manifest = verify(tmp_path / "x", "thing")
    assert manifest.facts == {"a": 1} and set(manifest.files) == {"one.bin", "sub/two.bin"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_block_that_raises_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), Disk().publish_dir(tmp_path / "x", "thing", {}) as staging:
        staging.write("one.bin", b"123")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_published_folder_is_never_replaced(tmp_path: Path) -> None:
    publish(tmp_path / "x")
    with pytest.raises(Conflict, match="never changed in place"):
        publish(tmp_path / "x")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: (x / "one.bin").write_bytes(b"12"), r"one\.bin has 2 bytes"),
        (lambda x: (x / "one.bin").write_bytes(b"124"), r"one\.bin has sha256"),
        (lambda x: (x / "sub" / "two.bin").unlink(), r"two\.bin is missing"),
        (lambda x: (x / "three.bin").write_bytes(b""), r"three\.bin is not listed"),
        (lambda x: (x / MANIFEST).write_bytes(b""), "STABLE is not JSON"),
        (lambda x: (x / MANIFEST).write_bytes(b"{}"), "not a manifest"),
        (lambda x: (x / MANIFEST).unlink(), "STABLE is missing"),
        (lambda x: [(x / "one.bin").unlink(), (x / "one.bin").symlink_to("/etc/hostname")], "not a plain file"),
    ],
)
def test_damage_is_named(tmp_path: Path, spoil, message: str) -> None:
    publish(tmp_path / "x")
    spoil(tmp_path / "x")
    with pytest.raises(Damaged, match=message):
        verify(tmp_path / "x", "thing")


def test_another_kind_is_refused(tmp_path: Path) -> None:
    publish(tmp_path / "x")
    with pytest.raises(Damaged, match="holds a 'thing', expected a 'batch'"):
        verify(tmp_path / "x", "batch")


class Failing(Disk):
    """Fails at the n-th call of any primitive."""

    def __init__(self, at: int) -> None:
        self.calls, self.at = 0, at

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise OSError(28, "No space left on device")

    def write(self, path: Path, data: bytes) -> None:
        self._count()
        super().write(path, data)

    def sync_folder(self, path: Path) -> None:
        self._count()
        super().sync_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        self._count()
        super().rename(source, target)


def test_a_failure_at_any_operation_leaves_the_folder_whole_or_absent(tmp_path: Path) -> None:
    at = 0
    while True:
        at += 1
        disk, target = Failing(at), tmp_path / f"x{at}"
        try:
            with disk.publish_dir(target, "thing", {}) as staging:
                staging.write("one.bin", b"123")
                staging.write("sub/two.bin", b"4567")
        except OSError:
            if is_stable(target):
                verify(target, "thing")
            else:
                assert not target.exists()
            assert not list(tmp_path.glob(f"{STAGING_PREFIX}*"))
        else:
            break
    assert at > 6


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "f"
    Disk().publish_file(path, b"old")
    with pytest.raises(OSError, match="space"):
        Failing(1).publish_file(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_claim_is_exclusive_and_names_the_holder(tmp_path: Path) -> None:
    claim = Disk().claim(tmp_path / ".lock", "a trainer")
    with pytest.raises(Busy, match="in use by a trainer, pid"):
        Disk().claim(tmp_path / ".lock", "a trainer")
    claim.release()
    Disk().claim(tmp_path / ".lock", "a trainer").release()


def test_quarantine_never_overwrites(tmp_path: Path) -> None:
    for _ in range(3):
        publish(tmp_path / "x")
        Disk().quarantine(tmp_path / "x", tmp_path / "trash")
    assert len(list((tmp_path / "trash").iterdir())) == 3


def test_logs_drop_a_torn_last_line_and_are_cut_at_a_step(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    for step in range(1, 5):
        Disk().append_line(log, f'{{"step": {step}}}')
    with log.open("ab") as file:
        file.write(b'{"step": 5')
    assert [row["step"] for row in read_lines(log)] == [1, 2, 3, 4]
    Disk().cut_log(log, 2)
    assert [row["step"] for row in read_lines(log)] == [1, 2]


def test_sweep_removes_what_a_killed_writer_left(tmp_path: Path) -> None:
    (tmp_path / f"{STAGING_PREFIX}step_3-abcd").mkdir()
    (tmp_path / f"{STAGING_PREFIX}step_3-abcd" / "one.bin").write_bytes(b"1")
    publish(tmp_path / "step_2")
    Disk().sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]
