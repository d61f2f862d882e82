"""Which encoders this user runs. A SavedModel is a program, and a memory names one.

An encoder is trusted once the user has named it: in a build, with ``--encoder PATH``, or
with ``inspect MEMORY --trust-encoder``. Fingerprints of trusted encoders are in a file of
the user, one a line.
"""

from __future__ import annotations

import logging
import os

from vm_core import storage
from vm_core.errors import VisualMemoryError

VARIABLE = "VISUAL_MEMORY_TRUSTED_ENCODERS"

_log = logging.getLogger(__name__)


def file() -> str:
    """The path of the file, which the environment may name."""
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.environ.get(VARIABLE) or os.path.join(home, "visual-memory", "trusted-encoders")


def is_trusted(fingerprint: str) -> bool:
    return fingerprint in _trusted()


def trust(fingerprint: str) -> None:
    """Adds a fingerprint to the file. Only warns where that cannot be written."""
    if is_trusted(fingerprint):
        return
    try:
        # Two at a time may lose one of them, which is then asked for again.
        storage.write_bytes(file(), "".join(f"{e}\n" for e in [*_trusted(), fingerprint]).encode())
    except OSError as error:
        _log.warning(
            "the encoder %s is not noted as trusted: %s. Commands that use the memory elsewhere "
            "need --encoder PATH",
            fingerprint,
            error,
        )


def check(fingerprint: str, path: str, memory: str) -> None:
    """Raises VisualMemoryError for an encoder that only the memory names."""
    if not is_trusted(fingerprint):
        raise VisualMemoryError(
            f"the memory {memory!r} names the encoder {path!r} (fingerprint {fingerprint}), which "
            "you have not used before. An encoder is a program: run it only if you trust where it "
            "comes from. Name it with --encoder PATH, or trust it for good with visual-memory "
            f"inspect {memory} --trust-encoder"
        )


def _trusted() -> list[str]:
    try:
        return (storage.read_if_exists(file()) or b"").decode(errors="replace").split()
    except OSError:
        return []
