"""The demo's labelled images, unpacked into one folder per class."""

from __future__ import annotations

import csv
import io
import os
import zipfile

from demo.wheels import Wheel, read_member
from vm_core.errors import VisualMemoryError

FLOWERS = Wheel(
    "clustimage", "1.3.0", "0b236d65187f713c9facb3327ca360308c2b2f00f2ec17cf669ac1982b12cb82"
)
FLOWER_COUNT = 210
# The position of a species is its label in the archive.
SPECIES = (
    "phlox",
    "rose",
    "calendula",
    "iris",
    "leucanthemum",
    "bellflower",
    "viola",
    "rudbeckia",
    "peony",
    "aquilegia",
)

TEXTILES = Wheel(
    "conformal-clip-data",
    "0.1.4",
    "00144ccc179a887dbea15923be8cf236d0c0f49bf7fb6f7bb288e40b53fb1bcb",
)
# Class: the folder in the archive and its number of images.
TEXTILE_CLASSES = {
    "nominal": ("nominal", 1000),
    "local-defect": ("local", 500),
    "global-defect": ("global", 500),
}

SOURCES = f"""\
flowers/   {FLOWER_COUNT} photos of {len(SPECIES)} flower species, 128 px PNG
           from the Python package {FLOWERS.requirement}, MIT licence
textiles/  2,000 textile images without and with defects, 250 px JPEG
           from the Python package {TEXTILES.requirement}, MIT licence
"""

_MAX_IMAGE_BYTES = 1 << 20
_MAX_ARCHIVE_BYTES = 32 << 20


def unpack_flowers(wheel: str, folder: str) -> None:
    """Writes ``folder/<species>/0001.png`` to ``0210.png`` (128 px, RGBA).

    Here and below the archive is untrusted: only members whose names are known
    beforehand are read, and no path on disk is made from a name in the archive.

    Raises:
      VisualMemoryError: a photo or its label is missing, or a member is too large.
    """
    with zipfile.ZipFile(wheel) as outer:
        photos = read_member(outer, "clustimage/data/flower_images.zip", _MAX_ARCHIVE_BYTES)
    with zipfile.ZipFile(io.BytesIO(photos)) as archive:
        table = read_member(archive, "flower_images/flower_labels.csv", _MAX_IMAGE_BYTES)
        labels = {row["file"]: row["label"] for row in csv.DictReader(io.StringIO(table.decode()))}
        for number in range(1, FLOWER_COUNT + 1):
            name = f"{number:04d}.png"
            species = _species(name, labels.get(name))
            data = read_member(archive, f"flower_images/{name}", _MAX_IMAGE_BYTES)
            _write(os.path.join(folder, species, name), data)


def _species(name: str, label: str | None) -> str:
    species = dict(zip(map(str, range(len(SPECIES))), SPECIES, strict=True))
    if label not in species:
        raise VisualMemoryError(
            f"flower photo {name} has label {label!r}, not 0 to {len(SPECIES) - 1}. "
            f"The package is not {FLOWERS.requirement}; restore the pinned one"
        )
    return species[label]


def unpack_textiles(wheel: str, folder: str) -> None:
    """Writes ``folder/{nominal,local-defect,global-defect}/0001.jpg`` and on (250 px, RGB).

    Raises:
      VisualMemoryError: an image is missing or too large.
    """
    root = "conformal_clip_data/data/textile_images/simulated"
    with zipfile.ZipFile(wheel) as archive:
        for name, (origin, count) in TEXTILE_CLASSES.items():
            for number in range(1, count + 1):
                member = f"{root}/{origin}/textile_{number:04d}.jpg"
                data = read_member(archive, member, _MAX_IMAGE_BYTES)
                _write(os.path.join(folder, name, f"{number:04d}.jpg"), data)


def _write(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)
