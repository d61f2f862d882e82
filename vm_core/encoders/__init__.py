"""Frozen image encoders, one module a kind: saved_model, keras_hub.

An encoder is configured first (cheap, anywhere) and loaded later (where it runs, once
per process). Its fingerprint says which function from pixels to embeddings it is:
model, preprocessing and precision. Embeddings of different fingerprints never meet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from pydantic import Field

from vm_core import plugins, storage
from vm_core.images import Preprocessing

Embed = Callable[[np.ndarray], np.ndarray]
"""(B, crop, crop, 3) uint8 pixels to (B, D) float32 embeddings, of any length.

Raises MemoryError when the batch does not fit on the device.
"""


class Encoder(plugins.Settings):
    """Base of the encoders: what they have in common.

    ``batch_size`` is the number of images per model call. Fewer are padded to it: some
    models' embeddings differ in their last bits with the shape of the batch.
    ``precision`` ``mixed`` computes in 16 bits where the hardware gains from it.
    """

    kind: str
    path: str
    preprocessing: Preprocessing = Preprocessing()
    precision: Literal["float32", "mixed"] = "float32"
    batch_size: int = Field(32, ge=1, le=65536)

    def fingerprint(self) -> str:
        """16 hexadecimal digits; equal fingerprints give comparable embeddings."""
        preprocessing = self.effective_preprocessing().model_dump_json()
        text = f"{self.kind}\n{self.model_digest()}\n{preprocessing}\n{self.precision}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def effective_preprocessing(self) -> Preprocessing:
        """The preprocessing in force, where an encoder brings its own."""
        return self.preprocessing

    def model_digest(self) -> str:
        """Identifies the weights and the architecture. Raises VisualMemoryError."""
        raise NotImplementedError

    def load(self) -> Embed:
        """Loads the model. Slow: once per process."""
        raise NotImplementedError


def parse(settings: Any) -> Encoder:
    """The encoder that settings describe. Raises VisualMemoryError."""
    return plugins.configure(__name__, settings, Encoder)


def digest_files(folder: str, wanted: Callable[[str], bool]) -> str:
    """SHA-256 over names and contents of a folder's files."""
    root = storage.absolute(folder).rstrip("/")
    digest = hashlib.sha256()
    for file in storage.walk(root):
        name = file.path[len(root) + 1 :]
        if wanted(name):
            digest.update(f"{name} {storage.sha256_file(file.path)}\n".encode())
    return digest.hexdigest()
