"""Reading a diffusers config.json strictly: what a network cannot honour must not pass silently.

A field that changes the computation and that the network does not implement has one allowed value
(`only`); fields that never change it are named (`ignored`); any other unknown field is an error.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any


def known_fields(
    cls: type,
    config: Mapping[str, Any],
    *,
    only: Mapping[str, Collection[Any]] | None = None,
    ignored: Collection[str] = (),
) -> dict[str, Any]:
    """The entries of `config` that are fields of the dataclass `cls`, lists turned into tuples.

    Keys that start with "_" (diffusers' own notes) and those in `ignored` are dropped. Raises
    ValueError naming the class, the field and what was expected for an unknown field, or for a
    value of a field in `only` that is not among those allowed.
    """
    names = {field.name for field in dataclasses.fields(cls)}
    known: dict[str, Any] = {}
    for key, value in config.items():
        if key.startswith("_") or key in ignored:
            continue
        value = _frozen(value)
        if only and key in only:
            if value not in only[key]:
                allowed = " or ".join(repr(option) for option in only[key])
                raise ValueError(f"{cls.__name__}.{key}: expected {allowed}, got {value!r}")
        elif key in names:
            known[key] = value
        else:
            raise ValueError(
                f"{cls.__name__}: unknown field {key!r} (value {value!r}); "
                f"expected some of {sorted(names)}"
            )
    return known


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def check_blocks(owner: str, block_types: Mapping[str, tuple[str, ...]], levels: int) -> None:
    """One block type per level in each list of `block_types` (field to types), else ValueError."""
    for field, types in block_types.items():
        if len(types) != levels:
            raise ValueError(
                f"{owner}.{field}: expected {levels} entries as in block_out_channels, "
                f"got {len(types)}: {list(types)}"
            )


def check_groups(owner: str, groups: int, channels: tuple[int, ...]) -> None:
    """Every channel count must be a multiple of the number of groups, else ValueError."""
    for count in channels:
        if count % groups:
            raise ValueError(
                f"{owner}.norm_num_groups: {groups} does not divide {count} of "
                f"block_out_channels {list(channels)}"
            )
