"""`graftwork adapter inspect | import | export | diff` and `graftwork convert`, as a user types them."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from graftwork import cli
from graftwork.adapters.formats.peft_read import read_peft
from graftwork.adapters.snapshot import Snapshot, read_snapshot
from graftwork.config.run import OptimizerConfig
from graftwork.config.section import LoraConfig, ModelConfig
from graftwork.errors import CannotResume
from graftwork.model.base import load_base
from graftwork.programs import adapter as program
from graftwork.store.checkpoint import open_checkpoint
from graftwork.training.learner import Banks, Learner, LearnerConfig
from graftwork.training.packer import Example
from proofs.adapter_cases import gate_above_up, two_adapters
from proofs.adapter_models import (
    FUSED_EXPERTS,
    HIDDEN,
    VOCAB,
    logits,
    make_base,
    rewritten,
    save_experts,
    save_with_peft,
    sequences,
)

FORMATS = ("peft", "peft-per-expert", "vllm-3d", "stacked")
QV: Mapping[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
Q0 = "model.layers.0.self_attn.q_proj"
GATE0 = "model.layers.0.mlp.experts.gate_proj"


# --- how commands are run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Graftwork:
    """The command line in this process, with the folder that a refusal must leave as it was."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    root: Path

    def run(self, *arguments: object) -> Ended:
        self.monkeypatch.setattr(sys, "argv", ["graftwork", *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(int(ended.value.code or 0), *self.capsys.readouterr())

    def says(self, *arguments: object) -> str:
        """What a command that succeeds prints."""
        ended = self.run(*arguments)
        assert ended.code == 0, ended.err
        return ended.out

    def json(self, *arguments: object) -> dict[str, Any]:
        """The one JSON object that a command with --json prints."""
        return one_object(self.says(*arguments, "--json"))

    def refuses(self, *arguments: object) -> str:
        """The one line of a refusal, which leaves nothing behind."""
        before = everything(self.root)
        ended = self.run(*arguments)
        assert everything(self.root) == before
        return one_error(ended)

    def same(self, one: Path, other: Path, base: Path) -> bool:
        found = self.json("adapter", "diff", one, other, "--base", base)
        assert found["effect_on_logits"] > 0.1
        return bool(found["same"]) and found["relative_difference"] < 1e-5

    def digest(self, path: Path) -> str:
        return str(self.json("adapter", "inspect", path)["digest"])

    def step_0(self, adapter: Path, run: str, *options: object) -> Path:
        """The checkpoint that `convert` makes of an adapter."""
        self.says("convert", adapter, self.root / run, *options)
        return self.root / run / "checkpoints" / "step_0"

    def older(self, adapter: Path, run: str, ranks: int = 8, *options: object) -> Path:
        """As older trainers leave it: rank_N.pt, and a STABLE file without a word."""
        step = self.step_0(adapter, run, "--ranks", ranks, "--rank-format", "pt", *options)
        (step / "STABLE").write_bytes(b"")
        return step


def one_object(text: str) -> dict[str, Any]:
    assert text.count("\n") == 1, text
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


def one_error(ended: Ended) -> str:
    assert (ended.code, ended.out) == (1, ""), ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    return ended.err.removeprefix("error: ")


def everything(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def in_a_process(*arguments: object) -> Ended:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "graftwork", *map(str, arguments)], env=environment, capture_output=True, text=True
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def graftwork(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Graftwork]:
    for name in (*cli.THREAD_ENVIRONMENT, "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    with monkeypatch.context() as argv:
        yield Graftwork(argv, capsys, tmp_path)


# --- bases and adapters -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module")
def qwen(folder: Path) -> Path:
    return make_base("qwen3", folder)


@pytest.fixture(scope="module")
def moe(folder: Path) -> Path:
    return make_base("moe", folder)


@pytest.fixture(scope="module")
def dense(qwen: Path, folder: Path) -> Path:
    """Rank 4, scale 2, q_proj and v_proj."""
    return save_with_peft(qwen, folder / "dense", **QV)


@pytest.fixture(scope="module")
def apart(folder: Path) -> Path:
    """One expert a tensor; gate and up have an A each."""
    return save_experts(folder / "apart", rank=4, alpha=8)


@pytest.fixture(scope="module")
def shared(moe: Path, folder: Path) -> Path:
    """PEFT's own target_parameters; gate and up share A."""
    return save_with_peft(moe, folder / "shared", target_modules=["q_proj", "o_proj"], target_parameters=FUSED_EXPERTS)


@pytest.fixture(scope="module")
def templated(dense: Path, folder: Path) -> Path:
    """With a chat template and a tokenizer file beside it."""
    made = Path(shutil.copytree(dense, folder / "templated"))
    (made / "chat_template.jinja").write_text("same\n{{ mine }}\n")
    (made / "special_tokens_map.json").write_text("{}")
    return made


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_is_a_table_of_what_is_there(graftwork: Graftwork, dense: Path, qwen: Path) -> None:
    lines = graftwork.says("adapter", "inspect", dense).splitlines()
    assert lines[0] == f"{dense}: PEFT adapter, digest {read_peft(dense).adapter.digest()[:16]}"
    assert lines[1] == f"base: {qwen} (its own claim)"
    assert lines[2].split("  ")[0] == "module" and lines[2].endswith("norm of update")
    assert [line.split()[:8] for line in lines[3:]] == [
        ["q_proj", "2", "64", "x", str(HIDDEN), "4", "2", "float32"],
        ["v_proj", "2", "32", "x", str(HIDDEN), "4", "2", "float32"],
    ]


def test_inspect_names_the_layout_of_experts(graftwork: Graftwork, apart: Path, shared: Path) -> None:
    assert graftwork.says("adapter", "inspect", apart).count("one expert a tensor") == 3
    assert graftwork.says("adapter", "inspect", shared).count("flattened experts, gate above up") == 2


def test_inspect_as_json_has_every_module(graftwork: Graftwork, dense: Path, qwen: Path) -> None:
    found = graftwork.json("adapter", "inspect", dense)
    adapter = read_peft(dense).adapter
    assert (found["path"], found["format"], found["base_model"]) == (str(dense), "PEFT adapter", str(qwen))
    assert (found["digest"], found["odd"], found["base_fingerprint"]) == (adapter.digest(), [], None)
    assert [row["module"] for row in found["modules"]] == sorted(adapter.pairs)
    for row in found["modules"]:
        pair = adapter.pairs[row["module"]]
        norm = float((pair.b.double() @ pair.a.double()).norm() * pair.scale)
        assert (row["rank"], row["scale"], row["layout"], row["dtype"]) == (4, 2.0, "dense", "float32")
        assert row["norm"] == pytest.approx(norm) and row["idle_directions"] == 0


def test_inspect_says_what_is_odd(graftwork: Graftwork, qwen: Path, tmp_path: Path) -> None:
    silent = save_with_peft(qwen, tmp_path / "silent", which="nothing", **QV)
    mixed = save_with_peft(qwen, tmp_path / "mixed", rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 3}, **QV)
    assert "odd: 4 of 4 modules do nothing (B = 0)" in graftwork.says("adapter", "inspect", silent)
    text = graftwork.says("adapter", "inspect", mixed)
    assert "odd: ranks differ" in text and "odd: scales differ" in text


def test_inspect_of_one_of_two_adapters(graftwork: Graftwork, dense: Path, tmp_path: Path) -> None:
    both = rewritten(dense, tmp_path / "both", two_adapters)
    found = graftwork.json("adapter", "inspect", both, "--adapter", "second")
    assert found["digest"] == read_peft(dense).adapter.digest()
    assert "choose one (--adapter NAME)" in graftwork.refuses("adapter", "inspect", both)


def test_inspect_of_a_checkpoint(graftwork: Graftwork, dense: Path) -> None:
    found = graftwork.json("adapter", "inspect", graftwork.step_0(dense, "run_a"))
    assert (found["format"], found["digest"]) == ("checkpoint of Graftwork", read_peft(dense).adapter.digest())
    assert "graftwork convert" in graftwork.refuses("adapter", "inspect", graftwork.older(dense, "run_b"))


def test_inspect_in_a_process_of_its_own(apart: Path) -> None:
    ended = in_a_process("adapter", "inspect", apart, "--json")
    assert (ended.code, ended.err) == (0, "")
    assert len(one_object(ended.out)["modules"]) == 10


# --- import and diff --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", [[], ["--rank", 8, "--alpha", 3], ["--alpha", 5]])
def test_an_import_is_the_same_function(
    graftwork: Graftwork, dense: Path, qwen: Path, tmp_path: Path, fit: list[object]
) -> None:
    out = tmp_path / "new" / "imported"
    said = graftwork.json("adapter", "import", dense, "--out", out, "--base", qwen, *fit)
    assert said.pop("folder") == str(out)
    assert json.loads((out / "import_report.json").read_text()) == said
    assert said["exact"] and said["checked"] and said["source_digest"] == read_peft(dense).adapter.digest()
    assert graftwork.digest(out) == said["digest"]
    assert graftwork.same(dense, out, qwen)


def test_an_import_of_experts_is_the_same_function(
    graftwork: Graftwork, shared: Path, moe: Path, tmp_path: Path
) -> None:
    fit = ("--base", moe, "--rank", 8, "--alpha", 3)
    said = graftwork.json("adapter", "import", shared, "--out", tmp_path / "imported", *fit)
    assert said["done"] == {"split": 4, "padded": 10, "rescaled": 10}
    assert graftwork.same(shared, tmp_path / "imported", moe)


def test_an_import_says_in_lines_what_was_done(graftwork: Graftwork, dense: Path, qwen: Path, tmp_path: Path) -> None:
    lines = graftwork.says(
        "adapter", "import", dense, "--out", tmp_path / "imported", "--base", qwen, "--rank", 8
    ).splitlines()
    assert lines[:2] == [f"{dense}: PEFT adapter", "rank 8, alpha 16 (scale 2), 4 modules, from float32"]
    assert lines[2].startswith("4 modules padded to the run's rank: exact")
    assert lines[3:5] == ["the run starts as the same function as the source's", "it fits the slots"]
    assert lines[5].startswith(f"wrote {tmp_path / 'imported'} (adapter ")


def test_targets_that_the_adapter_has_not_start_fresh_from_the_seed(
    graftwork: Graftwork, dense: Path, qwen: Path, tmp_path: Path
) -> None:
    digests = []
    for name, seed in (("one", 0), ("two", 1), ("three", 1)):
        options = ("--base", qwen, "--targets", "q_proj, v_proj, o_proj", "--seed", seed)
        said = graftwork.json("adapter", "import", dense, "--out", tmp_path / name, *options)
        assert said["done"] == {"kept": 4, "fresh": 2} and said["modules"] == 6
        assert graftwork.same(dense, tmp_path / name, qwen)
        digests.append(said["digest"])
    assert digests[0] != digests[1] == digests[2]


def test_diff_tells_another_function(graftwork: Graftwork, dense: Path, qwen: Path, tmp_path: Path) -> None:
    other = save_with_peft(qwen, tmp_path / "other", seed=2, **QV)
    text = graftwork.says("adapter", "diff", dense, other, "--base", qwen)
    assert text.splitlines()[0] == "module                           relative difference of the update"
    assert text.splitlines()[-1] == "DIFFERENT functions"
    found = graftwork.json("adapter", "diff", dense, other, "--base", qwen)
    assert not found["same"] and found["relative_difference"] > 0.1
    assert [row["module"] for row in found["modules"]] == sorted(read_peft(dense).adapter.pairs)
    assert min(row["difference"] for row in found["modules"]) > 0.5
    same = graftwork.says("adapter", "diff", dense, dense, "--base", qwen)
    assert same.splitlines()[-1] == "the same function, to rounding"


def test_diff_counts_a_module_that_only_one_of_them_has(
    graftwork: Graftwork, dense: Path, qwen: Path, tmp_path: Path
) -> None:
    wider = save_with_peft(qwen, tmp_path / "wider", target_modules=["q_proj", "v_proj", "o_proj"])
    found = graftwork.json("adapter", "diff", dense, wider, "--base", qwen)
    differs = {row["module"]: row["difference"] for row in found["modules"]}
    assert differs["model.layers.1.self_attn.o_proj"] == 1.0 and not found["same"]


def test_diff_does_not_call_experts_alike_that_no_token_went_to(
    graftwork: Graftwork, apart: Path, moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def times(factor: float) -> Path:
        def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
            silent = {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in tensors.items()}
            name = "base_model.model.model.layers.1.mlp.experts.11.down_proj.lora_B.weight"
            return {**silent, name: tensors[name] * factor}

        return rewritten(apart, tmp_path / str(factor), change)

    monkeypatch.setattr(program, "DIFF_TOKENS", 1)
    found = graftwork.json("adapter", "diff", times(1), times(-3), "--base", moe)
    assert max(row["difference"] for row in found["modules"]) > 1 and found["logits_max_difference"] == 0
    assert not found["same"]


# --- what is refused --------------------------------------------------------------------------------------------------

BASE, OTHER_BASE, DORA, RENAMED = "BASE", "OTHER BASE", "DORA", "RENAMED"

REFUSALS: list[tuple[str, list[object], str]] = [
    (DORA, [], "use_dora = True: DoRA"),
    ("dense", ["--rank", 2], "4 modules of a rank above 2, the run's"),
    ("dense", ["--base", BASE, "--rank", 2], "allow the best approximation by SVD"),
    ("dense", ["--base", BASE, "--targets", "q_proj"], "slots do not have: model.layers.0.self_attn.v_proj"),
    ("dense", ["--base", BASE, "--targets", "q_porj,v_proj"], "no linear layer named q_porj"),
    ("dense", ["--base", OTHER_BASE], "4 modules of another shape (out x in): model.layers.0.self_attn.q_proj"),
    (RENAMED, ["--base", BASE], "slots do not have: model.layers.0.self_attn.s_proj"),
    ("dense", ["--targets", "q_proj"], "--targets needs --base"),
    ("dense", ["--ignore", "lm_haed"], "has nothing called 'lm_haed' to ignore"),
    ("dense", ["--adapter", "second"], "no adapter called 'second'"),
    ("dense", ["--alpha", 0], "alpha 0 is not between"),
    ("nowhere", [], "no folder at"),
]


@pytest.fixture(scope="module")
def unfit(qwen: Path, dense: Path, folder: Path) -> dict[str, Path]:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
        return {name.replace("q_proj", "s_proj"): tensor for name, tensor in tensors.items()}

    return {
        BASE: qwen, OTHER_BASE: make_base("llama", folder), "dense": dense, "nowhere": folder / "nowhere",
        DORA: save_with_peft(qwen, folder / "dora", use_dora=True, **QV),
        RENAMED: rewritten(dense, folder / "renamed", change),
    }  # fmt: skip


@pytest.mark.parametrize("command", ["import", "convert"])
@pytest.mark.parametrize(("source", "options", "says"), REFUSALS, ids=lambda value: str(value)[:40])
def test_a_refusal_is_one_line_and_leaves_nothing(
    graftwork: Graftwork, unfit: dict[str, Path], tmp_path: Path, command: str, source: str, options: list[Any],
    says: str,
) -> None:  # fmt: skip
    given = [unfit.get(option, option) for option in options]
    out = tmp_path / "new" / "deeper" / "run_x"
    words = (
        ["adapter", "import", unfit[source], "--out", out] if command == "import" else ["convert", unfit[source], out]
    )
    assert says in graftwork.refuses(*words, *given)


def test_a_refusal_in_a_process_of_its_own(dense: Path, qwen: Path, tmp_path: Path) -> None:
    ended = in_a_process("adapter", "import", dense, "--out", tmp_path / "a" / "b", "--base", qwen, "--rank", 2)
    assert "4 modules of a rank above 2" in one_error(ended)
    assert everything(tmp_path) == {}


def test_nothing_is_overwritten(graftwork: Graftwork, dense: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    assert "exists already" in graftwork.refuses("adapter", "import", dense, "--out", tmp_path / "there")
    assert "exists already" in graftwork.refuses("adapter", "export", dense, "--out", tmp_path / "there")
    graftwork.step_0(dense, "run_a")
    assert "has step_0 already" in graftwork.refuses("convert", dense, tmp_path / "run_a")
    step = graftwork.step_0(dense, "run_b")
    assert "exists already" in graftwork.refuses("convert", step, tmp_path / "there")


def test_a_format_that_is_not_known(graftwork: Graftwork, dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    says = "is not known; one of peft, peft-per-expert, vllm-3d, stacked"
    assert says in graftwork.refuses("adapter", "export", dense, "--format", "zip", "--out", out)
    assert says in graftwork.refuses("convert", graftwork.step_0(dense, "run_a"), out, "--format", "zip")
    assert "safetensors or pt" in graftwork.refuses("convert", dense, tmp_path / "run_b", "--rank-format", "zip")


# --- what changes the function ----------------------------------------------------------------------------------------


def test_a_lossy_import_says_what_it_loses(graftwork: Graftwork, dense: Path, qwen: Path, tmp_path: Path) -> None:
    fit = ("--base", qwen, "--rank", 2, "--allow-lossy")
    text = graftwork.says("adapter", "import", dense, "--out", tmp_path / "lines", *fit)
    assert "4 modules cut to the run's rank by SVD: NOT exact" in text
    assert "the run starts as ANOTHER function than the source's" in text
    said = graftwork.json("adapter", "import", dense, "--out", tmp_path / "json", *fit)
    assert not said["exact"] and 0.5 < said["energy_kept_lowest"] < 1
    assert f"energy kept by the SVD: at least {said['energy_kept_lowest']:.6f}" in text
    assert not graftwork.same(dense, tmp_path / "json", qwen)


def test_a_lossy_import_keeps_the_largest_singular_values(graftwork: Graftwork, dense: Path, tmp_path: Path) -> None:
    said = graftwork.json("adapter", "import", dense, "--out", tmp_path / "a", "--rank", 2, "--allow-lossy")
    pair = read_peft(dense).adapter.pairs[Q0]
    values = torch.linalg.svdvals(pair.b.double() @ pair.a.double()).square()
    assert said["energy_kept"][Q0] == pytest.approx(float(values[:2].sum() / values.sum()))


@pytest.mark.parametrize("name", ["modules_to_save", "lm_head"])
def test_full_copies_are_refused_and_can_be_dropped(
    graftwork: Graftwork, qwen: Path, tmp_path: Path, name: str
) -> None:
    source = save_with_peft(qwen, tmp_path / "source", modules_to_save=["lm_head"], **QV)
    dropped(graftwork, source, name, "modules_to_save", "lm_head")


@pytest.mark.parametrize("name", ["trainable_token_indices", "embed_tokens"])
def test_trained_tokens_are_refused_and_can_be_dropped(
    graftwork: Graftwork, qwen: Path, tmp_path: Path, name: str
) -> None:
    source = save_with_peft(qwen, tmp_path / "source", trainable_token_indices=[1, 2], **QV)
    dropped(graftwork, source, name, "trainable_token_indices", "embed_tokens")


def dropped(graftwork: Graftwork, source: Path, name: str, field: str, module: str) -> None:
    """`--ignore name` is what it takes, and the loss is said loudly."""
    words = ("adapter", "import", source, "--out")
    assert f"{field} = a list: full copies" in graftwork.refuses(*words, graftwork.root / "a" / "b")
    assert f"--ignore {field}" in graftwork.refuses("adapter", "inspect", source)
    text = graftwork.says(*words, graftwork.root / "lines", "--ignore", name)
    said = graftwork.json(*words, graftwork.root / "json", "--ignore", name)
    for what in (field, module):
        warning = f"{what} was dropped, as asked: the function is not the source's any more"
        assert f"WARNING: {warning}\n" in text and warning in said["warnings"]
    assert "ANOTHER function" in text and not said["exact"]
    odd = graftwork.json("adapter", "inspect", source, "--ignore", name)["odd"]
    assert odd == [f"{field} was dropped, as asked", f"{module} was dropped, as asked"]


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["apart", "shared"])
def test_every_format_is_the_same_function(
    graftwork: Graftwork, moe: Path, tmp_path: Path, source: str, request: pytest.FixtureRequest
) -> None:
    """Where gate and up share A, or lie apart in the file, the digest is the source's too; fused, A's of their own make
    a block-diagonal pair of the summed rank."""
    adapter: Path = request.getfixturevalue(source)
    digests = {}
    for format in FORMATS:
        out = tmp_path / format
        said = graftwork.json("adapter", "export", adapter, "--format", format, "--out", out)
        assert (said["folder"], said["format"]) == (str(out), format)
        assert any("block-diagonal" in line for line in said["said"]) == (
            source == "apart" and format in ("peft", "vllm-3d")
        )
        digests[format] = graftwork.digest(out)
        assert graftwork.same(adapter, out, moe)
    own = read_peft(adapter).adapter.digest()
    assert digests["peft-per-expert"] == digests["stacked"] == own
    assert digests["peft"] == digests["vllm-3d"]
    assert (digests["peft"] == own) == (source == "shared")


@pytest.mark.parametrize("source", ["apart", "shared"])
def test_peft_computes_the_same_from_both_of_its_formats(
    graftwork: Graftwork, moe: Path, tmp_path: Path, source: str, request: pytest.FixtureRequest
) -> None:
    adapter: Path = request.getfixturevalue(source)
    tokens = sequences()
    expected, clear = logits(moe, adapter, tokens)
    effect = float((expected - logits(moe, None, tokens)[0]).abs().max())
    assert int(clear.sum()) >= 4 and effect > 0.1
    for format in ("peft", "peft-per-expert"):
        graftwork.says("adapter", "export", adapter, "--format", format, "--out", tmp_path / format)
        found, _ = logits(moe, tmp_path / format, tokens)
        assert float((found - expected)[clear].abs().max()) / effect < 1e-5


@pytest.mark.parametrize(
    "format",
    FORMATS,
)
@pytest.mark.parametrize("part", ["gate_proj", "up_proj"])
def test_half_of_gate_and_up_survives_every_format(
    graftwork: Graftwork, apart: Path, moe: Path, tmp_path: Path, part: str, format: str
) -> None:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if ".experts." not in name or part in name}

    half = rewritten(apart, tmp_path / "half", change)
    graftwork.says("adapter", "export", half, "--format", format, "--out", tmp_path / "out")
    assert graftwork.same(half, tmp_path / "out", moe)


def test_without_experts_every_format_is_the_same_file(graftwork: Graftwork, dense: Path, tmp_path: Path) -> None:
    for format in FORMATS:
        text = graftwork.says("adapter", "export", dense, "--format", format, "--out", tmp_path / format)
        assert "no experts: every format is the same" in text
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert len({(tmp_path / format / name).read_bytes() for format in FORMATS}) == 1


def test_a_stacked_file_with_gate_above_up_is_read(
    graftwork: Graftwork, shared: Path, moe: Path, tmp_path: Path
) -> None:
    fused = rewritten(shared, tmp_path / "fused", gate_above_up)
    graftwork.says("adapter", "export", fused, "--format", "peft", "--out", tmp_path / "out")
    assert graftwork.digest(tmp_path / "out") == read_peft(shared).adapter.digest()
    assert graftwork.same(shared, tmp_path / "out", moe)


# --- chat templates ---------------------------------------------------------------------------------------------------

TOKENIZER_FILES = ("chat_template.jinja", "special_tokens_map.json")


def with_template(qwen: Path, folder: Path) -> Path:
    base = Path(shutil.copytree(qwen, folder))
    (base / "chat_template.jinja").write_text("same\n{{ theirs }}\n")
    return base


def carried(folder: Path, source: Path) -> bool:
    return all((folder / name).read_bytes() == (source / name).read_bytes() for name in TOKENIZER_FILES)


def test_another_chat_template_is_told_loudly_with_the_difference(
    graftwork: Graftwork, templated: Path, qwen: Path, tmp_path: Path
) -> None:
    base = with_template(qwen, tmp_path / "base")
    text = graftwork.says("adapter", "import", templated, "--out", tmp_path / "lines", "--base", base)
    assert "WARNING: it was trained with ANOTHER CHAT TEMPLATE than the base's" in text
    assert "    -{{ theirs }}\n" in text and "    +{{ mine }}\n" in text
    said = graftwork.json("adapter", "import", templated, "--out", tmp_path / "json", "--base", base)
    assert said["exact"] and any("ANOTHER CHAT TEMPLATE" in warning for warning in said["warnings"])


def test_the_same_chat_template_is_no_warning(
    graftwork: Graftwork, templated: Path, qwen: Path, tmp_path: Path
) -> None:
    base = with_template(qwen, tmp_path / "base")
    shutil.copy(templated / "chat_template.jinja", base)
    said = graftwork.json("adapter", "import", templated, "--out", tmp_path / "out", "--base", base)
    assert said["warnings"] == []


def test_a_chat_template_that_cannot_be_compared_is_said(graftwork: Graftwork, templated: Path, tmp_path: Path) -> None:
    text = graftwork.says("adapter", "import", templated, "--out", tmp_path / "out")
    assert "WARNING: chat_template.jinja, special_tokens_map.json beside the adapter could not be compared" in text


def test_tokenizer_files_come_along(graftwork: Graftwork, templated: Path, tmp_path: Path) -> None:
    found = graftwork.json("adapter", "inspect", templated)
    assert found["files_beside"] == sorted(TOKENIZER_FILES)
    graftwork.says("adapter", "import", templated, "--out", tmp_path / "imported")
    assert carried(tmp_path / "imported", templated)
    graftwork.says("adapter", "export", templated, "--out", tmp_path / "exported")
    assert carried(tmp_path / "exported", templated)
    for name, step in (("a", graftwork.step_0(templated, "run_a")), ("b", graftwork.older(templated, "run_b"))):
        assert carried(step / "weight", templated)
        graftwork.says("convert", step, tmp_path / name)
        assert carried(tmp_path / name, templated)


# --- convert: an adapter becomes a run's start ------------------------------------------------------------------------


def snapshot_in(step: Path) -> Snapshot:
    return read_snapshot(open_checkpoint(step.parent))


def test_without_options_a_run_starts_as_the_adapter_is(graftwork: Graftwork, dense: Path, tmp_path: Path) -> None:
    said = graftwork.json("convert", dense, tmp_path / "outputs" / "run_x")
    step = tmp_path / "outputs" / "run_x" / "checkpoints" / "step_0"
    assert said.pop("folder") == str(step)
    assert json.loads((step / "report.json").read_text()) == said
    assert snapshot_in(step).adapter.digest() == said["digest"] == read_peft(dense).adapter.digest()
    assert not said["checked"]


def trainer_json(folder: Path, base: Path, max_rank: int, targets: Sequence[str]) -> None:
    model = load_base(
        ModelConfig(path=str(base), dtype="float32", device="cpu"), LoraConfig(target_modules=tuple(targets))
    )
    modules = {path: list(shape) for path, shape in model.spec.shapes.items()}
    about = {"base_fingerprint": model.fingerprint, "max_rank": max_rank, "modules": modules, "base": str(base)}
    folder.mkdir()
    (folder / "trainer.json").write_text(json.dumps(about))


def test_a_run_starts_as_the_trainer_beside_it_says(
    graftwork: Graftwork, dense: Path, qwen: Path, tmp_path: Path
) -> None:
    trainer_json(tmp_path / "outputs", qwen, 6, ("q_proj", "v_proj", "o_proj"))
    said = graftwork.json("convert", dense, tmp_path / "outputs" / "run_x", "--rank", 6)
    assert said["checked"] and said["done"] == {"padded": 4, "fresh": 2}
    state = snapshot_in(tmp_path / "outputs" / "run_x" / "checkpoints" / "step_0").state
    assert (state.rank, state.alpha) == (6, 12.0) and state.base_fingerprint is not None
    says = graftwork.refuses("convert", dense, tmp_path / "outputs" / "run_y", "--rank", 7)
    assert "rank 7, and the slots hold 1 to 6" in says


def test_a_base_that_is_named_goes_before_the_trainer_beside_it(
    graftwork: Graftwork, dense: Path, qwen: Path, tmp_path: Path
) -> None:
    trainer_json(tmp_path / "outputs", qwen, 2, ("q_proj",))
    assert "slots do not have" in graftwork.refuses("convert", dense, tmp_path / "outputs" / "run_x")
    said = graftwork.json("convert", dense, tmp_path / "outputs" / "run_x", "--base", qwen)
    assert said["checked"] and said["done"] == {"kept": 4}


@pytest.mark.parametrize("source", ["dense", "shared"])
def test_eight_ranks_hold_what_one_holds(graftwork: Graftwork, source: str, request: pytest.FixtureRequest) -> None:
    adapter: Path = request.getfixturevalue(source)
    one = graftwork.step_0(adapter, "run_one")
    eight = graftwork.step_0(adapter, "run_eight", "--ranks", 8)
    files = [eight / "trainer" / f"rank_{rank}.safetensors" for rank in range(8)]
    assert sorted((eight / "trainer").glob("rank_*")) == files
    first, second = snapshot_in(one), snapshot_in(eight)
    assert first.adapter.digest() == second.adapter.digest() and first.state == second.state
    held = [load_file(file) for file in files]
    for path, pair in first.adapter.pairs.items():
        for side, factor in (("lora_A", pair.a), ("lora_B", pair.b)):
            pieces = [tensors[name] for tensors in held if (name := f"adapter.{path}.{side}") in tensors]
            assert torch.equal(torch.cat(pieces), factor.flatten()), "each rank has the elements after the last one's"
            assert max(map(len, pieces)) == -(-factor.numel() // 8)


def test_an_adapter_comes_back_from_our_checkpoint(
    graftwork: Graftwork, shared: Path, moe: Path, tmp_path: Path
) -> None:
    step = graftwork.step_0(shared, "run_a", "--ranks", 8)
    for format in FORMATS:
        graftwork.says("convert", step, tmp_path / format, "--format", format)
        assert graftwork.digest(tmp_path / format) == read_peft(shared).adapter.digest()
    assert graftwork.same(shared, tmp_path / "peft", moe)
    rank = step / "trainer" / "rank_3.safetensors"
    rank.write_bytes(rank.read_bytes()[:-1])
    assert "rank_3.safetensors has" in graftwork.refuses("convert", step, tmp_path / "again")


# --- convert: checkpoints of older trainers ---------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["dense", "apart"])
def test_rank_files_and_back_are_the_same_function(
    graftwork: Graftwork, qwen: Path, moe: Path, tmp_path: Path, source: str, request: pytest.FixtureRequest
) -> None:
    adapter: Path = request.getfixturevalue(source)
    base = qwen if source == "dense" else moe
    step = graftwork.older(adapter, "run_a", 8, "--base", base, "--rank", 6, "--alpha", 3)
    assert len(list((step / "trainer").iterdir())) == 8
    said = graftwork.json("convert", step, tmp_path / "back")["said"]
    assert said[0] == f"{step}: checkpoint of an older trainer (rank_N.pt)"
    assert graftwork.same(adapter, tmp_path / "back", base)


@pytest.mark.parametrize("source", ["dense", "apart"])
def test_rank_files_alone_need_an_alpha(
    graftwork: Graftwork, qwen: Path, moe: Path, tmp_path: Path, source: str, request: pytest.FixtureRequest
) -> None:
    adapter: Path = request.getfixturevalue(source)
    step = graftwork.older(adapter, "run_a")
    shutil.rmtree(step / "weight")
    says = graftwork.refuses("convert", step, tmp_path / "a" / "back")
    assert "nothing in it says the scale" in says and "give --alpha" in says
    graftwork.says("convert", step, tmp_path / "back", "--alpha", 8)
    assert graftwork.same(adapter, tmp_path / "back", qwen if source == "dense" else moe)
    assert "graftwork convert" in graftwork.refuses("adapter", "export", step, "--out", tmp_path / "exported")
    graftwork.says("convert", step, tmp_path / "other", "--alpha", 16)
    assert graftwork.json("adapter", "inspect", tmp_path / "other")["modules"][0]["scale"] == 4.0


def test_rank_files_wider_than_the_run_are_those_of_its_slot(graftwork: Graftwork, dense: Path, tmp_path: Path) -> None:
    """Directions beyond the run's rank do nothing and go; where they do something, the scale would be a guess."""
    step = graftwork.older(dense, "run_a", 1)
    path = step / "trainer" / "rank_0.pt"
    content = torch.load(path, weights_only=True)
    for name, tensor in content["model"].items():
        more = torch.zeros(tensor.shape[0], 2) if "lora_B" in name else torch.randn(2, tensor.shape[1])
        content["model"][name] = torch.cat([tensor, more], dim=1 if "lora_B" in name else 0)
    torch.save(content, path)
    graftwork.says("convert", step, tmp_path / "back")
    assert read_peft(tmp_path / "back").adapter.digest() == read_peft(dense).adapter.digest()
    content["model"][f"{Q0}.lora_B.weight"][:, -1] = 1
    torch.save(content, path)
    assert "self_attn.q_proj has rank" in graftwork.refuses("convert", step, tmp_path / "again")


def test_two_tensors_for_one_factor_are_refused(graftwork: Graftwork, dense: Path, tmp_path: Path) -> None:
    step = graftwork.older(dense, "run_a", 1)
    path = step / "trainer" / "rank_0.pt"
    content = torch.load(path, weights_only=True)
    content["model"][f"{Q0}.lora_A.critic.weight"] = content["model"][f"{Q0}.lora_A.weight"] * 2
    torch.save(content, path)
    assert "is a second factor A of model.layers.0.self_attn.q_proj" in graftwork.refuses(
        "convert", step, tmp_path / "back"
    )


def test_a_checkpoint_can_start_another_run(graftwork: Graftwork, dense: Path, tmp_path: Path) -> None:
    first = graftwork.step_0(dense, "run_a")
    graftwork.says("convert", first, tmp_path / "run_b", "--rank", 6)
    weight = tmp_path / "run_b" / "checkpoints" / "step_0" / "weight"
    assert {pair.rank for pair in read_peft(weight).adapter.pairs.values()} == {6}


@pytest.mark.parametrize("option", [["--rank", 2], ["--ignore", "lm_head"], ["--allow-lossy"], ["--ranks", 4]])
def test_no_option_is_dropped_in_silence(
    graftwork: Graftwork, dense: Path, tmp_path: Path, option: list[object]
) -> None:
    step = graftwork.older(dense, "run_a")
    assert str(option[0]) in graftwork.refuses("convert", step, tmp_path / "back", *option)


def test_a_run_does_not_open_rank_files_and_says_what_to_do(graftwork: Graftwork, dense: Path) -> None:
    step = graftwork.older(dense, "run_a")
    with pytest.raises(CannotResume, match=r"checkpoint of an older trainer.*graftwork convert .*step_0 ADAPTER_DIR"):
        open_checkpoint(step.parent)


def change_rank(step: Path, rank: int, **changes: Any) -> None:
    path = step / "trainer" / f"rank_{rank}.pt"
    content = torch.load(path, weights_only=True)
    content["model"].update(changes)
    torch.save(content, path)


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_rank_files_that_are_not_whole_are_refused_by_name(graftwork: Graftwork, dense: Path, tmp_path: Path) -> None:
    words = ("convert", graftwork.older(dense, "run_a"), tmp_path / "new" / "back")
    step = words[1]
    change_rank(step, 2, **{"model.norm.weight": torch.ones(3)})
    assert "'model.norm.weight' is no LoRA factor of a module" in graftwork.refuses(*words)
    change_rank(step, 2, **{"model.norm.weight": 3})
    assert "rank_2.pt: 'model.norm.weight' is no tensor of numbers" in graftwork.refuses(*words)
    torch.save({"model": {"x": Harmful(tmp_path / "harm")}}, step / "trainer" / "rank_2.pt")
    assert "rank_2.pt cannot be read as tensors and plain values" in graftwork.refuses(*words)
    (step / "trainer" / "rank_2.pt").unlink()
    assert "rank_2.pt is missing; every rank's file is needed" in graftwork.refuses(*words)
    (step / "STABLE").unlink()
    assert "has no STABLE file" in graftwork.refuses(*words)


def test_a_piece_that_one_rank_lacks_is_missed(graftwork: Graftwork, dense: Path, tmp_path: Path) -> None:
    step = graftwork.older(dense, "run_a")
    path = step / "trainer" / "rank_5.pt"
    content = torch.load(path, weights_only=True)
    del content["model"][f"{Q0}.lora_B.weight"]
    torch.save(content, path)
    assert f"{Q0}.lora_B" in graftwork.refuses("convert", step, tmp_path / "back")


def test_a_number_that_is_not_finite_in_a_rank_file(graftwork: Graftwork, dense: Path, tmp_path: Path) -> None:
    step = graftwork.older(dense, "run_a", 1)
    change_rank(step, 0, **{f"{Q0}.lora_B.weight": torch.full((64, 4), math.nan)})
    says = graftwork.refuses("convert", step, tmp_path / "back")
    assert f"'{Q0}.lora_B.weight' holds a number that is not finite" in says


def test_ranks_that_all_hold_everything_are_read_as_one(graftwork: Graftwork, shared: Path, tmp_path: Path) -> None:
    step = graftwork.older(shared, "run_a", 1)
    for rank in range(1, 4):
        shutil.copy(step / "trainer" / "rank_0.pt", step / "trainer" / f"rank_{rank}.pt")
    graftwork.says("convert", step, tmp_path / "back")
    assert graftwork.digest(tmp_path / "back") == read_peft(shared).adapter.digest()


# --- rank files of distributed tensors --------------------------------------------------------------------------------


@contextmanager
def group(backend: str, rank: int, ranks: int) -> Iterator[None]:
    store = FakeStore() if backend == "fake" else dist.HashStore()
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def tensors_in(step: Path) -> dict[str, Tensor]:
    return torch.load(step / "trainer" / "rank_0.pt", weights_only=True)["model"]


def distribute(step: Path, mesh_shape: tuple[int, ...], placements: Sequence[Any]) -> None:
    """Write the one rank file anew as those of a mesh, each rank with its piece: groups without a network."""
    whole = tensors_in(step)
    for rank in range(math.prod(mesh_shape)):
        with group("fake", rank, math.prod(mesh_shape)):
            mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("outer", "inner")[: len(mesh_shape)])
            model = {name: _local(tensor, mesh, placements) for name, tensor in whole.items()}
            torch.save({"model": model}, step / "trainer" / f"rank_{rank}.pt")


def _local(tensor: Tensor, mesh: Any, placements: Sequence[Any]) -> DTensor:
    piece = tensor
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = piece.chunk(mesh.size(axis), dim=placement.dim)
            place = mesh.get_local_rank(axis)
            piece = parts[place] if place < len(parts) else piece.narrow(placement.dim, 0, 0)
    return DTensor.from_local(
        piece.clone(), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


@pytest.mark.parametrize(
    ("mesh_shape", "placements"),
    [((8,), [Shard(0)]), ((2,), [Shard(1)]), ((3,), [Replicate()]), ((2, 2), [Shard(0), Shard(0)])],
    ids=str,
)
def test_distributed_tensors_are_put_together(
    graftwork: Graftwork, shared: Path, tmp_path: Path, mesh_shape: tuple[int, ...], placements: list[Any]
) -> None:
    step = graftwork.older(shared, "run_a", 1)
    distribute(step, mesh_shape, placements)
    graftwork.says("convert", step, tmp_path / "back")
    assert graftwork.digest(tmp_path / "back") == read_peft(shared).adapter.digest()


def test_distributed_tensors_that_are_replicated_and_cut(graftwork: Graftwork, moe: Path, tmp_path: Path) -> None:
    """HSDP: two groups of ranks with the same pieces. Right or refused, never twice the experts."""
    source = save_with_peft(moe, tmp_path / "source", target_modules=[], target_parameters=FUSED_EXPERTS)
    step = graftwork.older(source, "run_a", 1)
    distribute(step, (2, 2), [Replicate(), Shard(0)])
    if graftwork.run("convert", step, tmp_path / "back").code == 0:
        assert graftwork.digest(tmp_path / "back") == read_peft(source).adapter.digest()


def test_a_process_without_a_group_reads_distributed_tensors(graftwork: Graftwork, dense: Path, tmp_path: Path) -> None:
    step = graftwork.older(dense, "run_a", 1)
    with group("gloo", 0, 1):
        mesh = init_device_mesh("cpu", (1,))
        model = {name: distribute_tensor(tensor, mesh, [Shard(0)]) for name, tensor in tensors_in(step).items()}
        torch.save({"model": model}, step / "trainer" / "rank_0.pt")
    ended = in_a_process("convert", step, tmp_path / "back", "--json")
    assert ended.code == 0 and list(one_object(ended.out)) == ["folder", "format", "said"], ended.err
    assert read_peft(tmp_path / "back").adapter.digest() == read_peft(dense).adapter.digest()


# --- all the way round ------------------------------------------------------------------------------------------------


def examples(count: int = 6, length: int = 10) -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example(
            rng.integers(0, VOCAB, length).astype(np.int32), np.arange(length) >= 2,
            np.zeros(length, dtype=np.float32), 1.0,
        )
        for _ in range(count)
    ]  # fmt: skip


def test_experts_of_an_older_trainer_go_on_learning(
    graftwork: Graftwork, apart: Path, moe: Path, tmp_path: Path
) -> None:
    """8 rank files -> adapter -> step_0 -> one step."""
    older = graftwork.older(apart, "run_old")
    graftwork.says("convert", older, tmp_path / "adapter", "--format", "peft-per-expert")
    step = graftwork.step_0(tmp_path / "adapter", "run_new", "--base", moe)
    snapshot = snapshot_in(step)
    assert snapshot.adapter.digest() == read_peft(apart).adapter.digest()

    base = load_base(
        ModelConfig(path=str(moe), dtype="float32", device="cpu"),
        LoraConfig(max_rank=4, target_modules=("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
    )
    config = LearnerConfig(OptimizerConfig(), None, 1.0, tokens_per_micro_batch=40, logprob_chunk_tokens=32)
    learner = Learner(Banks.of(base, 1), 0, config, snapshot)
    outcome, sums = learner.learn_from(examples(), "batch")

    assert not outcome.skipped and 0 < outcome.gradient_norm < math.inf
    assert math.isfinite(sums.loss) and learner.state.step == 1
    after = learner.adapter()
    for path, before in snapshot.adapter.pairs.items():
        for old, new in ((before.a, after.pairs[path].a), (before.b, after.pairs[path].b)):
            assert bool(torch.isfinite(new).all()) and not torch.equal(old, new), path


def test_peft_holds_what_the_round_trip_gives(graftwork: Graftwork, dense: Path, qwen: Path, tmp_path: Path) -> None:
    """Import at another rank, 8 rank files, back: PEFT's logits of the first and of the last."""
    step = graftwork.older(dense, "run_a", 8, "--base", qwen, "--rank", 8, "--alpha", 5)
    graftwork.says("convert", step, tmp_path / "back")
    tokens = sequences()
    bare, expected, found = (logits(qwen, adapter, tokens)[0] for adapter in (None, dense, tmp_path / "back"))
    effect = float((expected - bare).abs().max())
    assert float((found - expected).abs().max()) / effect < 1e-5
