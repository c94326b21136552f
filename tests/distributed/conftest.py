"""The findings that the tests in this folder share."""

from __future__ import annotations

import pytest
from distributed.findings import Findings


@pytest.fixture(scope="session")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    return Findings(tmp_path_factory.mktemp("ranks"))
