"""What the TensorFlow encoders share: pixels in, one compiled function, device errors out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from vm_core.encoders import Embed
from vm_core.errors import VisualMemoryError
from vm_core.images import Preprocessing


def compile_embed(model: Callable[[Any], Any], preprocessing: Preprocessing, keep: Any) -> Embed:
    """One graph from uint8 pixels to float32 embeddings. ``keep`` owns the variables.

    Raises VisualMemoryError if the model does not turn images into a vector each.
    """
    mean = tf.constant(preprocessing.mean, tf.float32)
    scale = 1.0 / (255.0 * tf.constant(preprocessing.std, tf.float32))
    shape = (None, preprocessing.crop, preprocessing.crop, 3)

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.uint8)], autograph=False)
    def graph(pixels: Any) -> Any:
        images = (tf.cast(pixels, tf.float32) - 255.0 * mean) * scale
        embeddings = tf.cast(model(images), tf.float32)
        if embeddings.shape.rank not in (2, None):
            raise VisualMemoryError(
                f"encoder: the model's output has the shape {embeddings.shape}, where embeddings "
                "have (images, dimensions). Choose another output, or pool it in the model"
            )
        return embeddings

    graph.owner = keep
    graph.get_concrete_function()  # a model that does not fit fails here, before any image

    def embed(pixels: np.ndarray) -> np.ndarray:
        try:
            return graph(pixels).numpy()
        except tf.errors.ResourceExhaustedError as error:
            raise MemoryError(str(error).splitlines()[0]) from error

    return embed


def has_gpu() -> bool:
    return bool(tf.config.list_physical_devices("GPU"))


def use_mixed_precision() -> None:
    """Lets TensorFlow's graph optimiser run what it can in 16 bits, for this process."""
    option = "auto_mixed_precision" if has_gpu() else "auto_mixed_precision_onednn_bfloat16"
    tf.config.optimizer.set_experimental_options({option: True})
