"""Configs as plain dataclasses: checks of their values, JSON in and out, and freezing.

Every config is a ``@dataclass(kw_only=True, unsafe_hash=True)`` beside the code that it configures,
derived from `Settings`. Flags may override its fields until it is validated.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from kontext_jax.files import check_local


class Settings:
    """Base class of configs. A frozen one cannot change, for compiled programs are keyed by it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if "_frozen" in vars(self):
            raise AttributeError(
                f"{type(self).__name__}.{name} is frozen; make a copy with dataclasses.replace."
            )
        super().__setattr__(name, value)


def freeze(config):
    """Freezes a config and all configs in it; returns it."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Settings):
                freeze(item)
    vars(config)["_frozen"] = True
    return config


def check_least(config: Any, where: str = "", **least: int) -> None:
    """Refuses settings that are too small.

    Args:
      config: has them as attributes.
      where: prefix of their names in the message, such as "data.".
      least: the smallest valid value of each, by name.

    Raises:
      ValueError: one is below its least; the message names it.
    """
    for name, number in least.items():
        if getattr(config, name) < number:
            raise ValueError(f"{where}{name} {getattr(config, name)} must be {number} or more.")


def check_choices(config: Any, where: str = "", **choices: Iterable[str]) -> None:
    """Refuses settings that are not one of their choices.

    Args:
      config: has them as attributes.
      where: prefix of their names in the message, such as "data.".
      choices: the valid values of each, by name; an empty one is valid but not offered.

    Raises:
      ValueError: one is something else; the message names it and lists its choices.
    """
    for name, allowed in choices.items():
        check_choice(f"{where}{name}", getattr(config, name), allowed)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuses a value that is not one of its choices.

    Raises:
      ValueError: with the name, the value and the choices.
    """
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(filter(None, choices))}.")


def to_dict(config) -> dict[str, Any]:
    """The config as plain JSON values; `from_dict` is the inverse."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: Mapping[str, Any], cls: type):
    """The config of class ``cls`` that `to_dict` turned into ``values``.

    Raises:
      ValueError: a key that ``cls`` does not have, or a value that its checks refuse.
    """
    hints = typing.get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        raise ValueError(f"{cls.__name__} has no setting {', '.join(sorted(unknown))}.")
    return cls(**{name: _value(value, hints[name]) for name, value in values.items()})


def _value(value, hint):
    if isinstance(hint, types.UnionType):  # objectives, distinguished by their kind
        by_kind = {cls.kind: cls for cls in typing.get_args(hint)}
        check_choice("kind", value["kind"], by_kind)
        hint = by_kind[value["kind"]]
    if dataclasses.is_dataclass(hint):
        return from_dict(value, hint)
    if hasattr(hint, "_fields"):  # a named tuple
        return hint(*value)
    if typing.get_origin(hint) is tuple and typing.get_args(hint)[1:] == (...,):
        return tuple(_value(v, typing.get_args(hint)[0]) for v in value)
    return _tuples(value)


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def validated(config):
    """A checked and frozen copy. Overrides on the command line bypass the checks of the original.

    Raises:
      ValueError: a setting is wrong, or is a path that is not local.
    """
    values = to_dict(config)
    _check_local("config", values)
    return freeze(from_dict(values, type(config)))


def _check_local(name: str, value: Any) -> None:
    if isinstance(value, str):
        check_local(name, value)
    elif isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            _check_local(f"{name}.{key}", item)
