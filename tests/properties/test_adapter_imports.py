"""Any combination of base, rank, scale, targets, layout and names: PEFT on the import is PEFT on the source."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graftwork.adapters.prepare import Wish
from proofs.adapter_cases import ONE, Case, Lab, Make, experts, mixtral_names, peft, renamed, run, stacked, written
from proofs.adapter_models import CONFIGS, FUSED_EXPERTS

LEAVES = {
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
RENAMES: list[Make | None] = [
    None,
    renamed(ONE, ""),
    renamed(f"{ONE}model.", f"{ONE}model.language_model."),
    renamed(".weight", ".default.weight"),
]
SINGLE_EXPERT_FILES: list[Make | None] = [*RENAMES, written(stacked), written(mixtral_names)]
DRAWN = int(os.environ.get("GRAFTWORK_DRAWN_IMPORTS", "40"))
"""`make proof-adapters` draws more."""
RANKS = st.integers(1, 8)
ALPHAS = st.one_of(st.integers(8, 64).map(float), st.floats(8, 100))
"""Of sources: transformers' norms are computed in float32 whatever the model's type, and an effect on the logits has to
stand out of that by more than the bar."""
WISHED_ALPHAS = st.one_of(st.integers(1, 64).map(float), st.floats(0.1, 100))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    base = draw(st.sampled_from(sorted(CONFIGS)))
    rank, alpha = draw(RANKS), draw(ALPHAS)
    wish = Wish(draw(st.none() | st.integers(rank, 24)), draw(st.none() | WISHED_ALPHAS), seed=draw(st.integers(0, 9)))
    if base == "moe" and draw(st.booleans()):
        given = draw(st.sampled_from(SINGLE_EXPERT_FILES))
        return Case("single experts", base, experts(rank=rank, alpha=alpha), given, wish=wish)
    targets = draw(st.lists(st.sampled_from(LEAVES[base]), min_size=1, max_size=4, unique=True))
    patterns = {}
    if draw(st.booleans()):
        patterns["alpha_pattern"] = {targets[0]: draw(ALPHAS)}
    if wish.rank is None and draw(st.booleans()):
        patterns["rank_pattern"] = {f"layers.1.self_attn.{targets[0]}": draw(RANKS), targets[-1]: draw(RANKS)}
    if base == "moe":
        patterns["target_parameters"] = draw(st.sampled_from([FUSED_EXPERTS, FUSED_EXPERTS[:1], FUSED_EXPERTS[1:]]))
    source = peft(
        r=rank, lora_alpha=alpha, use_rslora=draw(st.booleans()), target_modules=targets, seed=draw(st.integers(0, 99)),
        **patterns,
    )  # fmt: skip
    wide = ("all-linear",) if draw(st.booleans()) else None
    return Case("drawn", base, source, draw(st.sampled_from(RENAMES)), wish=wish, targets=wide)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    torch.set_num_threads(1)
    return Lab(tmp_path_factory.mktemp("bases"))


@settings(
    max_examples=DRAWN, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(case=cases())
def test_any_combination_is_the_same_function(case: Case, lab: Lab) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(case, lab, Path(folder))
