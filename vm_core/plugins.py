"""Readers, encoders and indexes are found by name: the module's name is the plug-in's name.

A new one is one new module in its package with a class ``Plugin``: a frozen pydantic
model whose fields are its configuration.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from vm_core.errors import VisualMemoryError


class Settings(BaseModel):
    """Base of everything that is configured: unchangeable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


S = TypeVar("S", bound=Settings)


def configure(package: str, settings: Any, base: type[S]) -> S:
    """Makes the plug-in that ``settings['kind']`` names, from the other settings.

    Raises VisualMemoryError for an unknown kind (the known ones are listed) and for
    settings that the plug-in does not take.
    """
    if isinstance(settings, base):
        return settings
    what = package.rpartition(".")[2]
    if not isinstance(settings, Mapping) or "kind" not in settings:
        raise VisualMemoryError(
            f"{what}: {settings!r} has no kind. Write kind: {' | '.join(known(package))}"
        )
    kind = settings["kind"]
    if kind not in known(package):
        raise VisualMemoryError(
            f"{what}: kind {kind!r} is unknown. Known: {', '.join(known(package))}"
        )
    plugin = importlib.import_module(f"{package}.{kind}").Plugin
    return validate(plugin, settings, f"{what} ({kind})")


def known(package: str) -> list[str]:
    """Names of a package's plug-ins: its public modules."""
    modules = pkgutil.iter_modules(importlib.import_module(package).__path__)
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def validate(model: type[S], settings: Any, what: str) -> S:
    """Validates settings against a model; the error names the key, the value and the rule."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        raise VisualMemoryError(f"{what}: {_explain(error, model)}") from None


def _explain(error: ValidationError, model: type[Settings]) -> str:
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known_keys = ", ".join(_keys_inside(model, problem["loc"][:-1]))
            lines.append(f"unknown key {key!r}. Known keys: {known_keys}")
        elif problem["type"] == "missing":
            lines.append(f"{key} is missing")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            value = f" = {problem['input']!r}" if key else ""
            lines.append(f"{key}{value}: {message}" if key else message)
    return "; ".join(lines)


def _keys_inside(model: type[BaseModel], place: Sequence[int | str]) -> Iterable[str]:
    for part in place:
        if isinstance(part, str):
            annotation = model.model_fields[part].annotation
            model = next(
                kind
                for kind in (annotation, *get_args(annotation))
                if isinstance(kind, type) and issubclass(kind, BaseModel)
            )
    return model.model_fields
