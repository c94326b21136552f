"""Rules that the source of the adapters' room keeps."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

from peft import LoraConfig

import graftwork
import graftwork.adapters
from graftwork.adapters.formats.peft_config import FIELDS


def test_every_field_of_the_installed_peft_has_a_rule() -> None:
    assert {f.name for f in dataclasses.fields(LoraConfig)} <= FIELDS.keys()


OFFLINE = "rank_files.py"
"""Reads checkpoints of older trainers, for the converter alone, with weights_only=True."""


def test_no_module_of_the_room_unpickles_evaluates_or_imports_by_name() -> None:
    """Reads the source: pickle, torch.load, eval and their kin do not occur."""
    forbidden = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "importlib", "runpy"}
    calls = {"eval", "exec", "__import__", "compile"}
    for path in Path(graftwork.adapters.__path__[0]).rglob("*.py"):
        if path.name == OFFLINE:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & forbidden, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in calls, f"{path}: {node.func.id}"
            if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
                assert node.value.id not in {"torch", "np", "numpy"}, f"{path}: {node.value.id}.load"


def test_older_checkpoints_are_opened_for_tensors_alone_and_not_by_the_trainer() -> None:
    package = Path(graftwork.__path__[0])
    source = next(package.rglob(OFFLINE)).read_text()
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    loads = [node for node in calls if ast.unparse(node.func).startswith(("torch.load", "pickle."))]
    assert [ast.unparse(node.func) for node in loads] == ["torch.load"]
    assert {k.arg: ast.unparse(k.value) for k in loads[0].keywords}["weights_only"] == "True"
    sources = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    users = {name for name, text in sources.items() if "rank_files import" in text}
    assert users == {"adapters/convert.py", "adapters/opening.py", "programs/adapter.py"}
    rooms = ("training/", "inference/", "lora/", "model/", "programs/trainer")
    offline = ("adapters.convert", "adapters.opening")
    assert not [n for n, text in sources.items() if n.startswith(rooms) and any(name in text for name in offline)]
