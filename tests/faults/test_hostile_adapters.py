"""Adapter folders made to break their reader: each is a named error, at once, and leaves no trace on disk.

The folders are in `proofs/hostile_adapters.py`, which also reads them all, in a process of its own that is watched.
"""

from __future__ import annotations

import io
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.formats.untrusted import json_members
from graftwork.adapters.source import InMemory
from graftwork.errors import AdapterError, UnreadableAdapter
from proofs.hostile_adapters import CASES, FILES, TENSORS, Finding, config, good_folder, run_all


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Finding]:
    """What happened with each of CASES, by name."""
    return {finding.name: finding for finding in run_all(tmp_path_factory.mktemp("hostile"))}


def test_every_hostile_folder_was_read(findings: Mapping[str, Finding]) -> None:
    assert list(findings) == [case.name for case in CASES]
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_a_hostile_folder_is_a_named_error_at_once_and_leaves_no_trace(
    name: str, findings: Mapping[str, Finding]
) -> None:
    """Its type and words, in little time and memory; nothing opened elsewhere, imported, run or written. The proof
    allows a second of work; on a slow machine that is not what a test is decided by."""
    assert findings[name].wrong(seconds_max=20) == [], findings[name].message


def test_what_a_refusal_may_not_do_is_seen() -> None:
    """The other side of the test above: a finding that holds nothing of what it should."""
    bad = Finding(CASES[0].name, "/there", None, "\x1b" * 2000, 2.0, 2**30, 0, ("a",), ("b",), ("c",), ("d",))
    assert len(bad.wrong()) == 11


def test_a_folder_that_is_not_there_is_never_looked_up_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(UnreadableAdapter, match="no folder at"):
        read_peft(tmp_path / "someone" / "some-adapter")


def test_patterns_names_and_addresses_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object) -> None:
        raise AssertionError("the file was followed")

    monkeypatch.setattr(socket, "socket", no_network)
    folder = good_folder(tmp_path / "adapter")
    expected = read_peft(folder).adapter.digest()
    config(
        target_modules="(a+)+$" * 100,
        exclude_modules="(x|x)*y",
        layers_pattern=["(a+)+"],
        base_model_name_or_path="http://127.0.0.1:1/../../etc/passwd",
        revision="../..",
        auto_mapping={"base_model_class": "os", "parent_library": "graftwork_absent_module"},
        megatron_core="graftwork_absent_module",
        runtime_config={"ephemeral_gpu_offload": True},
    )(folder)
    assert read_peft(folder).adapter.digest() == expected


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftwork.adapters.formats import pieces

    folder = good_folder(tmp_path / "adapter")
    original = pieces._matrix

    def cut_then_check(*args: Any) -> Any:
        os.truncate(folder / TENSORS, (folder / TENSORS).stat().st_size - 1)
        return original(*args)

    monkeypatch.setattr(pieces, "_matrix", cut_then_check)
    with pytest.raises(UnreadableAdapter, match="the file ended"):
        read_peft(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_an_adapter_or_an_adapter_error(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "adapter"
    if not folder.exists():
        good_folder(folder)
    name = data.draw(st.sampled_from(sorted(FILES)))
    spoilt = bytearray(FILES[name])
    for _ in range(data.draw(st.integers(1, 4))):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] = data.draw(st.integers(0, 255))
    spoilt = spoilt[: data.draw(st.integers(0, len(spoilt)))] if data.draw(st.booleans()) else spoilt
    for other, content in FILES.items():
        (folder / other).write_bytes(bytes(spoilt) if other == name else content)
    try:
        found = read_peft(folder)
    except AdapterError as error:
        assert str(folder) in str(error)
    else:
        assert isinstance(found, InMemory)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=200, deadline=None)
@given(
    about=st.dictionaries(TEXT, st.recursive(st.integers() | TEXT, st.lists, max_leaves=5)),
    indent=st.sampled_from([None, 0, 3]),
    ascii_only=st.booleans(),
    longest=st.integers(1, 300),
    after=st.sampled_from([b"", b" ", b"\n\n", b"}"]),
)
def test_an_object_read_by_its_members_is_the_one_read_whole_or_refused(
    about: dict[str, Any], indent: int | None, ascii_only: bool, longest: int, after: bytes
) -> None:
    data = json.dumps(about, indent=indent, ensure_ascii=ascii_only).encode() + after
    try:
        found = dict(json_members(io.BytesIO(data + b"not its own"), len(data), "header", longest))
    except UnreadableAdapter:
        assert after == b"}" or len(data) > longest
    else:
        assert after != b"}"
        assert found == about
