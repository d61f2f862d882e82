"""What a run has to read, in files for its workers to fetch.

A pipeline that carries the splits of a million images has 5 to 50 MB, by their names, and
Dataflow takes 10. So only the names of these files travel with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from vm_core import sealed, storage
from vm_core.errors import DamagedError
from vm_core.sources import Split, in_groups

SPLITS_PER_FILE = 256


def write(folder: str, splits: Iterable[tuple[int, Split]]) -> list[str]:
    """Writes splits, each with the number of its source; returns the files' paths in order."""
    paths = []
    for number, group in enumerate(in_groups(splits, SPLITS_PER_FILE)):
        path = storage.join(folder, f"splits-{number:05d}.json")
        sealed.write(path, json.dumps(group, default=_from_bytes).encode())
        paths.append(path)
    return paths


def read(path: str) -> list[tuple[int, Split]]:
    """The splits of one file, equal to those that were written. Raises DamagedError."""
    data = sealed.read(path)
    if data is None:
        raise DamagedError(f"{path} is missing or damaged. Start the same command again")
    found = json.loads(data, object_hook=_to_bytes)
    return [
        (source, Split(_as_tuples(items), version, images))
        for source, (items, version, images) in found
    ]


# JSON has no bytes, and Latin-1 has a character for each.


def _from_bytes(value: bytes) -> dict[str, str]:
    return {"bytes": value.decode("latin-1")}


def _to_bytes(value: dict[str, str]) -> bytes:
    return value["bytes"].encode("latin-1")


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
