"""Backbones of keras-hub: DINOv2, CLIP and others, from a folder or a hub."""

from __future__ import annotations

import contextlib
import hashlib
import os
from typing import Any, Literal

import numpy as np

from vm_core import storage
from vm_core.encoders import Embed, Encoder, digest_files
from vm_core.errors import VisualMemoryError
from vm_core.images import Preprocessing

PREPROCESSING = {
    "dinov2": Preprocessing(
        resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    ),
    "clip": Preprocessing(
        resize=224,
        crop=224,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    ),
}
"""What each family was trained with (arXiv 2304.07193, arXiv 2103.00020)."""


_HUBS = ("kaggle://", "hf://", "modelscope://")


class Plugin(Encoder):
    """A keras-hub preset: a local folder, or a handle such as ``dinov2_small``.

    ``family`` sets how images are preprocessed and which output is the embedding:
    the class token of dinov2, the projected image embedding of clip.
    """

    kind: Literal["keras_hub"] = "keras_hub"
    family: Literal["dinov2", "clip"]

    def effective_preprocessing(self) -> Preprocessing:
        given = "preprocessing" in self.model_fields_set
        return self.preprocessing if given else PREPROCESSING[self.family]

    def model_digest(self) -> str:
        if self._is_folder():
            return digest_files(
                self.path, lambda name: name.endswith((".json", ".h5", ".safetensors"))
            )
        # What a hub has under a name may change, so the weights themselves are digested.
        return _digest_weights(self._backbone("float32"))

    def _is_folder(self) -> bool:
        return not self.path.startswith(_HUBS) and storage.is_directory(self.path)

    def load(self) -> Embed:
        from vm_core.encoders._tensorflow import compile_embed, has_gpu

        dtype = "float32"
        if self.precision == "mixed":
            dtype = "mixed_float16" if has_gpu() else "mixed_bfloat16"
        backbone = self._backbone(dtype)
        return compile_embed(
            lambda images: self._embedding(backbone, images),
            self.effective_preprocessing(),
            keep=backbone,
        )

    def _backbone(self, dtype: str) -> Any:
        """The model, with the weights of the preset."""
        # Keras reads its backend once, when it is first imported.
        os.environ.setdefault("KERAS_BACKEND", "tensorflow")
        try:
            import keras_hub
        except ImportError as error:
            raise VisualMemoryError(
                f"encoder {self.path!r} needs keras-hub, which is not installed. Run: "
                "pip install 'visual-memory[keras]'"
            ) from error
        preprocessing = self.effective_preprocessing()
        shape = (preprocessing.crop, preprocessing.crop, 3)
        options: dict[str, Any] = {"dtype": dtype}
        if self.family == "dinov2":  # it fits its position embeddings to the size of the images
            options["image_shape"] = shape
        try:
            with contextlib.ExitStack() as stack:
                path = self.path
                if self._is_folder():
                    path = stack.enter_context(storage.local_copy(path))
                backbone = keras_hub.models.Backbone.from_preset(path, **options)
        except (ValueError, TypeError, OSError) as error:
            raise VisualMemoryError(
                f"encoder: keras-hub cannot load the preset {self.path!r}: {error}. Give a preset "
                "folder, a preset's name, or a kaggle:// or hf:// handle"
            ) from error
        family = type(backbone).__name__.removesuffix("Backbone")
        if family.lower() != self.family:
            raise VisualMemoryError(
                f"encoder: the preset {self.path!r} is of the family {family}, not {self.family}. "
                "Set family to match it"
            )
        size = backbone.vision_encoder.image_shape[0] if self.family == "clip" else shape[0]
        if size != shape[0]:
            raise VisualMemoryError(
                f"encoder: the preset {self.path!r} takes images of {size} pixels, not {shape[0]}. "
                "Set preprocessing.resize and preprocessing.crop"
            )
        return backbone

    def _embedding(self, backbone: Any, images: Any) -> Any:
        if self.family == "clip":
            return backbone.get_vision_embeddings(images)
        return backbone({"images": images}, training=False)[:, 0]


def _digest_weights(backbone: Any) -> str:
    """SHA-256 over the names, shapes and values of a model's weights."""
    digest = hashlib.sha256()
    for weight in sorted(backbone.weights, key=lambda weight: weight.path):
        values = np.ascontiguousarray(weight.numpy())
        digest.update(f"{weight.path} {values.dtype} {values.shape}\n".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
