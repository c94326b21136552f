"""`graftwork eval` in process: the bare base, an adapter, and the same number twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import random_adapter

from graftwork.adapters.formats.peft_write import write_peft
from graftwork.adapters.source import AdapterFacts
from graftwork.config.run import NamedRun, SamplingConfig
from graftwork.config.schema import RlConfig
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.errors import AdapterError, GraftworkError
from graftwork.model.base import load_base
from graftwork.programs import evaluate

BASE = Path(__file__).parents[2] / "examples/reverse_text/base"


@pytest.fixture(scope="module")
def config() -> RlConfig:
    model = ModelConfig(path=str(BASE), dtype="float32", device="cpu")
    return RlConfig(model=model, run=NamedRun(id="r", sampling=SamplingConfig(max_tokens=12)))


def test_an_adapter_changes_the_mean_reward_and_the_seed_fixes_it(config: RlConfig, tmp_path: Path) -> None:
    base = load_base(config.model, LoraConfig())
    for name, data in write_peft(random_adapter(base.spec.shapes, 8), AdapterFacts()).items():
        (tmp_path / name).write_bytes(data)
    bare, again = (evaluate.main(config, None, 16, 3) for _ in range(2))
    adapted = evaluate.main(config, tmp_path, 16, 3)
    assert 0 <= bare <= 1 and 0 <= adapted <= 1
    assert bare == again
    assert adapted != bare


def test_a_folder_without_an_adapter_is_an_error_that_names_it(config: RlConfig, tmp_path: Path) -> None:
    with pytest.raises(GraftworkError, match=r"adapter_config\.json") as refusal:
        evaluate.main(config, tmp_path, 4, 0)
    assert isinstance(refusal.value, AdapterError)
