"""Configurations as JSON, and how two of them differ.

What identifies a stage or a checkpoint is stored as JSON; a later run compares it field by field.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np


def to_json(value: Any, where: str = "config", *, identity: bool = False) -> Any:
    """`value` as JSON holds it: dataclasses as dicts, tuples as lists, paths as strings.

    With `identity`, fields of dataclasses whose metadata say `"identity": False` are left out: they
    decide how a result is made, not what it is.

    Raises:
        TypeError: a value has no JSON form; the message names its dotted field.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = [f for f in dataclasses.fields(value) if not identity or is_identity(f)]
        value = {f.name: getattr(value, f.name) for f in kept}
    if isinstance(value, Mapping):
        return {
            str(key): to_json(item, f"{where}.{key}", identity=identity)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{where}[{i}]", identity=identity) for i, item in enumerate(value)]
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return to_json(np.asarray(value).tolist(), where)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{where}: {type(value).__name__} has no JSON form")


def is_identity(field: dataclasses.Field) -> bool:
    """Whether a field of a config decides a result."""
    return field.metadata.get("identity", True)


def with_defaults(old: Any, like: Any) -> Any:
    """JSON of an older run, with the defaults of fields that today's dataclass `like` has more.

    So a release may add a field with a default without orphaning finished stages.
    """
    if dataclasses.is_dataclass(like) and not isinstance(like, type) and isinstance(old, dict):
        filled = dict(old)
        for field in dataclasses.fields(like):
            if not is_identity(field):
                filled.pop(field.name, None)
            elif field.name in old:
                filled[field.name] = with_defaults(old[field.name], getattr(like, field.name))
            elif field.default is not dataclasses.MISSING:
                filled[field.name] = to_json(field.default, identity=True)
            elif field.default_factory is not dataclasses.MISSING:
                filled[field.name] = to_json(field.default_factory(), identity=True)
        return filled
    if isinstance(like, Mapping) and isinstance(old, dict):
        return {key: with_defaults(x, like.get(key)) for key, x in old.items()}
    if isinstance(like, (list, tuple)) and isinstance(old, list) and len(like) == len(old):
        return [with_defaults(x, y) for x, y in zip(old, like, strict=True)]
    return old


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """The dotted fields in which two JSON values differ, each as "field: old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in [*old, *(key for key in new if key not in old)]:
            path = f"{where}.{key}" if where else key
            if key not in new:
                lines.append(f"{path}: {json.dumps(old[key])} -> (absent)")
            elif key not in old:
                lines.append(f"{path}: (absent) -> {json.dumps(new[key])}")
            else:
                lines += differences(old[key], new[key], path)
        return lines
    return [] if old == new else [f"{where}: {json.dumps(old)} -> {json.dumps(new)}"]
