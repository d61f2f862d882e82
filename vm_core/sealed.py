"""Small files that carry their own digest, so that damage is noticed.

Sealed files are checkpoints and markers of finished work: the first line is the SHA-256 of
the rest. One that is cut, changed or empty counts as absent, so its work is done again.

Signed JSON is for files that people read as well, such as manifests: an object whose key
``sha256`` has the digest of all others.
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

from vm_core import storage
from vm_core.errors import DamagedError
from vm_core.untrusted import parse_json

_log = logging.getLogger(__name__)


def seal(data: bytes) -> bytes:
    """The data with its digest in front."""
    return hashlib.sha256(data).hexdigest().encode() + b"\n" + data


def unseal(sealed: bytes) -> bytes | None:
    """What was sealed, None if it is not as it was."""
    digest, newline, data = sealed[:64], sealed[64:65], sealed[65:]
    whole = newline == b"\n" and hashlib.sha256(data).hexdigest().encode() == digest
    return data if whole else None


def write(path: str, data: bytes) -> None:
    """Writes a sealed file, atomically."""
    storage.write_bytes(path, seal(data))


def write_json(path: str, value: Any) -> None:
    write(path, json.dumps(value).encode())


def read(path: str) -> bytes | None:
    """What was written, None if there is no such file or it is damaged."""
    sealed = storage.read_if_exists(path)
    if sealed is None:
        return None
    data = unseal(sealed)
    if data is None:
        _log.warning("%s is damaged and counts as absent", path)
    return data


def read_json(path: str) -> Any:
    """As ``read``, for what ``write_json`` wrote."""
    data = read(path)
    return None if data is None else json.loads(data)


def require_json(path: str) -> Any:
    """What ``write_json`` wrote. Raises DamagedError where ``read_json`` returns None."""
    data = read(path)
    if data is None:
        raise DamagedError(
            f"{path} is missing or damaged. Start the same command again: it is made anew"
        )
    return json.loads(data)


def sign(value: dict[str, Any]) -> bytes:
    """A JSON object with its digest, indented."""
    return json.dumps(value | {"sha256": _digest(value)}, indent=1).encode()


def verify(data: bytes) -> dict[str, Any]:
    """What was signed. Raises ValueError, with the cause, if it is not as it was."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    if value.pop("sha256", None) != _digest(value):
        raise ValueError("its content does not agree with its key sha256")
    return value


def _digest(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
