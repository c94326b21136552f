"""`graftwork adapter ...`: look at saved adapters, bring them to a base, write them in other layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from graftwork.programs.adapter import ImportOptions

adapter_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at saved adapters and change them.")

AdapterPath = Annotated[Path, typer.Argument(help="A saved adapter (PEFT), or a trainer's checkpoint.")]
Base = Annotated[str | None, typer.Option(help="Folder or hub id of the base model.")]
Rank = Annotated[int | None, typer.Option(min=1, max=65536, help="Rank of the run. Default: the adapter's highest.")]
Alpha = Annotated[float | None, typer.Option(help="Scale = alpha / rank. Default: the scale is the adapter's.")]
Targets = Annotated[str | None, typer.Option(help="q_proj,v_proj or all-linear. Default: the adapter's own modules.")]
Lossy = Annotated[bool, typer.Option("--allow-lossy", help="Cut a rank that is too high by SVD; else it is refused.")]
Ignore = Annotated[list[str] | None, typer.Option(help="Leave out a module, or a field of full copies. Repeatable.")]
Name = Annotated[str | None, typer.Option("--adapter", help="Which adapter, where the file holds several.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Seed = Annotated[int, typer.Option(min=0, help="Of factors that start fresh.")]
Format = Annotated[str, typer.Option(help="How experts lie: peft, peft-per-expert, vllm-3d or stacked.")]


def import_options(
    base: str | None, rank: int | None, alpha: float | None, targets: str | None, allow_lossy: bool,
    ignore: list[str] | None, adapter: str | None, seed: int,
) -> ImportOptions:  # fmt: skip
    from graftwork.adapters.formats.peft_read import Choice
    from graftwork.adapters.prepare import Wish
    from graftwork.programs.adapter import ImportOptions

    names = None if targets is None else tuple(name.strip() for name in targets.split(","))
    choice = Choice(tuple(ignore or ()), adapter)
    return ImportOptions(base, Wish(rank, alpha, allow_lossy, seed, names), choice)


@adapter_app.command(name="inspect")
def adapter_inspect(
    path: AdapterPath,
    adapter: Name = None,
    ignore: Ignore = None,
    as_json: Json = False,
) -> None:
    """What is in an adapter: modules, ranks, scales, layout, digest, norms, anything odd."""
    from graftwork.adapters.formats.peft_read import Choice
    from graftwork.programs import adapter as program
    from graftwork.programs.tables import inspect_lines

    found = program.inspect(path, Choice(tuple(ignore or ()), adapter))
    print(json.dumps(found) if as_json else "\n".join(inspect_lines(found)))


@adapter_app.command(name="import")
def adapter_import(
    path: AdapterPath,
    out: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")],
    base: Base = None,
    rank: Rank = None,
    alpha: Alpha = None,
    targets: Targets = None,
    allow_lossy: Lossy = False,
    ignore: Ignore = None,
    adapter: Name = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make an adapter fit a base, a rank, a scale and a set of modules: the same function, or a refusal."""
    from graftwork.programs import adapter as program

    options = import_options(base, rank, alpha, targets, allow_lossy, ignore, adapter, seed)
    done = program.import_(path, out, options)
    print(json.dumps({**done.report, "folder": str(done.folder)}) if as_json else "\n".join(done.lines()))


@adapter_app.command(name="export")
def adapter_export(
    path: AdapterPath,
    out: Annotated[Path, typer.Option(help="Folder to make; it must not exist.")],
    format: Format = "peft",
    as_json: Json = False,
) -> None:
    """Write an adapter in the layout that its reader wants; it differs for mixtures of experts only."""
    from graftwork.programs import adapter as program

    lines = program.export(path, out, format)
    print(json.dumps({"folder": str(out), "format": format, "said": lines}) if as_json else "\n".join(lines))


@adapter_app.command(name="diff")
def adapter_diff(
    one: AdapterPath,
    other: AdapterPath,
    base: Annotated[str, typer.Option(help="Folder or hub id of the base model.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the tokens.")] = 0,
    as_json: Json = False,
) -> None:
    """Do two adapters compute the same function? By module, and on the logits of random tokens (fp32)."""
    from graftwork.programs import adapter as program
    from graftwork.programs.tables import diff_lines

    found = program.diff(one, other, base, seed)
    print(json.dumps(found) if as_json else "\n".join(diff_lines(found)))
