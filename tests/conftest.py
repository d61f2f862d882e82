"""What tests share: real photos, a real encoder, and a tiny one for fast pipelines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

import demo.fetch
from demo.emulator import create_bucket, emulator

# Property tests try the same examples in every run: a failure can be seen again.
hypothesis.settings.register_profile("seeded", derandomize=True)
hypothesis.settings.load_profile("seeded")

# Before TensorFlow is first imported: no device logs among the test results.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Not the user's own: tests trust encoders that they make.
os.environ["VISUAL_MEMORY_TRUSTED_ENCODERS"] = os.path.join(
    tempfile.mkdtemp(prefix="visual-memory-tests-"), "trusted-encoders"
)


@pytest.fixture(scope="session")
def demo_assets() -> demo.fetch.DemoAssets:
    """Kept between test runs, so that only the first one downloads."""
    return demo.fetch.fetch(os.environ.get("VISUAL_MEMORY_CACHE", ".cache"))


@pytest.fixture(scope="session")
def encoder_path(demo_assets) -> str:
    """A SavedModel folder: ImageNet-trained EfficientNet-lite0, 1280 dimensions."""
    return demo_assets.encoder


@pytest.fixture(scope="session")
def photos(demo_assets) -> str:
    """A folder per class: 210 photos (128 x 128 RGBA PNG) of 10 flower species. Read only."""
    return os.path.join(demo_assets.images, "flowers")


@pytest.fixture(scope="session")
def few_photos(photos, tmp_path_factory) -> str:
    """The first 8 photos of 4 of the species, in a folder named ``few``. Read only."""
    few = tmp_path_factory.mktemp("photos") / "few"
    for species in ("iris", "peony", "rose", "viola"):
        (few / species).mkdir(parents=True)
        for photo in sorted(Path(photos, species).iterdir())[:8]:
            shutil.copy(photo, few / species)
    return str(few)


@pytest.fixture(scope="session")
def small_encoder(tmp_path_factory) -> str:
    """A SavedModel folder: one seeded random convolution and pooling, 16 dimensions.

    Any crop of at least 8 pixels will do. Made in a process of its own, since many tests
    need no TensorFlow in theirs.
    """
    folder = tmp_path_factory.mktemp("encoder") / "small"
    subprocess.run([sys.executable, "-c", _SMALL_ENCODER, str(folder)], check=True, timeout=120)
    return str(folder)


@pytest.fixture(scope="session")
def make_bucket() -> Iterator[Callable[[], str]]:
    """Makes an empty bucket, gs://NAME, in an emulator of Google Cloud Storage.

    This process and all that it starts use the emulator until the tests end.
    """
    with emulator() as host, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", host)

        def make() -> str:
            name = f"test-{uuid.uuid4().hex[:12]}"
            create_bucket(host, name)
            return f"gs://{name}"

        yield make


@pytest.fixture
def bucket(make_bucket) -> str:
    """A new and empty bucket, gs://NAME."""
    return make_bucket()


_SMALL_ENCODER = textwrap.dedent(
    """
    import sys

    import numpy as np
    import tensorflow as tf

    class Small(tf.Module):
        def __init__(self):
            kernel = np.random.default_rng(5).normal(0, 0.2, (8, 8, 3, 16))
            self.kernel = tf.Variable(kernel.astype(np.float32))

        @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3), tf.float32)])
        def __call__(self, images):
            features = tf.nn.relu(tf.nn.conv2d(images - 0.5, self.kernel, 8, "VALID"))
            return tf.reduce_mean(features, axis=(1, 2))

    tf.saved_model.save(Small(), sys.argv[1])
    """
)
