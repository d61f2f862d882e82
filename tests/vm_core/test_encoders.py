"""Encoders: real models, loaded and called; what their fingerprints cover."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from vm_core import encoders, storage
from vm_core.embedding import BatchedEncoder
from vm_core.encoders import Encoder
from vm_core.errors import VisualMemoryError
from vm_core.images import Preprocessing, prepare

SMALL = {"resize": 32, "crop": 32}


def saved_model(path: object, **settings) -> Encoder:
    return encoders.parse({"kind": "saved_model", "path": str(path), **settings})


@pytest.fixture(scope="module")
def pixels(few_photos) -> np.ndarray:
    """(20, 32, 32, 3) uint8."""
    files = sorted(Path(few_photos).rglob("*.png"))[:20]
    return np.stack([prepare(f.read_bytes(), Preprocessing(**SMALL)).pixels for f in files])


# --- fingerprints ---


def test_fingerprint_is_of_the_model_and_not_of_its_place(small_encoder, tmp_path):
    first = saved_model(small_encoder).fingerprint()
    copy = tmp_path / "elsewhere" / "copy"
    shutil.copytree(small_encoder, copy, copy_function=shutil.copyfile)
    (copy / "fingerprint.pb").write_bytes(b"another export of the same")
    (copy / "README.txt").write_text("notes")
    assert saved_model(copy).fingerprint() == first
    assert saved_model(f"{copy}/", batch_size=7).fingerprint() == first
    assert len(first) == 16 and int(first, 16) >= 0


def test_fingerprint_covers_all_that_shapes_an_embedding(small_encoder, tmp_path):
    settings = [
        {},
        {"precision": "mixed"},
        {"output": "logits"},
        {"preprocessing": {"resize": 257}},
        {"preprocessing": {"resize": 256, "crop": 225}},
        {"preprocessing": {"mean": [0.1, 0, 0]}},
        {"preprocessing": {"std": [2, 1, 1]}},
        {"preprocessing": {"interpolation": "bilinear"}},
    ]
    found = [saved_model(small_encoder, **some).fingerprint() for some in settings]
    for number, name in enumerate(["saved_model.pb", "variables/variables.data-00000-of-00001"]):
        copy = tmp_path / str(number)
        shutil.copytree(small_encoder, copy)
        data = bytearray((copy / name).read_bytes())
        data[-1] ^= 1
        (copy / name).write_bytes(data)
        found.append(saved_model(copy).fingerprint())
    assert len(set(found)) == len(settings) + 2


def test_fingerprint_from_a_bucket(small_encoder):
    for file in storage.walk(small_encoder):
        name = file.path.removeprefix(small_encoder)
        storage.write_bytes("memory://models/small" + name, storage.read_bytes(file.path))
    found = saved_model("memory://models/small").fingerprint()
    assert found == saved_model(small_encoder).fingerprint()


def test_hub_handles_need_no_download_and_no_credentials():
    handle = "https://tfhub.dev/google/model/1"
    one, two = saved_model(handle), saved_model(handle, output="pooled")
    assert one.model_digest() == f"{handle} None"
    assert len({one.fingerprint(), two.fingerprint(), saved_model(handle[:-1]).fingerprint()}) == 3


def test_what_is_no_saved_model(tmp_path, photos):
    for path in (tmp_path / "none", photos):
        with pytest.raises(VisualMemoryError, match=r"is not a SavedModel \(it has no saved_model"):
            saved_model(path).fingerprint()
        with pytest.raises(VisualMemoryError, match=r"is not a SavedModel \(it has no saved_model"):
            saved_model(path).load()


# --- SavedModels ---


def test_embeddings_of_the_small_encoder(small_encoder, pixels):
    tf = pytest.importorskip("tensorflow")
    found = saved_model(small_encoder, preprocessing=SMALL).load()(pixels)
    assert (found.shape, found.dtype) == ((20, 16), np.float32)
    expected = tf.saved_model.load(small_encoder)(pixels.astype(np.float32) / 255)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    mean, std = (0.5, 0.25, 0.1), (0.2, 0.3, 0.4)
    scaled = saved_model(small_encoder, preprocessing={**SMALL, "mean": mean, "std": std})
    expected = tf.saved_model.load(small_encoder)((pixels / 255 - np.array(mean)) / np.array(std))
    np.testing.assert_allclose(scaled.load()(pixels), expected, atol=1e-5)


def test_from_a_bucket(small_encoder, pixels):
    for file in storage.walk(small_encoder):
        name = file.path.removeprefix(small_encoder)
        storage.write_bytes("memory://models/small" + name, storage.read_bytes(file.path))
    found = saved_model("memory://models/small", preprocessing=SMALL).load()(pixels)
    expected = saved_model(small_encoder, preprocessing=SMALL).load()(pixels)
    np.testing.assert_array_equal(found, expected)


def test_company_does_not_show_in_a_real_encoder(encoder_path, few_photos):
    encoder = saved_model(encoder_path, batch_size=8)
    files = sorted(Path(few_photos).rglob("*.png"))[:11]
    images = np.stack([prepare(f.read_bytes(), encoder.preprocessing).pixels for f in files])
    embed = BatchedEncoder(encoder.load(), 8)
    together = embed(images)
    assert together.shape == (11, 1280)
    np.testing.assert_array_equal(embed(images[::-1])[::-1], together)
    np.testing.assert_array_equal(embed(images[5:6]), together[5:6])
    np.testing.assert_array_equal(embed(images[3:9]), together[3:9])


def test_device_memory_errors_are_memory_errors():
    tf = pytest.importorskip("tensorflow")
    from vm_core.encoders._tensorflow import compile_embed

    def fail(batch):
        if len(batch) > 3:
            raise MemoryError("OOM when allocating tensor\nwith details")
        return batch.mean(axis=(1, 2)).astype(np.float32)

    def model(images):
        out = tf.numpy_function(fail, [images], tf.float32)
        return tf.ensure_shape(out, (None, 3))

    embed = compile_embed(model, Preprocessing(**SMALL), keep=None)
    images = np.random.default_rng(1).integers(0, 256, (8, 32, 32, 3), np.uint8)
    with pytest.raises(MemoryError):
        embed(images)
    expected = images.astype(np.float32).mean(axis=(1, 2)) / 255
    np.testing.assert_allclose(BatchedEncoder(embed, 8)(images), expected, atol=1e-5)


@pytest.fixture(scope="module")
def many_outputs(tmp_path_factory) -> str:
    tf = pytest.importorskip("tensorflow")

    class Many(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3), tf.float32)])
        def serve(self, images):
            return {"pooled": tf.reduce_mean(images, axis=(1, 2)), "map": images}

    path = str(tmp_path_factory.mktemp("models") / "many")
    module = Many()
    tf.saved_model.save(module, path, signatures={"serving_default": module.serve})
    return path


def test_an_output_is_picked_by_name(many_outputs, pixels):
    found = saved_model(many_outputs, output="pooled", preprocessing=SMALL).load()(pixels)
    np.testing.assert_allclose(found, pixels.mean(axis=(1, 2)) / 255, atol=1e-5)


@pytest.mark.parametrize("output", [None, "logits"])
def test_an_output_that_is_not_there(many_outputs, output):
    message = rf"has the outputs map, pooled; output = {output!r} is none of them\. Set output to"
    with pytest.raises(VisualMemoryError, match=message):
        saved_model(many_outputs, output=output).load()


def test_an_output_that_is_no_vector(many_outputs):
    with pytest.raises(VisualMemoryError, match=r"has the shape \(None, .*Choose another output"):
        saved_model(many_outputs, output="map").load()


def test_a_model_without_anything_to_call(tmp_path):
    tf = pytest.importorskip("tensorflow")
    tf.saved_model.save(tf.Module(), str(tmp_path / "bare"))
    with pytest.raises(VisualMemoryError, match="neither callable nor has a serving_default"):
        saved_model(tmp_path / "bare").load()


def test_mixed_precision_is_close(encoder_path, few_photos):
    tf = pytest.importorskip("tensorflow")
    found = []
    try:
        for precision in ("float32", "mixed"):
            encoder = saved_model(encoder_path, precision=precision)
            files = sorted(Path(few_photos).rglob("*.png"))[:8]
            images = [prepare(f.read_bytes(), encoder.preprocessing).pixels for f in files]
            vectors = encoder.load()(np.stack(images))
            assert vectors.dtype == np.float32
            found.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        switched = tf.config.optimizer.get_experimental_options()
    finally:  # it holds for the whole process
        names = ("auto_mixed_precision", "auto_mixed_precision_onednn_bfloat16")
        tf.config.optimizer.set_experimental_options(dict.fromkeys(names, False))
    assert any(switched.get(name) for name in names)
    assert (found[0] * found[1]).sum(axis=1).min() > 0.99


# --- keras-hub ---


@pytest.fixture(scope="module")
def keras_hub():
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    return pytest.importorskip("keras_hub", exc_type=ImportError)


@pytest.fixture(scope="module")
def dinov2(keras_hub, tmp_path_factory):
    """A small backbone with seeded weights and the folder of its preset, made for 56 pixels."""
    import keras

    keras.utils.set_random_seed(11)
    backbone = keras_hub.models.DINOV2Backbone(
        patch_size=14,
        num_layers=2,
        hidden_dim=32,
        num_heads=2,
        intermediate_dim=64,
        num_register_tokens=0,
        image_shape=(56, 56, 3),
        position_embedding_shape=(56, 56),
    )
    for weights in backbone.weights:  # some start as zeros, and would not be seen
        shift = np.random.default_rng(3).normal(0, 0.1, weights.shape)
        if "float" in weights.dtype:
            weights.assign_add(shift)
    path = str(tmp_path_factory.mktemp("presets") / "dinov2")
    backbone.save_to_preset(path)
    return backbone, path


@pytest.fixture(scope="module")
def clip(keras_hub, tmp_path_factory):
    import keras

    keras.utils.set_random_seed(12)
    sizes = {"hidden_dim": 32, "num_layers": 2, "num_heads": 2, "intermediate_dim": 64}
    backbone = keras_hub.models.CLIPBackbone(
        vision_encoder=keras_hub.models.CLIPVisionEncoder(
            patch_size=16, image_shape=(32, 32, 3), **sizes
        ),
        text_encoder=keras_hub.models.CLIPTextEncoder(
            vocabulary_size=50, embedding_dim=32, max_sequence_length=8, **sizes
        ),
        projection_dim=24,
    )
    path = str(tmp_path_factory.mktemp("presets") / "clip")
    backbone.save_to_preset(path)
    return backbone, path


def hub(path: str, family: str, **settings) -> Encoder:
    return encoders.parse({"kind": "keras_hub", "path": path, "family": family, **settings})


def images_of(size: int, encoder: Encoder) -> tuple[np.ndarray, np.ndarray]:
    """Noise as pixels, and as the floats that the family's preprocessing makes of them."""
    noise = np.random.default_rng(size).integers(0, 256, (5, size, size, 3), np.uint8)
    preprocessing = encoder.effective_preprocessing()
    values = (noise / 255 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    return noise, values.astype(np.float32)


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def test_dinov2_gives_its_class_token(dinov2):
    backbone, path = dinov2
    encoder = hub(path, "dinov2", preprocessing={"resize": 64, "crop": 56, **IMAGENET})
    noise, values = images_of(56, encoder)
    found = encoder.load()(noise)
    assert (found.shape, found.dtype) == ((5, 32), np.float32)
    expected = np.asarray(backbone({"images": values}, training=False))
    assert expected.shape == (5, 1 + 16, 32)
    np.testing.assert_allclose(found, expected[:, 0], atol=1e-4)


def test_dinov2_takes_other_sizes_than_its_preset(dinov2):
    """The published presets are for 518 pixels, and memories are made with 224."""
    encoder = hub(dinov2[1], "dinov2", preprocessing={"resize": 32, "crop": 28, **IMAGENET})
    found = encoder.load()(images_of(28, encoder)[0])
    assert found.shape == (5, 32)
    assert len(np.unique(found, axis=0)) == 5


def test_clip_gives_its_projected_image_embedding(clip):
    backbone, path = clip
    encoder = hub(path, "clip", preprocessing={"resize": 32, "crop": 32})
    noise, values = images_of(32, encoder)
    found = encoder.load()(noise)
    assert found.shape == (5, 24)
    expected = backbone.get_vision_embeddings(values)
    np.testing.assert_allclose(found, np.asarray(expected), atol=1e-5)


def test_mixed_precision_of_a_backbone_is_close(dinov2):
    settings = {"preprocessing": {"resize": 56, "crop": 56, **IMAGENET}}
    full, mixed = (
        hub(dinov2[1], "dinov2", precision=precision, **settings)
        for precision in ("float32", "mixed")
    )
    noise, _ = images_of(56, full)
    one, two = full.load()(noise), mixed.load()(noise)
    assert two.dtype == np.float32
    cosine = (one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
    assert cosine.min() > 0.99
    assert full.fingerprint() != mixed.fingerprint()


def test_each_family_has_its_preprocessing(tmp_path):
    dinov2, clip = hub("a", "dinov2"), hub("a", "clip")
    assert dinov2.effective_preprocessing() == Preprocessing(resize=256, crop=224, **IMAGENET)
    assert clip.effective_preprocessing() == Preprocessing(
        resize=224,
        crop=224,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
    )
    given = hub("a", "clip", preprocessing={"crop": 100})
    assert given.effective_preprocessing() == Preprocessing(crop=100)
    (tmp_path / "config.json").write_text("{}")
    folders = [
        encoder.model_copy(update={"path": str(tmp_path)}) for encoder in (dinov2, clip, given)
    ]
    assert len({encoder.fingerprint() for encoder in folders}) == 3


def test_a_name_of_a_hub_is_digested_by_the_weights_behind_it(dinov2, monkeypatch):
    """A hub may have other weights under a name tomorrow."""
    encoder = hub("hf://somebody/dino", "dinov2")
    backbone = hub(dinov2[1], "dinov2")._backbone("float32")
    monkeypatch.setattr(type(encoder), "_backbone", lambda self, dtype: backbone)
    first = encoder.fingerprint()
    assert encoder.fingerprint() == first
    weight = backbone.weights[3]
    weight.assign(weight + 1e-6)
    assert encoder.fingerprint() != first


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "deep/part.weights.h5"])
def test_every_file_with_weights_is_digested_on_any_store(bucket, name):
    storage.write_bytes(f"{bucket}/preset/{name}", b"1")
    first = hub(f"{bucket}/preset", "dinov2").fingerprint()
    storage.write_bytes(f"{bucket}/preset/{name}", b"2")
    assert hub(f"{bucket}/preset", "dinov2").fingerprint() != first


def test_preset_fingerprint_follows_the_weights(dinov2, tmp_path):
    first = hub(dinov2[1], "dinov2").fingerprint()
    copy = tmp_path / "copy"
    shutil.copytree(dinov2[1], copy)
    assert hub(str(copy), "dinov2").fingerprint() == first
    (weights,) = copy.glob("*.h5")
    weights.write_bytes(weights.read_bytes() + b"\0")
    assert hub(str(copy), "dinov2").fingerprint() != first


def test_preset_errors(dinov2, clip, tmp_path):
    with pytest.raises(VisualMemoryError, match=r"cannot load the preset .* Give a preset folder"):
        hub(str(tmp_path), "dinov2").load()
    with pytest.raises(VisualMemoryError, match=r"is of the family DINOV2, not clip\. Set family"):
        hub(dinov2[1], "clip").load()
    with pytest.raises(VisualMemoryError, match=r"takes images of 32 pixels, not 224"):
        hub(clip[1], "clip").load()
    with pytest.raises(VisualMemoryError, match="family is missing"):
        encoders.parse({"kind": "keras_hub", "path": "x"})
