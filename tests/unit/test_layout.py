"""Run ids are matched whole; paths come from ids and steps alone."""

from pathlib import Path

import pytest

from graftwork.errors import BadRunId
from graftwork.store.layout import OutputTree, RunId, RunTree, stable_steps


@pytest.mark.parametrize("text", ["a", "lr1-5e-4", "0_x", "a" * 63])
def test_ids(text: str) -> None:
    assert str(RunId.parse(text)) == text


@pytest.mark.parametrize("text", ["", "Bad.Name", "lr1.5e-4", "-a", "_a", "a" * 64, "a\n", "a/b", "..", "ä"])
def test_what_is_no_id_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadRunId, match="is not a run id"):
        RunId.parse(text)


def test_a_folder_with_a_bad_name_is_reported_and_left_out(tmp_path: Path) -> None:
    for name in ("run_b", "run_a", "run_Bad.Name", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "run_file").write_text("")
    trees, errors = OutputTree(tmp_path).scan()
    assert [str(tree.id) for tree in trees] == ["a", "b"]
    assert len(errors) == 1 and "run_Bad.Name" in str(errors[0]) and "left alone" in str(errors[0])


def test_steps_are_numbers_and_need_a_manifest(tmp_path: Path) -> None:
    tree = RunTree.at(tmp_path / "run_a")
    for name in ("step_2", "step_10", "step_1", "step_03", "step_x"):
        (tree.checkpoints / name).mkdir(parents=True)
        if name != "step_1":
            (tree.checkpoints / name / "STABLE").write_text("{}")
    assert stable_steps(tree.checkpoints) == [2, 10]
