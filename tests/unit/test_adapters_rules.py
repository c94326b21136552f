"""Rules that the source of the adapters' room keeps."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

from peft import LoraConfig

import graftwork.adapters
from graftwork.adapters.formats.peft_config import FIELDS


def test_every_field_of_the_installed_peft_has_a_rule() -> None:
    assert {f.name for f in dataclasses.fields(LoraConfig)} <= FIELDS.keys()


def test_no_module_of_the_room_unpickles_evaluates_or_imports_by_name() -> None:
    """Reads the source: pickle, torch.load, eval and their kin do not occur."""
    forbidden = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "importlib", "runpy"}
    calls = {"eval", "exec", "__import__", "compile"}
    for path in Path(graftwork.adapters.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & forbidden, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in calls, f"{path}: {node.func.id}"
            if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
                assert node.value.id not in {"torch", "np", "numpy"}, f"{path}: {node.value.id}.load"
