"""What one more run costs in memory: counted, so it is the same each time."""

from pathlib import Path

import pytest

from bench.made_runs import model_of
from bench.slot_memory import LEAST_BYTES, held_with, parameters_of_a_run
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.model.base import load_base


@pytest.mark.parametrize(("dtype", "bytes_a_parameter"), [("float32", LEAST_BYTES), ("bfloat16", LEAST_BYTES + 2)])
def test_one_more_run_costs_masters_gradients_moments_and_the_copy_that_is_computed_with(
    dtype: str, bytes_a_parameter: int, tiny_path: Path, tmp_path: Path
) -> None:
    config = ModelConfig.model_validate({"path": str(tiny_path), "dtype": dtype, "device": "cpu"})
    base = load_base(config, LoraConfig(max_rank=4))
    fewer, more = (held_with(tmp_path / str(slots), base, model_of(tiny_path, base), slots) for slots in (2, 3))
    expected = bytes_a_parameter * parameters_of_a_run(base)
    grown = more.tensors - fewer.tensors
    assert expected <= grown <= 1.02 * expected  # and what the run's versions answered to the probe
