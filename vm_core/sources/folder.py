"""A folder with one folder per class, as ImageNet is laid out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import Literal

from vm_core import storage
from vm_core.classes import ClassTable, read_class_list
from vm_core.errors import VisualMemoryError
from vm_core.records import ImageRecord, Rejected
from vm_core.sources import IMAGES_PER_SPLIT, Listing, Source, Split, in_groups

# Written by operating systems into folders that people look at.
_CLUTTER = {"Thumbs.db", "desktop.ini"}


class Plugin(Source):
    """Reads PATH/CLASS/.../file; the id is NAME/CLASS/.../file.

    Every file counts, whatever its extension, and one that is no image goes to
    quarantine; ``extensions`` (such as [.jpg, .png]) reads only those. Hidden files
    are not read. ``class_list`` is a text file with names to show: ``KEY NAME`` lines.
    """

    kind: Literal["folder"] = "folder"
    extensions: tuple[str, ...] = ()
    class_list: str | None = None

    def listing(self) -> Listing:
        root = self._root()
        if not storage.is_directory(root):
            raise VisualMemoryError(
                f"folder source: {self.path!r} is not a folder. Give a folder that holds one "
                "folder per class"
            )
        files = [(file.path[len(root) + 1 :], file) for file in storage.walk(root)]
        files = [(path, file) for path, file in files if "/" in path and self._wanted(path)]
        if not files:
            raise VisualMemoryError(
                f"folder source: {self.path!r} holds no images in class folders. Expected "
                f"{self.path}/CLASS/IMAGE"
            )
        return Listing(
            splits=[_split(group) for group in in_groups(files, IMAGES_PER_SPLIT)],
            class_keys=sorted({_shown(path).split("/", 1)[0] for path, _ in files}),
            class_names=read_class_list(self.class_list) if self.class_list else {},
        )

    def read(self, split: Split, classes: ClassTable) -> Iterator[ImageRecord | Rejected]:
        root = self._root()
        name = self.effective_name
        for path in map(os.fsdecode, split.items):
            label = classes.label(_shown(path).split("/", 1)[0])
            yield ImageRecord(f"{name}/{_shown(path)}", label, name, storage.join(root, path))

    def _root(self) -> str:
        return storage.absolute(self.path).rstrip("/")

    def _wanted(self, path: str) -> bool:
        parts = path.split("/")
        if any(part.startswith(".") for part in parts) or parts[-1] in _CLUTTER:
            return False
        return not self.extensions or path.lower().endswith(
            tuple(extension.lower() for extension in self.extensions)
        )


def _split(group: list[tuple[str, storage.FileInfo]]) -> Split:
    versions = "\n".join(f"{path} {file.size} {file.version}" for path, file in group)
    digest = hashlib.sha256(os.fsencode(versions)).hexdigest()
    # As bytes: a name on disk need not be valid Unicode, and what travels must be.
    return Split(tuple(os.fsencode(path) for path, _ in group), digest, len(group))


def _shown(path: str) -> str:
    return os.fsencode(path).decode(errors="backslashreplace")
