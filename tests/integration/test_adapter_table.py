"""Every row of the table of imports, told against PEFT (proofs/adapter_cases.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from proofs.adapter_cases import Case, Lab, all_cases, exact_cases, run


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    torch.set_num_threads(1)
    return Lab(tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case.name)
def test_an_import_is_the_same_function_or_is_refused_by_name(case: Case, lab: Lab, tmp_path: Path) -> None:
    run(case, lab, tmp_path)


def test_the_table_is_long_enough() -> None:
    assert len(exact_cases()) >= 60
    assert len({case.name for case in all_cases()}) == len(all_cases())
