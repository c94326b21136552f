"""Findings about adapters as lines for a person."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MODULES_SHOWN = 12


def inspect_lines(found: dict[str, Any]) -> list[str]:
    """`graftwork adapter inspect`: a row a kind of module, not one a module."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found["modules"]:
        kind = (row["module"].rpartition(".")[2], *row["shape"], row["rank"], row["scale"], row["layout"], row["dtype"])
        kinds.setdefault(kind, []).append(row)
    header = ["module", "count", "out x in", "rank", "scale", "dtype", "layout", "norm of update"]
    rows = [
        [
            kind[0], str(len(group)), " x ".join(map(str, group[0]["shape"])), str(group[0]["rank"]),
            f"{group[0]['scale']:g}", group[0]["dtype"], group[0]["layout"], _span([row["norm"] for row in group]),
        ]
        for kind, group in sorted(kinds.items(), key=lambda item: str(item[0]))
    ]  # fmt: skip
    base = found["base_model"] or "not named"
    print_ = found["base_fingerprint"]
    return [
        f"{found['path']}: {found['format']}, digest {found['digest'][:16]}",
        f"base: {base} (its own claim)" + (f", fingerprint {print_[:12]}" if print_ else ""),
        *table(header, rows),
        *([f"files beside it: {', '.join(found['files_beside'])}"] if found["files_beside"] else []),
        *(f"odd: {text}" for text in found["odd"]),
        *(f"note: {text}" for text in found["notes"]),
    ]


def diff_lines(found: dict[str, Any]) -> list[str]:
    """`graftwork adapter diff`: the modules that differ most, then the verdict."""
    rows = sorted(found["modules"], key=lambda row: -row["difference"])
    shown = [[row["module"], f"{row['difference']:.2e}"] for row in rows[:MODULES_SHOWN]]
    more = [f"... and {len(rows) - MODULES_SHOWN} more, none larger"] if len(rows) > MODULES_SHOWN else []
    verdict = "the same function, to rounding" if found["same"] else "DIFFERENT functions"
    return [
        *table(["module", "relative difference of the update"], shown),
        *more,
        f"logits: largest difference {found['logits_max_difference']:.2e}, largest effect of either adapter "
        f"{found['effect_on_logits']:.2e}, relative {found['relative_difference']:.2e}",
        verdict,
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell, two spaces apart."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    return [line.rstrip() for line in lines]


def _span(numbers: Sequence[float]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
