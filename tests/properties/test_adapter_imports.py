"""Any combination of base, rank, scale, targets, layout and names: PEFT on the import is PEFT on the source."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from graftwork.adapters.prepare import Wish
from proofs.adapter_cases import (
    ONE,
    Case,
    Lab,
    Make,
    TooWeak,
    experts,
    mixtral_names,
    peft,
    renamed,
    run,
    stacked,
    written,
)
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
SCALES = st.one_of(st.sampled_from([0.5, 1.0, 2.0, 4.0]), st.floats(0.5, 4.0))
"""Of sources. Far larger ones make attention so sharp that the rounding of one factor moves the logits by more than the
bar: nothing that an import could do about."""
ALPHAS = st.one_of(st.integers(1, 64).map(float), st.floats(0.1, 100))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    base = draw(st.sampled_from(sorted(CONFIGS)))
    rank, rslora = draw(RANKS), draw(st.booleans())
    alpha = draw(SCALES) * (math.sqrt(rank) if rslora else rank)
    wish = Wish(draw(st.none() | st.integers(rank, 24)), draw(st.none() | ALPHAS), seed=draw(st.integers(0, 9)))
    if base == "moe" and draw(st.booleans()):
        given = draw(st.sampled_from(SINGLE_EXPERT_FILES))
        return Case("single experts", base, experts(rank=rank, alpha=draw(SCALES) * rank), given, wish=wish)
    targets = draw(st.lists(st.sampled_from(LEAVES[base]), min_size=1, max_size=4, unique=True))
    patterns = {}
    if draw(st.booleans()):
        patterns["alpha_pattern"] = {targets[0]: alpha * draw(st.floats(0.5, 1))}
    if wish.rank is None and draw(st.booleans()):
        # One key: PEFT sorts them on saving, and of two that match, another one then comes first.
        key = draw(st.sampled_from([f"layers.1.self_attn.{targets[0]}", targets[-1]]))
        patterns["rank_pattern"] = {key: draw(st.integers(rank, 8))}
    if base == "moe":
        patterns["target_parameters"] = draw(st.sampled_from([FUSED_EXPERTS, FUSED_EXPERTS[:1], FUSED_EXPERTS[1:]]))
    source = peft(
        r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=targets, seed=draw(st.integers(0, 99)),
        **patterns,
    )  # fmt: skip
    wide = ("all-linear",) if draw(st.booleans()) else None
    return Case("drawn", base, source, draw(st.sampled_from(RENAMES)), wish=wish, targets=wide)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    torch.set_num_threads(1)
    return Lab(tmp_path_factory.mktemp("bases"), effect_min=1.0)


@settings(
    max_examples=DRAWN,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(case=cases())
def test_any_combination_is_the_same_function(case: Case, lab: Lab) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            run(case, lab, Path(folder))
        except TooWeak:
            reject()  # drawn by chance: one small factor in one layer
