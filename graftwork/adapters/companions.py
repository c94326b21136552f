"""Tokenizer files that lie beside an adapter: what it was trained on. Compared with the base's, and carried along."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path

from graftwork.adapters.formats.untrusted import open_plain, parse_json_object, quote, read_exactly
from graftwork.errors import UnreadableAdapter

CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"
NAMES = (CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json")
BYTES_MAX = 64 * 2**20
DIFFERENCE_LINES_MAX = 20

Companions = Mapping[str, bytes]
"""File name -> content."""


def read_companions(folder: Path) -> dict[str, bytes]:
    """Those of `folder`. Raises UnreadableAdapter for a link, a pipe, or a file larger than BYTES_MAX."""
    found = {}
    for name in NAMES:
        path = folder / name
        if path.exists() or path.is_symlink():
            with open_plain(path) as (file, size):
                if size > BYTES_MAX:
                    raise UnreadableAdapter(f"{path} has {size} bytes; a tokenizer's file has at most {BYTES_MAX}")
                data = bytearray(size)
                read_exactly(file, memoryview(data), str(path))
            found[name] = bytes(data)
    return found


def differences(companions: Companions, base: Path | None) -> list[str]:
    """Warnings, one a file that says something else than the base's; what cannot be compared is said too."""
    if not companions:
        return []
    if base is None or not base.is_dir():
        return [f"{', '.join(companions)} beside the adapter could not be compared: the base's files are not at hand"]
    theirs = read_companions(base)
    found = []
    if TOKENIZER in companions and TOKENIZER in theirs and not _same_json(companions[TOKENIZER], theirs[TOKENIZER]):
        found.append("its tokenizer.json is not the base's: token ids may mean other texts; the run uses the base's")
    mine, base_template = _template(companions), _template(theirs)
    if mine is not None and base_template is None:
        found.append("it was trained with a chat template, and the base has none: the run cannot use chat prompts")
    elif mine is not None and base_template is not None and mine != base_template:
        found.append(
            "it was trained with ANOTHER CHAT TEMPLATE than the base's, which the run uses; the difference:\n"
            + "\n".join(_diff(base_template, mine))
        )
    return found


def _same_json(one: bytes, other: bytes) -> bool:
    """Equal as values; what is no JSON is equal only byte for byte."""
    if one == other:
        return True
    try:
        return bool(json.loads(one) == json.loads(other))
    except (ValueError, RecursionError):
        return False


def _template(files: Companions) -> str | None:
    """The chat template, from the file of its own or from the tokenizer's configuration."""
    if CHAT_TEMPLATE in files:
        return files[CHAT_TEMPLATE].decode(errors="replace")
    if TOKENIZER_CONFIG in files:
        fields = parse_json_object(files[TOKENIZER_CONFIG], TOKENIZER_CONFIG, 32)
        template = fields.get("chat_template")
        return template if isinstance(template, str | None) else json.dumps(template, indent=1)
    return None


def _diff(base: str, adapter: str) -> list[str]:
    """Unified, each line quoted: a template is somebody's text and must not steer a terminal."""
    lines = difflib.unified_diff(base.splitlines(), adapter.splitlines(), "base", "adapter", lineterm="", n=1)
    shown = [
        f"    {line[:1]}{quote(line[1:])[1:-1]}" for line, _ in zip(lines, range(DIFFERENCE_LINES_MAX), strict=False)
    ]
    return shown + (["    ..."] if len(shown) == DIFFERENCE_LINES_MAX else [])
