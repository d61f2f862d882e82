"""What killed runs and abandoned configurations have left in a memory.

A run that is repeated goes on with what it left, or removes it. What belongs to no run any
more stays until somebody asks for it: ``visual-memory doctor --memory MEMORY --clean``.
"""

from __future__ import annotations

import os
import re
import time
from typing import NamedTuple

from vm_core import storage

GRACE_HOURS = 24.0

# Folders of a memory whose content is worth nothing unless a version or a run needs it.
_FOLDERS = ("work", "builds", "weights")

_FINGERPRINT = re.compile("(index-|scores-)?[0-9a-f]{12,16}")


class Leftover(NamedTuple):
    """A file or folder that nothing needs. hours: since it was last written."""

    path: str
    bytes: int
    hours: float


def find(root: str, grace_hours: float = GRACE_HOURS) -> list[Leftover]:
    """Leftovers of a memory on a disk that were not written to for some hours, by path.

    They are temporary files, work of unfinished runs, and builds and weights that no version
    names. What a running command holds locked is left out. Of a store without times of
    folders nothing is found.
    """
    root = storage.absolute(root)
    if not storage.is_local(root):
        return []
    versions = storage.join(root, "versions")
    manifests = storage.walk(versions) if storage.is_directory(versions) else []
    named = b"".join(storage.read_bytes(file.path) for file in manifests)
    found = []
    for kind in _FOLDERS:
        folder = os.path.join(root, kind)
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            path, lock = os.path.join(folder, name), os.path.join(root, "work", f"{name}.lock")
            # Folders of the user's own have other names: they are not ours to remove.
            if not _FINGERPRINT.fullmatch(name) or os.path.islink(path) or not os.path.isdir(path):
                continue
            if f'"{kind}/{name}/'.encode() not in named and not storage.is_locked(lock):
                found.append(_measured(path))
    inside = tuple(f"{left.path}/" for left in found)
    for file in storage.leftovers(root):
        if not file.path.startswith(inside):
            found.append(Leftover(file.path, file.size, _hours(float(file.version))))
    return sorted(left for left in found if left.hours >= grace_hours)


def remove(leftovers: list[Leftover]) -> None:
    """Removes what ``find`` returned."""
    for left in leftovers:
        if os.path.isdir(left.path):
            storage.remove_directory(left.path)
        else:
            storage.remove_file(left.path)


def _measured(path: str) -> Leftover:
    files = storage.walk(path)
    changed = max([os.stat(path).st_mtime, *(int(file.version or 0) / 1e9 for file in files)])
    return Leftover(path, sum(file.size for file in files), _hours(changed))


def _hours(changed: float) -> float:
    return max(0.0, time.time() - changed) / 3600
