"""The shape of the code, checked on its syntax trees: arrows between rooms point down, and one module writes files.

Levels as in docs/design.md. An import points up when its target lies on a higher level, and sideways when it lies on
the same level in another room; both are refused, also when they stand inside a function.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "graftwork"
LEVELS = {
    "errors": -2, "logs": -1, "config": 0, "store": 1, "adapters": 2, "rollouts": 2, "parallel": 2, "lora": 3,
    "model": 4, "training": 5, "inference": 5, "programs": 6, "cli_adapter": 7, "cli": 8, "__main__": 9, "__init__": -3,
}  # fmt: skip
TORCH_FREE_ROOMS = ("config", "store", "rollouts")
TORCH_FREE_PROGRAMS = tuple(f"graftwork.programs.{name}" for name in ("orchestrator", "rl", "serve", "submit", "runs"))
TORCH = ("torch", "transformers", "accelerate", "peft")

WRITER = "store/disk.py"
ALLOWED_WRITES = {("programs/processes.py", "open_log"), ("adapters/formats/rank_files.py", "rank_file")}
"""A child's stdout needs a descriptor, and the text in its log is the child's own. rank_file saves to memory."""
WRITING_METHODS = {
    "write_text", "write_bytes", "unlink", "rmdir", "rename", "touch", "mkdir", "symlink_to", "hardlink_to",
    "save_pretrained", "save_file", "rmtree",
}  # fmt: skip
WRITING_FUNCTIONS = {
    "os.remove", "os.unlink", "os.rename", "os.replace", "os.rmdir", "os.mkdir", "os.makedirs", "os.link",
    "os.symlink", "os.truncate", "os.ftruncate", "os.removedirs", "shutil.rmtree", "shutil.move", "shutil.copy",
    "shutil.copy2", "shutil.copyfile", "shutil.copytree", "torch.save", "numpy.save", "np.save", "tempfile.mkdtemp",
    "tempfile.mkstemp", "tempfile.NamedTemporaryFile", "tempfile.TemporaryDirectory",
}  # fmt: skip
WRITING_FLAGS = re.compile(r"O_(WRONLY|RDWR|CREAT|TRUNC|APPEND|TMPFILE)")


# --- reading the code -------------------------------------------------------------------------------------------------


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, for every module of the package."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = ("graftwork", *path.relative_to(package).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import statement, wherever it stands; `from a import b` also gives a.b."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            yield node.lineno, source
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def bad_arrows(package: Path) -> list[str]:
    """Every import that points up or sideways, as `file:line: a -> b`."""
    known, found = modules(package), set()
    for name, path in known.items():
        here = room(name)
        assert here in LEVELS, f"{path}: the room {here!r} has no level; docs/design.md and this test must name it"
        for line, target in imports(name, path):
            if target not in known or room(target) in (here, "__init__"):
                continue
            if LEVELS[room(target)] >= LEVELS[here]:
                found.add(f"{path.relative_to(package)}:{line}: {here} -> {room(target)}")
    return sorted(found)


def reaches_torch(start: str, known: dict[str, Path]) -> list[str] | None:
    """A chain of imports from a module to torch, imports inside functions included; None when there is none."""
    chains, seen = [[start]], {start}
    while chains:
        chain = chains.pop()
        for _, target in imports(chain[-1], known[chain[-1]]):
            if target.split(".")[0] in TORCH:
                return [*chain, target]
            if target in known and target not in seen:
                seen.add(target)
                chains.append([*chain, target])
    return None


# --- who writes files -------------------------------------------------------------------------------------------------


def writes(package: Path) -> list[str]:
    """Every call outside store/disk.py that creates, changes, renames or deletes a file, as `file:line: call`."""
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name == WRITER:
            continue
        for function, call in calls(ast.parse(path.read_text())):
            if writes_a_file(call) and (name, function) not in ALLOWED_WRITES:
                found.append(f"{name}:{call.lineno}: {ast.unparse(call.func)}")
    return found


def calls(tree: ast.AST, function: str = "") -> Iterator[tuple[str, ast.Call]]:
    """(innermost function around it, call) of every call."""
    for node in ast.iter_child_nodes(tree):
        inside = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        if isinstance(node, ast.Call):
            yield inside, node
        yield from calls(node, inside)


def writes_a_file(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    last = name.rpartition(".")[2]
    if name == "os.open":
        return not set(re.findall(r"O_\w+", ast.unparse(call))) or bool(WRITING_FLAGS.search(ast.unparse(call)))
    if last == "open":
        return opens_for_writing(call, method=name != "open")
    if last == "savefig":
        return not (call.args and isinstance(call.args[0], ast.Name) and call.args[0].id == "picture")  # an io.BytesIO
    return name in WRITING_FUNCTIONS or (isinstance(call.func, ast.Attribute) and last in WRITING_METHODS)


def opens_for_writing(call: ast.Call, *, method: bool) -> bool:
    """`open(path, mode)` or `path.open(mode)`: mode anything but a constant without w, a, x and +."""
    place = 0 if method else 1
    given = [keyword.value for keyword in call.keywords if keyword.arg == "mode"] or call.args[place : place + 1]
    if not given:
        return False
    mode = given[0]
    if not isinstance(mode, ast.Constant):
        return not method  # `claim.open(checkpoint)` is somebody's method; `open(path, mode)` might write
    return isinstance(mode.value, str) and bool(set(mode.value) & set("wax+"))


# --- tests ------------------------------------------------------------------------------------------------------------


def test_arrows_point_down() -> None:
    assert bad_arrows(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "arrow"),
    [
        ("store/layout.py", "from graftwork.training import runs", "store -> training"),
        ("errors.py", "import graftwork.config.load", "errors -> config"),
        ("adapters/canonical.py", "from graftwork.rollouts import client", "adapters -> rollouts"),
        ("config/load.py", "def late():\n    from ..store.disk import Disk", "config -> store"),
    ],
)
def test_a_planted_import_is_seen(tmp_path: Path, file: str, line: str, arrow: str) -> None:
    package = shutil.copytree(PACKAGE, tmp_path / "graftwork", ignore=shutil.ignore_patterns("__pycache__"))
    (package / file).write_text((package / file).read_text() + f"\n{line}\n")
    assert [bad.rpartition(": ")[2] for bad in bad_arrows(package)] == [arrow]


def test_nothing_torch_free_reaches_torch_by_any_import() -> None:
    known = modules(PACKAGE)
    starts = [name for name in known if room(name) in TORCH_FREE_ROOMS] + list(TORCH_FREE_PROGRAMS)
    assert {start: chain for start in starts if (chain := reaches_torch(start, known))} == {}


def test_torch_free_programs_and_the_command_line_load_without_torch() -> None:
    names = [*TORCH_FREE_PROGRAMS, "graftwork.cli"]
    code = f"import sys, {', '.join(names)}; print([name for name in {TORCH!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_one_module_writes() -> None:
    assert writes(PACKAGE) == []


@pytest.mark.parametrize(
    "line",
    [
        "open(path, 'w')",
        "open(path, mode)",
        "path.open('ab')",
        "path.open(mode='r+')",
        "path.write_text('x')",
        "path.unlink()",
        "os.remove(path)",
        "shutil.rmtree(path)",
        "os.replace(a, b)",
        "torch.save(value, path)",
        "figure.savefig(path)",
        "os.open(path, os.O_RDONLY | os.O_CREAT)",
        "os.open(path, flags)",
    ],
)
def test_a_planted_write_is_seen(tmp_path: Path, line: str) -> None:
    (tmp_path / "room.py").write_text(f"def sneak():\n    {line}\n")
    assert [found.partition(" ")[0] for found in writes(tmp_path)] == ["room.py:2:"]


@pytest.mark.parametrize(
    "line",
    ["open(path)", "path.open('rb')", "open(path, mode='r')", "text.replace('a', 'b')", "os.open(path, os.O_RDONLY)"],
)
def test_reading_is_not_writing(tmp_path: Path, line: str) -> None:
    (tmp_path / "room.py").write_text(f"{line}\n")
    assert writes(tmp_path) == []
