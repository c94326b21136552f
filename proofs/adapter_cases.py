"""The table of imports: what PEFT saved, how it is imported, and that both compute the same function.

Each exact case is told twice, against PEFT holding the source: once with PEFT holding the imported folder, both in
float64, and once with the trainer's own forward pass over a slot that holds the import, in float32. Errors are relative
to the adapter's effect on the logits. Each other case is a refusal by name that leaves nothing behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from torch import Tensor

from graftwork.adapters.formats.peft_read import Choice
from graftwork.adapters.opening import open_adapter
from graftwork.adapters.prepare import Wish, prepare
from graftwork.config.section import LoraConfig as SlotConfig
from graftwork.config.section import ModelConfig
from graftwork.errors import AdapterError, MisfitAdapter, UnreadableAdapter, UnsupportedAdapter
from graftwork.lora.linear import Segment
from graftwork.model.attention import Group, PackedPlan
from graftwork.model.base import BaseModel, load_base
from graftwork.model.inject import Route
from graftwork.programs.adapter import ImportOptions, import_
from proofs.adapter_models import (
    ATTENTION,
    FUSED_EXPERTS,
    SIZE,
    load,
    logits,
    make_base,
    randomise,
    rewritten,
    save_experts,
    save_with_peft,
    sequences,
)

EXPORT_BAR = 1e-5
SLOT_BAR = 1e-4
EFFECT_MIN = 0.1
"""An adapter that changes the logits by less proves nothing: transformers' norms are computed in float32 whatever the
model's type, so that differences below 1e-6 or so are theirs."""

Make = Callable[[Path, Path], Path]
"""(base, folder to make) -> the adapter's folder."""


@dataclass(frozen=True)
class Case:
    """source: the adapter as PEFT holds it. given: what is imported, the same adapter in other files (None: itself).
    refused: the error and words of it, for what is no plain LoRA or does not fit."""

    name: str
    base: str
    source: Make
    given: Make | None = None
    wish: Wish = Wish()
    choice: Choice = Choice()
    targets: tuple[str, ...] | None = None
    refused: tuple[type[AdapterError], str] | None = None


@dataclass
class Lab:
    """Bases and what they compute, made once."""

    folder: Path
    bases: dict[str, Path] = field(default_factory=dict)
    models: dict[str, BaseModel] = field(default_factory=dict)
    bare: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor = field(default_factory=sequences)
    effect_min: float = EFFECT_MIN

    def base(self, name: str) -> Path:
        if name not in self.bases:
            self.bases[name] = make_base(name, self.folder)
            self.bare[name] = logits(self.bases[name], None, self.tokens)[0]
        return self.bases[name]

    def model(self, name: str) -> BaseModel:
        """With slots for everything, of rank 24 at most."""
        if name not in self.models:
            config = ModelConfig(path=str(self.base(name)), dtype="float32", device="cpu")
            self.models[name] = load_base(config, SlotConfig(max_rank=24))
        return self.models[name]


class TooWeak(AssertionError):
    """The adapter's effect on the logits does not stand out of what float32 norms leave uncertain."""


@dataclass(frozen=True)
class Outcome:
    """export_error, slot_error: of an exact case. refusal: the message of another."""

    export_error: float | None = None
    slot_error: float | None = None
    refusal: str | None = None


def run(case: Case, lab: Lab, folder: Path) -> Outcome:
    """Raises AssertionError, naming what fell short."""
    base = lab.base(case.base)
    source = case.source(base, folder / "source")
    given = source if case.given is None else case.given(source, folder / "given")
    out = folder / "imported"
    options = ImportOptions(str(base), replace(case.wish, targets=case.targets), case.choice)
    if case.refused is not None:
        return refusal(case, given, out, options)
    report = import_(given, out, options).report
    assert report["exact"], f"{case.name}: the report says that the function changed: {report}"
    expected, clear = logits(base, source, lab.tokens)
    assert int(clear.sum()) >= len(clear) // 2, f"{case.name}: too many tokens at the routers' edges"
    effect = float((expected - lab.bare[case.base])[clear].abs().max())
    if effect < lab.effect_min:
        raise TooWeak(f"{case.name}: the adapter hardly does anything ({effect})")
    found, _ = logits(base, out, lab.tokens)
    exported = float((found - expected)[clear].abs().max()) / effect
    in_slot = slot_logits(lab.model(case.base), given, case, lab.tokens)
    held = float((in_slot - expected)[clear].abs().max()) / effect
    assert exported <= EXPORT_BAR, f"{case.name}: PEFT on the import differs by {exported:.2e} of the effect"
    assert held <= SLOT_BAR, f"{case.name}: the slot differs by {held:.2e} of the effect"
    return Outcome(exported, held)


def refusal(case: Case, given: Path, out: Path, options: ImportOptions) -> Outcome:
    assert case.refused is not None
    kind, words = case.refused
    try:
        import_(given, out, options)
    except AdapterError as error:
        assert type(error) is kind, f"{case.name}: {type(error).__name__}, expected {kind.__name__}: {error}"
        assert words in str(error), f"{case.name}: {words!r} is not in: {error}"
        assert not out.exists(), f"{case.name}: {out} was left behind"
        return Outcome(refusal=str(error))
    raise AssertionError(f"{case.name}: was taken in, expected {kind.__name__}")


@torch.no_grad()
def slot_logits(model: BaseModel, adapter: Path, case: Case, tokens: Tensor) -> Tensor:
    """The trainer's forward pass with the adapter in slot 1 of 2, all sequences in one micro-batch: float64 of fp32."""
    bank = model.new_bank(2, gradients=False)
    with open_adapter(adapter, case.choice) as opened:
        bank.write(1, prepare(opened.source, model.spec, case.wish))
    count, length = tokens.shape
    positions = torch.arange(length).repeat(count)
    route = Route(bank, (Segment(1, 0, tokens.numel(), bank.holding(1).scale),))
    hidden = model.hidden(tokens.reshape(-1), positions, PackedPlan((Group(0, count, length),)), route)
    return (hidden @ model.head.T).view(count, length, -1).double()


# --- sources ----------------------------------------------------------------------------------------------------------


def peft(**config: Any) -> Make:
    return lambda base, folder: save_with_peft(base, folder, **config)


def experts(**fields: Any) -> Make:
    return lambda base, folder: save_experts(folder, **{"rank": 4, "alpha": 8, **fields})


def eva(base: Path, folder: Path) -> Path:
    """PEFT's data-driven initialisation, which redistributes ranks among modules."""
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="eva", eva_config=EvaConfig(rho=2.0)
    )
    wrapped = get_peft_model(load(base, torch.float32), config, low_cpu_mem_usage=True)
    batches = [{"input_ids": sequences(seed), "attention_mask": torch.ones_like(sequences(seed))} for seed in range(4)]
    initialize_lora_eva_weights(wrapped, batches, show_progress_bar=False)
    randomise(wrapped, 1, "lora_B")
    wrapped.save_pretrained(folder)
    return folder


def pissa_converted(base: Path, folder: Path) -> Path:
    """PiSSA, trained, then saved as the plain LoRA that does the same on the untouched base."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="pissa")
    wrapped = get_peft_model(load(base, torch.float32), config)
    start = folder.parent / "pissa_start"
    wrapped.peft_config["default"].init_lora_weights = True
    wrapped.save_pretrained(start)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(wrapped.named_parameters()):
            if "lora_" in name:
                generator = torch.Generator().manual_seed(index)
                parameter.add_(torch.randn(parameter.shape, generator=generator) * SIZE)
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    wrapped.save_pretrained(folder, path_initial_model_for_weight_conversion=str(start))
    return folder


def saved_again_by_peft(base: Path, folder: Path) -> Path:
    """Single experts, loaded by PEFT, which fuses them, and saved by it: patterns with `.*\\.` in the configuration."""
    first = save_experts(folder.parent / "single", rank=4, alpha=8)
    wrapped: Any = PeftModel.from_pretrained(load(base, torch.float32), str(first))
    wrapped.save_pretrained(folder)
    return folder


# --- the same adapter in other files ----------------------------------------------------------------------------------

Change = Callable[[dict[str, Tensor], dict[str, Any]], dict[str, Tensor]]


def written(change: Change) -> Make:
    return lambda source, folder: rewritten(source, folder, change)


def renamed(old: str, new: str) -> Make:
    return written(lambda tensors, config: {name.replace(old, new): tensor for name, tensor in tensors.items()})


def two_adapters(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Under two names in one file; the second one is meant."""
    first = {name.replace(".weight", ".first.weight"): torch.ones_like(tensor) for name, tensor in tensors.items()}
    return {**first, **{name.replace(".weight", ".second.weight"): tensor for name, tensor in tensors.items()}}


def zero_biases(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    config["lora_bias"] = True
    biases = {n.replace(".weight", ".bias"): torch.zeros(t.shape[0]) for n, t in tensors.items() if "lora_B" in n}
    return {**tensors, **biases}


def in_halves(dtype: torch.dtype) -> Make:
    return written(lambda tensors, config: {name: tensor.to(dtype) for name, tensor in tensors.items()})


def by_experts(tensors: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    """name with `experts.gate_proj` for `experts.3.gate_proj` -> the experts' tensors in order."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        head, mark, rest = name.partition(".experts.")
        if mark:
            number, _, tail = rest.partition(".")
            found.setdefault(f"{head}.experts.{tail}", {})[int(number)] = tensor
    return {name: [parts[number] for number in sorted(parts)] for name, parts in found.items()}


def stacked(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """[E, r, in] and [E, out, r]."""
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    return {**rest, **{name: torch.stack(parts) for name, parts in by_experts(tensors).items()}}


def numbered(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """As in `rank_N.pt`: w1, w2, w3, without PEFT's prefix."""
    names = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    found = {}
    for name, tensor in stacked(tensors, config).items():
        for part, number in names.items():
            name = name.replace(f"experts.{part}.lora_", f"experts.{number}_lora_")
        found[name.removeprefix("base_model.model.")] = tensor
    return found


def one_factor_for_all(source: Path, folder: Path) -> Path:
    """Every expert with expert 0's A: the source that PEFT holds, one tensor an expert."""

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
        firsts = {name: parts[0] for name, parts in by_experts(tensors).items() if "lora_A" in name}
        return {name: firsts.get(_without_number(name), tensor) for name, tensor in tensors.items()}

    return rewritten(source, folder, change)


def _without_number(name: str) -> str:
    head, mark, rest = name.partition(".experts.")
    return f"{head}.experts.{rest.partition('.')[2]}" if mark else name


def shared_experts(base: Path, folder: Path) -> Path:
    return one_factor_for_all(save_experts(folder.parent / "apart", rank=4, alpha=8), folder)


def shared_outer(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """One A [r, in] for all experts, B stacked."""
    return {n: t[0] if ".experts." in n and "lora_A" in n else t for n, t in stacked(tensors, config).items()}


def shared_axis(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """One A [1, r, in] for all experts, B stacked."""
    return {n: t[:1] if ".experts." in n and "lora_A" in n else t for n, t in stacked(tensors, config).items()}


FLAT_TO_STACKED = {".experts.base_layer.": ".experts.gate_up_proj.", ".experts.lora_": ".experts.down_proj.lora_"}


def gate_above_up(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """From PEFT's flattened file: fused and 3-D, [E, r, in] and [E, 2I, r]."""
    found = {}
    for name, tensor in tensors.items():
        for old, new in (
            (".experts.base_layer.", ".experts.gate_up_proj."),
            (".experts.lora_", ".experts.down_proj.lora_"),
        ):
            if old in name:
                name = name.replace(old, new)
                rank = config["r"]
                if "lora_A" in name:
                    tensor = tensor.view(-1, rank, tensor.shape[1])
                else:
                    tensor = tensor.view(tensor.shape[0], rank, -1).permute(2, 0, 1)
                break
        found[name] = tensor
    return found


def mixtral_names(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """block_sparse_moe.experts.3.w1."""
    names = {
        ".gate_proj.": ".w1.",
        ".down_proj.": ".w2.",
        ".up_proj.": ".w3.",
        ".mlp.experts.": ".block_sparse_moe.experts.",
    }
    found = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            for old, new in names.items():
                name = name.replace(old, new)
        found[name] = tensor
    return found


def rslora(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    config["use_rslora"] = True
    return tensors


def experts_of_other_alpha(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    config["alpha_pattern"] = {"experts.10.up_proj": 20, "experts.1.up_proj": 2, "gate_proj": 5}
    return tensors


def experts_of_other_rank(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    config["rank_pattern"] = {"experts.10.up_proj": 2, "down_proj": 3}
    config["alpha_pattern"] = {"experts.10.up_proj": 4, "down_proj": 6}  # the scale stays 2
    changed = {}
    for name, tensor in tensors.items():
        rank = 2 if "experts.10.up_proj" in name else 3 if "down_proj" in name else 4
        changed[name] = tensor[:rank] if "lora_A" in name else tensor[:, :rank]
    return changed


EXPERT_SCALES: dict[str, Change] = {
    "rsLoRA": rslora, "unequal alphas": experts_of_other_alpha, "unequal ranks": experts_of_other_rank,
}  # fmt: skip


def of_one_scale(change: Change) -> Make:
    """The same function as single experts of rank 4 and alpha 8 alone. PEFT fuses those by r and lora_alpha, whatever
    patterns and rsLoRA say: so each expert's own scale is put into its B, and its rank filled up with zeros."""

    def plain(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
        changed = change(tensors, about := dict(config))
        found = {}
        for name, tensor in changed.items():
            module = name.partition(".lora_")[0]
            rank = changed[f"{module}.lora_A.weight"].shape[0]
            alpha = next((a for key, a in about.get("alpha_pattern", {}).items() if module.endswith(f".{key}")), 8)
            scale = alpha / (rank**0.5 if about.get("use_rslora") else rank)
            filled = torch.zeros(4, tensor.shape[1]) if "lora_A" in name else torch.zeros(tensor.shape[0], 4)
            filled[: tensor.shape[0], : tensor.shape[1]] = tensor if "lora_A" in name else tensor * (scale / 2)
            found[name] = filled
        return found

    return lambda base, folder: rewritten(experts()(base, folder.parent / "plain"), folder, plain)


def from_plain(change: Change) -> Make:
    """What `of_one_scale` started from, changed: the file as it was saved."""
    return lambda source, folder: rewritten(source.parent / "plain", folder, change)


def half_of_a_pair(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.q_proj.lora_B" not in name}


def another_rank(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    config["r"] = 3
    return tensors


def with_number(value: float) -> Change:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
        name = sorted(tensors)[1]
        tensors[name] = tensors[name].clone()
        tensors[name][1, 1] = value
        return tensors

    return change


def configured(**fields: Any) -> Make:
    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
        config.update(fields)
        return tensors

    return written(change)


def trained_biases(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: tensor + 1 if name.endswith(".bias") else tensor for name, tensor in zero_biases(tensors, config).items()
    }


def peft_biases(base: Path, folder: Path) -> Path:
    """bias="all" on a base that has biases, moved by training."""
    return save_with_peft(base, folder, target_modules=["q_proj", "v_proj"], bias="all", which="bias")


# --- the table --------------------------------------------------------------------------------------------------------

QV = {"target_modules": ["q_proj", "v_proj"]}
MOE = {"target_modules": ["q_proj", "o_proj"], "target_parameters": FUSED_EXPERTS}
WISHES = {
    "as it is": Wish(),
    "rank 8": Wish(rank=8),
    "rank 16, alpha 5": Wish(rank=16, alpha=5.0),
    "alpha 3": Wish(alpha=3.0),
}
DENSE_SOURCES: dict[str, Make] = {
    "all-linear": peft(target_modules="all-linear"),
    "rsLoRA": peft(r=6, lora_alpha=5, use_rslora=True, **QV),
    "rank_pattern": peft(rank_pattern={"q_proj": 8, "layers.1.self_attn.v_proj": 2}, **QV),
    "alpha_pattern": peft(alpha_pattern={"layers.0.self_attn.q_proj": 3, "q_proj": 20}, **QV),
    "both patterns and rsLoRA": peft(rank_pattern={"q_proj": 8}, alpha_pattern={"v_proj": 3}, use_rslora=True, **QV),
    "regular rank_pattern": peft(rank_pattern={r".*1\.self_attn\.(q|v)_proj": 6}, **QV),
    "regex targets": peft(target_modules=r".*layers\.1\..*_proj"),
    "layers_to_transform": peft(target_modules=["o_proj", "down_proj"], layers_to_transform=[0]),
    "gaussian": peft(init_lora_weights="gaussian", **QV),
    "orthogonal": peft(init_lora_weights="orthogonal", **QV),
    "eva": eva,
    "PiSSA, converted": pissa_converted,
    "a weight among target_parameters": peft(target_modules=["q_proj"], target_parameters=["self_attn.o_proj.weight"]),
}
MOE_SOURCES: dict[str, Make] = {
    "fused experts and attention": peft(**MOE),
    "fused experts, rsLoRA": peft(r=6, lora_alpha=5, use_rslora=True, **MOE),
    "fused experts, patterns": peft(
        rank_pattern={"experts.down_proj": 2}, alpha_pattern={"experts.gate_up_proj": 3, "q_proj": 20}, **MOE
    ),
    "gate_up alone": peft(target_modules=[], target_parameters=["experts.gate_up_proj"]),
    "down alone": peft(target_modules=[], target_parameters=["experts.down_proj"]),
    "one layer's experts": peft(target_modules=[], target_parameters=["layers.1.mlp.experts.gate_up_proj"]),
    "single experts": experts(),
    "single experts, saved again by PEFT": saved_again_by_peft,
}
ONE = "base_model.model."


def exact_cases() -> list[Case]:
    cases = [
        Case(f"qwen3, {name}, {wished}", "qwen3", source, wish=wish)
        for name, source in DENSE_SOURCES.items()
        for wished, wish in WISHES.items()
        if wished == "as it is" or (name in ("all-linear", "rsLoRA", "both patterns and rsLoRA") and wish != Wish())
    ]
    cases += [
        Case(f"moe, {name}, {wished}", "moe", source, wish=wish)
        for name, source in MOE_SOURCES.items()
        for wished, wish in WISHES.items()
        if wished in ("as it is", "rank 16, alpha 5")
    ]
    for base, leaves in (("llama", ["q_proj", "down_proj"]), ("phi3", ["qkv_proj", "gate_up_proj"])):
        for name, fields in (
            ("two targets", {"target_modules": leaves}),
            ("all-linear", {"target_modules": "all-linear"}),
        ):
            for wished, wish in WISHES.items():
                cases.append(Case(f"{base}, {name}, {wished}", base, peft(**fields), wish=wish))
        rsl = peft(r=3, use_rslora=True, rank_pattern={leaves[0]: 6}, target_modules=leaves)
        cases.append(Case(f"{base}, rsLoRA and rank_pattern", base, rsl))
    return [*cases, *_other_targets(), *_other_names(), *_other_layouts(), *_other_dtypes()]


def _other_targets() -> list[Case]:
    wide, qvo = ("all-linear",), ("q_proj", "v_proj", "o_proj")
    return [
        Case("qwen3, more targets", "qwen3", peft(**QV), targets=qvo),
        Case("qwen3, all targets, rank 8", "qwen3", peft(**QV), targets=wide, wish=Wish(rank=8)),
        Case("moe, attention into experts' slots", "moe", peft(target_modules=ATTENTION), targets=wide),
        Case("moe, gate_up into all slots", "moe", MOE_SOURCES["gate_up alone"], targets=wide, wish=Wish(rank=8)),
        Case("llama, one layer into all", "llama", peft(layers_to_transform=[1], **QV), targets=wide),
    ]


def _other_names() -> list[Case]:
    qv = peft(**QV)
    return [
        Case("no prefix", "qwen3", qv, renamed(ONE, "")),
        Case("text part of a larger model", "qwen3", qv, renamed(f"{ONE}model.", f"{ONE}model.language_model.")),
        Case("text part, older", "qwen3", qv, renamed(f"{ONE}model.", f"{ONE}language_model.model.")),
        Case("without `model.`", "qwen3", qv, renamed(f"{ONE}model.", "")),
        Case("an adapter name in the file", "qwen3", qv, renamed(".weight", ".default.weight")),
        Case("one of two adapters", "qwen3", qv, written(two_adapters), choice=Choice(adapter="second")),
        Case("moe, no prefix, adapter name", "moe", peft(**MOE), written(
            lambda t, c: {n.removeprefix(ONE).replace(".weight", ".default.weight"): x for n, x in t.items()}
        )),
        Case("moe, a larger model", "moe", experts(), renamed(f"{ONE}model.", f"{ONE}model.language_model.")),
        Case("moe, Mixtral's names", "moe", experts(), written(mixtral_names)),
        Case("biases of zero", "qwen3", qv, written(zero_biases)),
        Case("a regex as target_modules that would never end", "qwen3", qv, configured(target_modules="(a+)+$" * 99)),
        Case("another base's name", "qwen3", qv, configured(base_model_name_or_path="../../etc/passwd", revision="x")),
    ]  # fmt: skip


def _other_layouts() -> list[Case]:
    return [
        Case("moe, stacked", "moe", experts(), written(stacked)),
        Case("moe, stacked, rank 8", "moe", experts(), written(stacked), wish=Wish(rank=8, alpha=3.0)),
        Case("moe, stacked, gate above up", "moe", peft(**MOE), written(gate_above_up)),
        Case("moe, w1 w2 w3", "moe", experts(), written(numbered)),
        Case("moe, one A for all", "moe", shared_experts, written(shared_outer)),
        Case("moe, one A for all, as an axis", "moe", shared_experts, written(shared_axis)),
        *(
            Case(f"moe, single experts, {name}", "moe", of_one_scale(change), from_plain(change))
            for name, change in EXPERT_SCALES.items()
        ),
        Case("moe, block-diagonal back to its rank", "moe", saved_again_by_peft, wish=Wish(rank=4)),
    ]


def _other_dtypes() -> list[Case]:
    """The source that PEFT holds is itself in the smaller type: what is compared is the same numbers."""

    def small(dtype: torch.dtype, make: Make) -> Make:
        return lambda base, folder: in_halves(dtype)(make(base, folder.parent / "full"), folder)

    return [
        Case("qwen3, bfloat16", "qwen3", small(torch.bfloat16, peft(**QV))),
        Case("qwen3, float16, rank 8", "qwen3", small(torch.float16, peft(**QV)), wish=Wish(rank=8)),
        Case("moe, bfloat16", "moe", small(torch.bfloat16, experts()), wish=Wish(rank=8)),
    ]


def refused_cases() -> list[Case]:
    qv = peft(**QV)
    u, s, m = UnreadableAdapter, UnsupportedAdapter, MisfitAdapter
    table: list[tuple[str, str, Make, Make | None, dict[str, Any], type[AdapterError], str]] = [
        ("DoRA", "qwen3", peft(use_dora=True, **QV), None, {}, s, "use_dora = True: DoRA"),
        ("PiSSA, not converted", "qwen3", peft(init_lora_weights="pissa", **QV), None, {}, s, "path_initial_model"),
        ("OLoRA", "qwen3", peft(init_lora_weights="olora", **QV), None, {}, s, "init_lora_weights = 'olora'"),
        ("biases of the base", "llama", peft_biases, None, {}, s, "a trained bias"),
        ("biases of B", "qwen3", peft(lora_bias=True, **QV), None, {}, s, "a trained bias"),
        ("biases of B, by hand", "qwen3", qv, written(trained_biases), {}, s, "a trained bias"),
        ("modules_to_save", "qwen3", peft(modules_to_save=["lm_head"], **QV), None, {}, s, "modules_to_save"),
        ("trainable tokens", "qwen3", peft(trainable_token_indices=[1], **QV), None, {}, s, "trainable_token_indices"),
        ("aLoRA", "qwen3", peft(alora_invocation_tokens=[1], task_type="CAUSAL_LM", **QV), None, {}, s, "alora_inv"),
        ("embeddings", "qwen3", peft(target_modules=["q_proj", "embed_tokens"]), None, {}, s, "copy of embed_tokens"),
        ("the head", "qwen3", peft(target_modules=["q_proj", "lm_head"]), None, {}, s, "PEFT's copy of lm_head"),
        ("a router", "moe", peft(target_modules=["q_proj"], target_parameters=["mlp.gate.weight"]), None, {}, m,
         "slots do not have: model.layers.0.mlp.gate"),
        ("all-linear, which takes the router in", "moe", peft(target_modules="all-linear"), None, {}, m, "mlp.gate"),
        ("r against the tensors", "qwen3", qv, written(another_rank), {}, u, "adapter_config.json says r = 3"),
        ("half a pair", "qwen3", qv, written(half_of_a_pair), {}, u, "layers.1.self_attn.q_proj.lora_B"),
        ("a module outside the targets", "qwen3", peft(target_modules=ATTENTION), None,
         {"targets": ("q_proj",)}, m, "6 modules of the adapter that the slots do not have"),
        ("a regular alpha_pattern", "qwen3", peft(alpha_pattern={"(q|k)_proj": 3}, **QV), None, {}, s, "'(q|k)_proj'"),
        ("a rank above the run's", "qwen3", qv, None, {"wish": Wish(rank=2)}, m, "4 modules of a rank above 2"),
        ("another base's shapes", "qwen3", lambda base, folder: _of_another_base(base, folder), None, {}, m,
         "modules of another shape"),
        ("two adapters, none chosen", "qwen3", qv, written(two_adapters), {}, s, "several adapters: 'first', 'second'"),
        ("an adapter that is not there", "qwen3", qv, written(two_adapters), {"choice": Choice(adapter="third")}, s,
         "no adapter called 'third'"),
        ("NaN", "qwen3", qv, written(with_number(float("nan"))), {}, u, "[1, 1] is nan"),
        ("infinity", "moe", experts(), written(with_number(float("inf"))), {}, u, "[1, 1] is inf"),
        ("replicated layers", "qwen3", qv, configured(layer_replication=[[0, 2]]), {}, s, "layer_replication"),
        ("transposed", "qwen3", qv, configured(fan_in_fan_out=True), {}, s, "fan_in_fan_out"),
        ("a field that PEFT 0.21 has not", "qwen3", qv, configured(use_new_thing=True), {}, s, "use_new_thing"),
        ("too many experts", "moe", experts(), renamed("experts.11.", "experts.12."), {}, m, "found 13 x 24 x 32"),
        ("fused rank in a regular pattern", "moe", peft(**MOE), configured(rank_pattern={"(gate|x)_up": 4}), {}, s,
         "its rank stands in rank_pattern"),
        ("nothing to ignore", "qwen3", qv, None, {"choice": Choice(ignore=("lm_haed",))}, s, "called 'lm_haed'"),
    ]  # fmt: skip
    return [
        Case(f"refused: {name}", base, source, given, refused=(kind, words), **options)
        for name, base, source, given, options, kind, words in table
    ]


def _of_another_base(base: Path, folder: Path) -> Path:
    """The same names, but q_proj twice as high."""

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
        return {n: torch.cat([t, t]) if "q_proj.lora_B" in n else t for n, t in tensors.items()}

    return rewritten(save_with_peft(base, folder.parent / "other", **QV), folder, change)


def all_cases() -> list[Case]:
    return [*exact_cases(), *refused_cases()]


if __name__ == "__main__":
    print(json.dumps([case.name for case in all_cases()], indent=1))
