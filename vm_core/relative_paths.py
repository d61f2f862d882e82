"""Paths that come from data: manifests, markers, pointers. They stay below their root.

A memory may come from a stranger. Each path in it is checked where it is parsed (use
``RelativePath`` for fields) and where it is opened (``storage.inside``, which also looks at
symbolic links).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field


def check_relative(path: str) -> str:
    """Returns a path of plain names joined by ``/``.

    Raises ValueError for a path that is empty, absolute or a URL, has ``.``, ``..`` or empty
    components, or holds backslashes or characters that cannot be printed.
    """
    parts = path.split("/")
    if "\\" in path or "://" in path or not path.isprintable() or path.startswith("~"):
        raise ValueError(f"the path {path!r} is not a plain relative path")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"the path {path!r} is not below the memory")
    return path


def check_name(name: str) -> str:
    """As ``check_relative``, for the name of a single file or folder."""
    if "/" in check_relative(name):
        raise ValueError(f"{name!r} is not a single name")
    return name


RelativePath = Annotated[str, AfterValidator(check_relative)]
"""A field that holds a path below the memory."""

RelativeName = Annotated[str, AfterValidator(check_name)]
"""A field that holds the name of one file or folder."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A field that holds a SHA-256 in hexadecimal digits."""

Files = dict[RelativePath, Sha256]
"""A field that holds files below the memory with the SHA-256 of each."""
