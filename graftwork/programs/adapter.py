"""`graftwork adapter inspect | import | export | diff`, `graftwork convert`: what the command line wants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftwork.adapters.canonical import LoraPair, RunningDigest
from graftwork.adapters.compare import idle_directions, relative_difference, update_norm
from graftwork.adapters.convert import (
    FORMATS,
    Imported,
    RankFormat,
    Target,
    convert_adapter,
    export_adapter,
    import_adapter,
)
from graftwork.adapters.fit import spread_experts
from graftwork.adapters.formats.peft_config import RANK_MAX
from graftwork.adapters.formats.peft_read import Choice
from graftwork.adapters.formats.rank_files import has_rank_files
from graftwork.adapters.names import key_of, match_paths
from graftwork.adapters.opening import Opened, is_checkpoint, open_adapter
from graftwork.adapters.prepare import SlotSpec, Wish, prepare
from graftwork.adapters.source import AdapterSource, name_in_digest
from graftwork.config.section import ALL_LINEAR, LoraConfig, ModelConfig
from graftwork.errors import ConfigError, MisfitAdapter
from graftwork.lora.linear import Segment
from graftwork.lora.slots import SlotBank
from graftwork.model.attention import Group, PackedPlan
from graftwork.model.base import BaseModel, load_base, slot_spec
from graftwork.model.inject import Route
from graftwork.store.disk import Disk
from graftwork.store.layout import RUN_PREFIX

DIFF_TOKENS = 64
SAME = 1e-4
"""Relative difference up to which two adapters are called the same function."""
DEFAULT_FORMAT = "peft"


@dataclass(frozen=True)
class ImportOptions:
    """What the options of `adapter import` and `convert` say."""

    base: str | None
    wish: Wish
    choice: Choice

    def target(self, source: Path) -> Target:
        """The slots of the named base: of the targets, or of the modules that the adapter has."""
        if self.base is None:
            if self.wish.targets is not None:
                raise ConfigError("--targets needs --base or a trainer.json: only these say which modules there are")
            return Target()
        rank = self.wish.rank or RANK_MAX
        spec = slot_spec(self.base, LoraConfig(max_rank=rank, target_modules=self.wish.targets or ALL_LINEAR))
        with open_adapter(source, self.choice) as opened:
            recorded = opened.source.facts.base_fingerprint
            if self.wish.targets is None:
                spec = _narrowed(spec, opened)
            if self.wish.rank is None:
                spec = SlotSpec(max(f.rank for f in opened.source.modules.values()), spec.shapes)
        fingerprint = None if recorded is None else load_base(ModelConfig(path=self.base), LoraConfig()).fingerprint
        return Target(spec, self.base, fingerprint)


def _narrowed(spec: SlotSpec, opened: Opened) -> SlotSpec:
    """Only the modules that the adapter has; what the base has not stays to be refused by name."""
    known = set(match_paths(opened.source.modules, spec.shapes).values())
    return SlotSpec(spec.max_rank, {path: shape for path, shape in spec.shapes.items() if path in known})


# --- inspect ----------------------------------------------------------------------------------------------------------


def inspect(path: Path, choice: Choice) -> dict[str, Any]:
    """Everything that can be said of an adapter without its base. Raises AdapterError, Damaged."""
    with open_adapter(path, choice) as opened:
        rows, digest = [], RunningDigest()
        for module in sorted(opened.source.modules):
            facts, pair = opened.source.modules[module], opened.source.load(module)
            digest.add(name_in_digest(module, facts), pair)
            rows.append({
                "module": module, "shape": list(facts.shape), "rank": facts.rank, "scale": facts.scale,
                "layout": facts.layout, "dtype": str(pair.a.dtype).removeprefix("torch."),
                "norm": update_norm(pair), "idle_directions": idle_directions(pair),
            })  # fmt: skip
        source = opened.source
        return {
            "path": str(path), "format": opened.kind, "digest": digest.hexdigest(),
            "base_model": source.facts.base_model, "base_fingerprint": source.facts.base_fingerprint,
            "modules": rows, "files_beside": sorted(opened.companions()),
            "notes": list(source.notes), "odd": [*source.dropped, *_oddities(rows)],
        }  # fmt: skip


def _oddities(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What a person would want to know before a run starts from it."""
    odd = []
    if silent := [row for row in rows if row["norm"] == 0]:
        odd.append(f"{len(silent)} of {len(rows)} modules do nothing (B = 0), such as {silent[0]['module']}")
    if len({row["rank"] for row in rows}) > 1:
        odd.append("ranks differ: a run takes the highest for all, the others are padded")
    if len({row["scale"] for row in rows}) > 1:
        odd.append("scales differ: a run has one, B takes up the difference")
    norms = sorted(row["norm"] for row in rows if row["norm"] > 0)
    if norms and norms[-1] > 1000 * norms[len(norms) // 2]:
        largest = max(rows, key=lambda row: row["norm"])
        odd.append(
            f"the update of {largest['module']} is {norms[-1] / norms[len(norms) // 2]:.0f} times the median one"
        )
    return odd


# --- import, export, convert ------------------------------------------------------------------------------------------


def import_(source: Path, out: Path, options: ImportOptions) -> Imported:
    return import_adapter(Disk(), source, out, options.target(source), options.wish, options.choice)


def export(source: Path, out: Path, format: str) -> list[str]:
    """Raises ConfigError for a format that is not known."""
    _refuse_format(format)
    return export_adapter(Disk(), source, out, format)


def _refuse_format(format: str) -> None:
    if format not in FORMATS:
        raise ConfigError(f"--format {format} is not known; one of {', '.join(FORMATS)}")


def convert(
    source: Path, target: Path, options: ImportOptions, trainer_json: Path | None, ranks: int, rank_format: RankFormat,
    format: str,
) -> Imported | list[str]:  # fmt: skip
    """A checkpoint becomes an adapter; an adapter, or a checkpoint of ours when the target is called run_<id>, a run's
    step_0. Raises ConfigError for options of the other way."""
    _refuse_format(format)
    if is_checkpoint(source) and (has_rank_files(source) or not target.name.startswith(RUN_PREFIX)):
        _refuse_options("a checkpoint becomes an adapter as it is", {
            "--base": options.base is not None, "--rank": options.wish.rank is not None,
            "--allow-lossy": options.wish.allow_lossy, "--ignore": bool(options.choice.ignore),
            "--adapter": options.choice.adapter is not None, "--ranks": ranks != 1,
            "--rank-format": rank_format != "safetensors",
        })  # fmt: skip
        return export_adapter(Disk(), source, target, format, options.wish.alpha, older=True)
    _refuse_options("a run's checkpoint has one layout", {"--format": format != DEFAULT_FORMAT})
    slots = Target.of_trainer(trainer_json) if trainer_json and options.base is None else options.target(source)
    return convert_adapter(
        Disk(), source, target, slots, options.wish, options.choice, ranks=ranks, rank_format=rank_format
    )


def _refuse_options(why: str, given: Mapping[str, bool]) -> None:
    if needless := [option for option, is_given in given.items() if is_given]:
        raise ConfigError(
            f"{', '.join(needless)}: {why}; use `graftwork adapter import` and `export` one after the other"
        )


# --- diff -------------------------------------------------------------------------------------------------------------


def diff(one: Path, other: Path, base: str, seed: int) -> dict[str, Any]:
    """Do two adapters compute the same function on a base? Per module, and on the logits of random tokens, in fp32.

    Raises AdapterError, ModelError.
    """
    modules, rank = _module_differences(one, other)
    model = load_base(ModelConfig(path=base, dtype="float32", device="cpu"), LoraConfig(max_rank=rank))
    bank = model.new_bank(2, gradients=False)
    for slot, path in enumerate((one, other)):
        with open_adapter(path) as opened:
            prepared = prepare(opened.source, model.spec)
        bank.write(slot, prepared)
    tokens = torch.randint(model.vocab_size, (DIFF_TOKENS,), generator=torch.Generator().manual_seed(seed))
    bare, first, second = (_logits(model, bank, slot, tokens) for slot in (None, 0, 1))
    effect = float(torch.maximum((first - bare).abs().max(), (second - bare).abs().max()))
    largest = float((first - second).abs().max())
    relative = largest / effect if effect > 0 else 0.0
    apart = max(row["difference"] for row in modules)  # experts that no token went to show only here
    return {
        "one": str(one), "other": str(other), "base": base, "modules": modules, "logits_max_difference": largest,
        "effect_on_logits": effect,
        "relative_difference": relative,
        "same": max(relative, apart) <= SAME,
    }  # fmt: skip


def _module_differences(one: Path, other: Path) -> tuple[list[dict[str, Any]], int]:
    """(a row a module, the highest rank). A module that only one of them has differs by all that it does."""
    rows = []
    with open_adapter(one) as first, open_adapter(other) as second:
        by_key = [{key_of(path): path for path in opened.source.modules} for opened in (first, second)]
        for key in sorted({*by_key[0], *by_key[1]}):
            there = [
                (opened.source, paths[key]) if key in paths else None
                for opened, paths in zip((first, second), by_key, strict=True)
            ]
            experts = max(source.modules[path].shape[0] for source, path in filter(None, there))
            pairs = [None if pair is None else _whole(*pair, experts) for pair in there]
            rows.append({"module": by_key[0].get(key) or by_key[1][key], "difference": _difference(pairs)})
        ranks = [facts.rank for opened in (first, second) for facts in opened.source.modules.values()]
    return rows, max(ranks)


def _whole(source: AdapterSource, path: str, experts: int) -> LoraPair:
    """A module with a place for every expert; those that are missing do nothing."""
    facts, pair = source.modules[path], source.load(path)
    if len(facts.shape) == 2 or pair.a.shape[0] == experts:
        return pair
    present = facts.present or tuple(range(facts.shape[0]))
    return spread_experts(pair, present, experts, pair.a.new_zeros(experts, *pair.a.shape[1:]))


def _difference(pairs: list[LoraPair | None]) -> float:
    there = [pair for pair in pairs if pair is not None]
    if len(there) == 1:
        return 1.0 if update_norm(there[0]) > 0 else 0.0
    one, other = there
    if one.shape != other.shape:
        raise MisfitAdapter(f"the adapters belong to different bases: {list(one.shape)} and {list(other.shape)}")
    return relative_difference(one, other)


@torch.no_grad()
def _logits(model: BaseModel, bank: SlotBank, slot: int | None, tokens: Tensor) -> Tensor:
    """[T, V] of one sequence."""
    segments = () if slot is None else (Segment(slot, 0, len(tokens), bank.holding(slot).scale),)
    plan = PackedPlan((Group(0, 1, len(tokens)),))
    hidden = model.hidden(tokens, torch.arange(len(tokens)), plan, Route(bank, segments))
    return hidden @ model.head.T
