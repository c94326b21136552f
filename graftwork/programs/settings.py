"""`graftwork config SECTION`: the settings of a file, as the schema declares them."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

import tomli_w
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from graftwork.config.run import RunConfig, SubmitConfig
from graftwork.config.schema import InferenceConfig, RlConfig, ServeConfig, SftConfig, TrainerConfig
from graftwork.errors import ConfigError

SECTIONS: dict[str, type[BaseModel]] = {
    "sft": SftConfig,
    "rl": RlConfig,
    "serve": ServeConfig,
    "submit": SubmitConfig,
    "trainer": TrainerConfig,
    "inference": InferenceConfig,
    "run": RunConfig,
}
PLAIN_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false"}
BOUNDS: list[tuple[Any, str, str]] = [(Gt, "gt", ">"), (Ge, "ge", ">="), (Lt, "lt", "<"), (Le, "le", "<=")]


def describe_section(name: str) -> list[str]:
    """Two lines a setting: `key  type, default` and its meaning. Raises ConfigError when there is no such section."""
    if name not in SECTIONS:
        raise ConfigError(f"no section {name!r}: there are {', '.join(SECTIONS)}")
    return list(_describe(SECTIONS[name], "", None))


def _describe(section: type[BaseModel], prefix: str, defaults: BaseModel | None) -> Iterator[str]:
    """`defaults` is the value of the whole table where the table above gives one: it wins over the field's own."""
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        default = getattr(defaults, name) if defaults is not None else field.default
        if inner is not None:
            table = default if isinstance(default, BaseModel) else None
            if table is None and not field.is_required():
                yield f"{prefix}{name}  table, default {default}"
            yield from _describe(inner, f"{prefix}{name}.", table)
            continue
        if defaults is None and field.is_required():
            value = "must be given"
        else:
            value = f"default {_show(field.default_factory() if _has_factory(field, defaults) else default)}"  # type: ignore[call-arg, misc]
        yield f"{prefix}{name}  {_type_name(field.annotation, field.metadata)}, {value}"
        yield f"    {' '.join((field.description or '').split())}"


def _has_factory(field: FieldInfo, defaults: BaseModel | None) -> bool:
    return defaults is None and field.default_factory is not None


def _section_in(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for option in options:
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _type_name(annotation: Any, metadata: list[Any]) -> str:
    """A type in words, with its bounds: `integer > 0`, `text or unset`, `"linear" | "cosine"`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0], list(arguments[1:]))
    if origin in (types.UnionType, typing.Union):
        named = [_type_name(option, []) for option in arguments if option is not type(None)]
        return " or ".join([*named, *(["unset"] if type(None) in arguments else [])])
    if origin is typing.Literal:
        return " | ".join(f'"{value}"' for value in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0], [])}"
    if origin is dict:
        return "table"
    bounds = [bound for item in metadata for bound in _bounds(item)]
    return " ".join([PLAIN_NAMES.get(annotation, str(annotation)), *([", ".join(bounds)] if bounds else [])])


def _bounds(item: Any) -> list[str]:
    if isinstance(item, FieldInfo):
        return [bound for part in item.metadata for bound in _bounds(part)]
    return [f"{sign} {getattr(item, attribute)}" for kind, attribute, sign in BOUNDS if isinstance(item, kind)]


def _show(value: Any) -> str:
    """A default as TOML writes it."""
    if value is None:
        return "unset"
    if value == {}:
        return "{}"
    plain = list(value) if isinstance(value, tuple) else value
    return " ".join(tomli_w.dumps({"v": plain}).removeprefix("v = ").split())
