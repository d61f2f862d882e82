"""EfficientNet-lite0 in TensorFlow, rebuilt from a PyTorch checkpoint without PyTorch.

``python -m demo.efficientnet_lite CHECKPOINT DIRECTORY`` writes a SavedModel; two runs write
the same bytes. Run it as its own process: TensorFlow numbers the functions that a process
makes, and the numbers are in the names inside the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from demo.checkpoint import read_tensors

# Inverted residual blocks, a row for each stage: how many, and the stride of the first; the
# others have a shortcut instead. Kernel sizes and widths come with the weights.
STAGES = (
    (1, 1),  # 3x3, 16 channels, without expansion; below, a block widens its input sixfold
    (2, 2),  # 3x3, 24
    (2, 2),  # 5x5, 40
    (3, 2),  # 3x3, 80
    (3, 1),  # 5x5, 112
    (4, 2),  # 5x5, 192
    (1, 1),  # 3x3, 320
)
_BATCH_NORM_EPSILON = 1e-3

Weights = dict[str, np.ndarray]


def read_checkpoint(path: str) -> Weights:
    """Reads all but the classifier: float32 arrays by PyTorch's names.

    Kernels come as (H, W, in, out) or (H, W, channels) with axes of length 1 left out, so
    that the output channel is always the last axis.
    """
    order = {1: (0,), 2: (1, 0), 3: (1, 2, 0), 4: (2, 3, 1, 0)}
    weights = {}
    for name, tensor in read_tensors(path).items():
        if not name.startswith("_fc.") and not name.endswith(".num_batches_tracked"):
            array = tensor.squeeze()
            weights[name] = array.transpose(order[array.ndim])
    return weights


def fold_batch_norm(weights: Weights, conv: str, norm: str) -> tuple[np.ndarray, np.ndarray]:
    """The kernel and the bias (out,) of a convolution that includes its batch norm, float32."""
    scale = weights[f"{norm}.weight"] / np.sqrt(
        weights[f"{norm}.running_var"].astype(np.float64) + _BATCH_NORM_EPSILON
    )
    kernel = weights[f"{conv}.weight"] * scale
    bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    return kernel.astype(np.float32), bias.astype(np.float32)


def network(weights: Weights) -> Callable[[Any], Any]:
    """The encoder as a function of a tensor of images.

    It takes float32 RGB (N, H, W, 3) in [0, 1], made for H = W = 224, and gives the global
    average after the head convolution, float32 (N, 1280), not normalised.
    """

    def convolve(x: Any, conv: str, norm: str, stride: int = 1) -> Any:
        # Weights are constants of the graph: TensorFlow then fuses convolution, bias and
        # activation, and there is no variables file to keep in step.
        kernel, bias = fold_batch_norm(weights, conv, norm)
        if kernel.ndim == 2:  # 1x1
            kernel = kernel[None, None]
        if kernel.ndim == 3:
            strides = [1, stride, stride, 1]
            x = tf.nn.depthwise_conv2d(x, kernel[..., None], strides, "SAME")
        else:
            x = tf.nn.conv2d(x, kernel, stride, "SAME")
        return tf.nn.bias_add(x, bias)

    def block(x: Any, name: str, stride: int) -> Any:
        if f"{name}._expand_conv.weight" in weights:
            x = tf.nn.relu6(convolve(x, f"{name}._expand_conv", f"{name}._bn0"))
        x = tf.nn.relu6(convolve(x, f"{name}._depthwise_conv", f"{name}._bn1", stride))
        return convolve(x, f"{name}._project_conv", f"{name}._bn2")

    def encode(images: Any) -> Any:
        x = (images * 255 - 127) / 128
        x = tf.nn.relu6(convolve(x, "_conv_stem", "_bn0", stride=2))
        number = 0
        for blocks, stride in STAGES:
            x = block(x, f"_blocks.{number}", stride)
            for later in range(number + 1, number + blocks):
                x = x + block(x, f"_blocks.{later}", stride=1)
            number += blocks
        x = tf.nn.relu6(convolve(x, "_conv_head", "_bn1"))
        return tf.reduce_mean(x, axis=[1, 2])

    return encode


def convert(checkpoint: str, directory: str) -> None:
    """Writes the checkpoint's encoder as a SavedModel; loaded, it is called on images."""
    module = tf.Module()
    images = tf.TensorSpec([None, None, None, 3], tf.float32, name="images")
    encode = network(read_checkpoint(checkpoint))
    module.__call__ = tf.function(encode, input_signature=[images])
    tf.saved_model.save(module, directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", help="the .pth file")
    parser.add_argument("directory", help="where the SavedModel goes")
    arguments = parser.parse_args()
    convert(arguments.checkpoint, arguments.directory)


if __name__ == "__main__":
    main()
