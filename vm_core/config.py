"""Configuration files: YAML, one file a run, with single values set on the command line."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from vm_core import plugins, storage
from vm_core.errors import VisualMemoryError
from vm_core.untrusted import parse_yaml

_MAX_BYTES = 4 << 20

C = TypeVar("C", bound=plugins.Settings)


def load(
    model: type[C],
    path: str | None,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
) -> C:
    """Reads a YAML file, sets options, then ``key=value`` overrides, and validates the whole.

    A key with dots goes deeper (``index.kind=exact``), a number picks from a list
    (``sources.0.path=/data``); a value is YAML. Raises VisualMemoryError.
    """
    settings = (_read(path) if path else {}) | copy.deepcopy(dict(options or {}))
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise VisualMemoryError(
                f"--set {override!r} is not KEY=VALUE. Write for example "
                "--set encoder.batch_size=64"
            )
        try:
            parsed = parse_yaml(value)
        except ValueError as error:
            raise VisualMemoryError(f"--set {override!r}: not valid YAML: {error}") from error
        _set(settings, key, parsed)
    return plugins.validate(model, settings, f"configuration {path}" if path else "options")


def _read(path: str) -> dict[str, Any]:
    if not storage.exists(path) or storage.is_directory(path):
        raise VisualMemoryError(f"configuration {path!r} does not exist. Give a YAML file")
    try:
        settings = parse_yaml(storage.read_bytes(path, limit=_MAX_BYTES))
    except ValueError as error:
        raise VisualMemoryError(f"configuration {path!r} is not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise VisualMemoryError(f"configuration {path!r} must hold KEY: VALUE lines")
    return settings


def _set(settings: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    place = settings
    for parent in parents:
        if isinstance(place, list):
            place = place[_position(place, parent, key)]
        else:
            if place.get(parent) is None:  # not there, or left empty in the file
                place[parent] = {}
            place = place[parent]
        if not isinstance(place, dict | list):
            raise VisualMemoryError(
                f"--set {key}: {parent} is a single value, nothing is inside it"
            )
    if isinstance(place, list):
        place[_position(place, last, key)] = value
    else:
        place[last] = value


def _position(items: list[Any], text: str, key: str) -> int:
    if not items:
        raise VisualMemoryError(f"--set {key}: the list is empty. Set it as a whole: LIST=[...]")
    if not text.isdecimal() or int(text) >= len(items):
        raise VisualMemoryError(
            f"--set {key}: {text!r} must be a position from 0 to {len(items) - 1} in a list"
        )
    return int(text)
