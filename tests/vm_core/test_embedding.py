"""From records to embeddings: a bad image costs itself, and nothing else changes."""

from __future__ import annotations

import io
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vm_core import checkpoints, embedding, encoders, storage
from vm_core.classes import ClassTable
from vm_core.embedding import (
    BatchedEncoder,
    EmbedPlan,
    ImageSettings,
    by_shard,
    embed_records,
    embed_split,
    gather,
)
from vm_core.encoders import Encoder
from vm_core.errors import VisualMemoryError
from vm_core.images import Preprocessing
from vm_core.records import (
    Embedded,
    EmbeddingBlock,
    ImageRecord,
    Rejected,
    count_images,
    shard_of,
    strings,
)
from vm_core.sources import parse as parse_source

CROP = 16
ENCODER = Encoder(
    kind="test", path="", preprocessing=Preprocessing(resize=20, crop=CROP), batch_size=8
)
PROJECTION = np.random.default_rng(1).standard_normal((CROP * CROP * 3, 12)).astype(np.float32)


def embed(pixels: np.ndarray) -> np.ndarray:
    """A row's embedding follows from that row alone, to the last bit."""
    rows = pixels.reshape(len(pixels), -1).astype(np.float32) / 255
    return np.stack([row @ PROJECTION for row in rows])


IMAGES = ImageSettings()


def run(records, embed=embed, images=IMAGES, batch_size=8, threads=None) -> Embedded:
    settings = ENCODER.model_copy(update={"batch_size": batch_size})
    encoder = BatchedEncoder(embed, batch_size)
    return embed_records(records, lambda: encoder, settings, images, threads)


@pytest.fixture(scope="module")
def records(few_photos) -> list[ImageRecord]:
    """32 photos, as paths and as bytes by turns."""
    files = sorted(path for path in Path(few_photos).rglob("*") if path.is_file())
    return [
        ImageRecord(f"few/{path.name}", i % 4, "few", path.read_bytes() if i % 2 else str(path))
        for i, path in enumerate(files)
    ]


def spoilt(records: list[ImageRecord], tmp_path: Path) -> dict[int, tuple]:
    """A tenth and more of the records, each broken another way, with what to expect of it."""
    whole = storage.read_bytes(records[0].data)
    truncated = whole[: len(whole) * 3 // 4]
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    dangling = tmp_path / "dangling.png"
    dangling.symlink_to(tmp_path / "nowhere")
    reasons = {
        2: (truncated, "damaged PNG: image file is truncated"),
        3: (b"", "the file is empty (0 bytes)"),
        9: (b"<html>", "not an image: the content is text"),
        10: (str(tmp_path), "the file cannot be read: Is a directory"),
        11: (str(dangling), "the file cannot be read: No such file or directory"),
        17: (str(loop), "the file cannot be read: Too many levels of symbolic links"),
        23: (str(tmp_path / "a\0b.png"), "the file cannot be read: "),
        24: ("nfs9://images/a.png", "the file cannot be read: cannot open 'nfs9://"),
        31: (str(tmp_path / "none.png"), "the file cannot be read: No such file or directory"),
    }
    return {row: (records[row]._replace(data=data), why) for row, (data, why) in reasons.items()}


@pytest.mark.parametrize("batch_size", [1, 5, 8, 64])
def test_broken_images_cost_only_themselves(records, tmp_path, batch_size):
    broken = spoilt(records, tmp_path)
    mixed = [broken[i][0] if i in broken else record for i, record in enumerate(records)]
    intact = [record for i, record in enumerate(records) if i not in broken]
    found, alone = run(mixed, batch_size=batch_size), run(intact, batch_size=batch_size)
    assert found.block.ids.tolist() == [record.id for record in intact]
    assert found.block.labels.tolist() == [record.label for record in intact]
    assert found.block.sources.tolist() == ["few"] * len(intact)
    np.testing.assert_array_equal(found.block.vectors, alone.block.vectors)
    assert found.block.thumbnails.tolist() == alone.block.thumbnails.tolist()
    assert not alone.rejected
    assert len(found.rejected) + len(found.block) == len(records)
    for item, (record, why) in zip(found.rejected, broken.values(), strict=True):
        assert (item.id, item.source) == (record.id, "few")
        assert item.reason.startswith(why)


def test_embeddings_are_the_encoders_scaled_to_unit_length(records):
    found = run(records).block.vectors
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert len(np.unique(found, axis=0)) == len(records)


def test_what_a_reader_rejected_keeps_its_place_and_reason(records):
    refused = Rejected("few/x", "few", "no label")
    found = run([*records[:3], refused, *records[3:5]])
    assert found.rejected == (refused,)
    assert len(found.block) == 5


def test_unusable_embeddings_are_rejected(records):
    def sometimes(pixels):
        out = embed(pixels)
        out[1], out[2], out[3] = np.nan, 0, np.inf
        return out

    found = run(records[:8], sometimes)
    assert found.block.ids.tolist() == [
        r.id for i, r in enumerate(records[:8]) if i not in (1, 2, 3)
    ]
    assert [(item.id, item.reason) for item in found.rejected] == [
        (records[row].id, f"the encoder returned no usable embedding (its norm is {norm})")
        for row, norm in ((1, "nan"), (2, "0.0"), (3, "inf"))
    ]


def test_large_and_small_embeddings_are_usable(records):
    """Their squares are beyond float32."""
    for scale in (1e-30, 1e30):
        found = run(records[:8], lambda pixels, scale=scale: embed(pixels) * np.float32(scale))
        assert not found.rejected
        np.testing.assert_allclose(found.block.vectors, run(records[:8]).block.vectors, atol=1e-6)


def test_nothing_to_encode_loads_no_encoder():
    def load():
        raise AssertionError("loaded for nothing")

    for records in ([], [ImageRecord("a", 1, "s", b"")]):
        found = embed_records(records, load, ENCODER, ImageSettings())
        assert len(found.block) == 0
        assert len(found.rejected) == len(records)


def test_image_settings(records):
    assert run(records, images=ImageSettings(thumbnail_pixels=0)).block.thumbnails is None
    found = run(records, images=ImageSettings(max_pixels=128 * 128 - 1))
    assert len(found.rejected) == len(records)
    assert found.rejected[0].reason.startswith("too large: 128 x 128 is 16,384 pixels")


def test_records_are_read_as_they_are_needed(records):
    """Two batches wait, one is being encoded: no more, however many records there are."""
    taken, encoded, ahead = 0, 0, []

    def counted():
        nonlocal taken
        for _ in range(4):
            for record in records:
                taken += 1
                yield record

    def watching(pixels):
        nonlocal encoded
        encoded += len(pixels)
        ahead.append(taken - encoded)
        return embed(pixels)

    run(counted(), watching, batch_size=4)
    assert encoded == 4 * len(records)
    assert max(ahead) <= 2 * 4 + 1
    assert min(ahead[:-4]) >= 4  # and it does run ahead


def test_images_are_decoded_at_once_and_ahead_of_the_encoder(records, monkeypatch):
    """Four images wait for each other; a batch is encoded when the next one has been decoded."""
    together = threading.Barrier(4)
    progress = threading.Condition()
    decoded = calls = 0
    original = embedding.prepare

    def prepare(data, *arguments):
        nonlocal decoded
        together.wait(timeout=30)
        with progress:
            decoded += 1
            progress.notify()
        return original(data, *arguments)

    def waiting(pixels):
        nonlocal calls
        calls += 1
        with progress:
            assert progress.wait_for(lambda: decoded >= min(12, 4 * (calls + 1)), timeout=30)
        return embed(pixels)

    monkeypatch.setattr(embedding, "prepare", prepare)
    found = run(records[:12], waiting, batch_size=4, threads=4)
    assert len(found.block) == 12


# --- batches ---


def test_every_call_has_the_same_shape(records):
    shapes = []

    def watching(pixels):
        shapes.append(pixels.shape)
        return embed(pixels)

    run(records[:11], watching, batch_size=8)
    assert shapes == [(8, CROP, CROP, 3)] * 2


def test_company_and_padding_do_not_show(records):
    everything = run(records).block.vectors
    for rows in ([5], [5, 6, 7], [31, 5, 0], [*range(20)]):
        some = run([records[row] for row in rows]).block.vectors
        np.testing.assert_array_equal(some, everything[rows])


@pytest.mark.parametrize("fits", [7, 3, 1])
def test_out_of_memory_halves_the_batch(records, fits, caplog):
    shapes = []

    def small_device(pixels):
        shapes.append(len(pixels))
        if len(pixels) > fits:
            raise MemoryError("OOM when allocating tensor")
        return embed(pixels)

    found = run(records, small_device)
    np.testing.assert_array_equal(found.block.vectors, run(records).block.vectors)
    assert found.block.ids.tolist() == [record.id for record in records]
    size = {7: 4, 3: 2, 1: 1}[fits]
    assert [shape for shape in shapes if shape > fits] == [8, 4, 2][: shapes.index(size)]
    assert set(shapes[shapes.index(size) :]) == {size}  # once and for all
    assert f"batch size is now {size} (OOM when allocating tensor)" in caplog.text


def test_out_of_memory_for_one_image_is_an_error(records):
    def no_device(pixels):
        raise MemoryError("nothing fits")

    with pytest.raises(MemoryError, match="nothing fits"):
        run(records, no_device)


def test_other_errors_of_the_encoder_are_not_taken_for_bad_images(records):
    def broken(pixels):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(records, broken)


# --- splits and checkpoints ---


def assert_same(found: Embedded, expected: Embedded) -> None:
    assert found.rejected == expected.rejected
    assert all(isinstance(item, Rejected) for item in found.rejected)
    assert found.block.ids.tolist() == expected.block.ids.tolist()
    assert found.block.sources.tolist() == expected.block.sources.tolist()
    np.testing.assert_array_equal(found.block.labels, expected.block.labels)
    np.testing.assert_array_equal(found.block.vectors, expected.block.vectors)
    for name in ("labels", "vectors"):
        assert getattr(found.block, name).dtype == getattr(expected.block, name).dtype
    if expected.block.thumbnails is None:
        assert found.block.thumbnails is None
    else:
        assert found.block.thumbnails.tolist() == expected.block.thumbnails.tolist()


@pytest.mark.parametrize("pixels", [0, 32])
@pytest.mark.parametrize("count", [0, 1, 7])
def test_checkpoint_round_trip(records, tmp_path, count, pixels):
    refused = Rejected("few/ü", "few", 'a "reason"\nin two lines')
    embedded = run([refused, *records[:count]], images=ImageSettings(thumbnail_pixels=pixels))
    path = str(tmp_path / "deep" / "x.arrow")
    checkpoints.write(path, embedded)
    assert_same(checkpoints.read(path), embedded)
    checkpoints.write(path, Embedded(embedded.block))
    assert checkpoints.read(path).rejected == ()


def plan_of(few_photos: str, tmp_path: Path) -> EmbedPlan:
    source = parse_source({"kind": "folder", "path": few_photos})
    keys = source.listing().class_keys
    classes = ClassTable.from_keys([keys], {})
    return EmbedPlan((source,), classes, ENCODER, ImageSettings(), str(tmp_path / "work"))


def test_a_split_is_encoded_once(few_photos, tmp_path):
    plan = plan_of(few_photos, tmp_path)
    (split,) = plan.sources[0].listing().splits
    first = embed_split(plan, (0, split), lambda: BatchedEncoder(embed, 8))
    assert len(first.block) == 32
    assert sorted(set(first.block.labels.tolist())) == [0, 1, 2, 3]

    def load():
        raise AssertionError("encoded again")

    assert_same(embed_split(plan, (0, split), load), first)
    with pytest.raises(AssertionError, match="encoded again"):
        embed_split(plan, (0, split._replace(version="changed")), load)


def test_part_of_a_split_is_no_checkpoint(few_photos, tmp_path):
    plan = plan_of(few_photos, tmp_path)
    (split,) = plan.sources[0].listing().splits
    load = lambda: BatchedEncoder(embed, 8)  # noqa: E731
    part = embed_split(plan, (0, split), load, wanted=lambda id: "iris" in id)
    assert len(part.block) == 8
    assert len(embed_split(plan, (0, split), load).block) == 32


# --- shards ---


def block_of(ids, labels=None, seed=0) -> EmbeddingBlock:
    vectors = np.random.default_rng(seed).standard_normal((len(ids), 3)).astype(np.float32)
    return EmbeddingBlock(
        strings(ids),
        np.array(labels or [0] * len(ids), np.int64),
        strings(["s"] * len(ids)),
        vectors,
        strings([b"%d" % i for i in range(len(ids))]),
    )


@given(st.lists(st.text(max_size=4), unique=True, max_size=30), st.integers(1, 9))
def test_shards_divide_a_split_without_loss(ids, shards):
    rejected = tuple(Rejected(id + "!", "s", "why") for id in ids[::2])
    embedded = Embedded(block_of(ids), rejected)
    parts = list(by_shard(embedded, shards))
    assert [shard for shard, _ in parts] == sorted({shard for shard, _ in parts})
    for shard, part in parts:
        names = [*part.block.ids, *(item.id for item in part.rejected)]
        assert names and {shard_of(id, shards) for id in names} == {shard}
    together, duplicates = gather([part for _, part in parts])
    assert duplicates == 0
    assert together.block.ids.tolist() == sorted(ids)
    assert together.rejected == tuple(sorted(rejected))
    rows = {id: row for row, id in enumerate(ids)}
    for row, id in enumerate(together.block.ids):
        np.testing.assert_array_equal(together.block.vectors[row], embedded.block.vectors[rows[id]])
        assert together.block.thumbnails[row] == embedded.block.thumbnails[rows[id]]


@pytest.mark.parametrize("contents", [None, "known"])
def test_duplicates_have_the_same_id_label_and_content(contents):
    """One id with two contents is never called a duplicate: neither image is lost in silence."""
    block = block_of(["a", "a", "b", "b", "c", "c"], [0, 0, 0, 0, 0, 1])
    vectors = block.vectors.copy()
    vectors[1], vectors[5] = vectors[0], vectors[4]
    block = replace(block, vectors=vectors)
    if contents:
        block = replace(block, contents=strings([b"1", b"1", b"2", b"3", b"4", b"4"]))
    found, duplicates = gather([Embedded(block.take(np.array([row]))) for row in range(6)])
    assert found.block.ids.tolist() == ["a"] and duplicates == 1
    assert [(item.id, item.images) for item in found.rejected] == [("b", 2), ("c", 2)]
    assert "2 images or labels that differ: give each its own id" in found.rejected[0].reason


def test_images_of_one_id_and_embedding_but_other_bytes_are_no_duplicates():
    block = block_of(["a", "a"], [0, 0])
    block = replace(block, vectors=block.vectors[[0, 0]], contents=strings([b"1", b"2"]))
    found, duplicates = gather([Embedded(block)])
    assert (len(found.block), duplicates, count_images(found.rejected)) == (0, 0, 2)


@pytest.mark.parametrize(
    "returned, cause",
    [
        (lambda n: np.ones((n - 1, 4), np.float32), r"shape \(3, 4\) .* for 4 images"),
        (lambda n: np.ones((n, 4, 1), np.float32), "shape"),
        (lambda n: np.ones(n, np.float32), "shape"),
        (lambda n: np.ones((n, 0), np.float32), "shape"),
        (lambda n: np.full((n, 4), "x"), "type <U1"),
        (lambda n: np.full((n, 4), None), "type object"),
        (lambda n: None, "type object"),
    ],
)
def test_an_encoder_that_returns_no_row_of_numbers_an_image(returned, cause):
    encoder = BatchedEncoder(lambda pixels: returned(len(pixels)), 4, "the encoder 'm'")
    with pytest.raises(VisualMemoryError, match=f"the encoder 'm' returned an array of .*{cause}"):
        encoder(np.zeros((2, 8, 8, 3), np.uint8))


def test_an_encoder_whose_dimension_changes():
    sizes = iter((4, 5))
    encoder = BatchedEncoder(lambda p: np.ones((len(p), next(sizes)), np.float32), 2)
    with pytest.raises(VisualMemoryError, match="returned 5 dimensions, and 4 before"):
        encoder(np.zeros((4, 8, 8, 3), np.uint8))


def test_a_smaller_batch_is_recorded():
    """The last bits of an embedding may depend on the shape of its batch."""

    def embed(pixels):
        if len(pixels) > 2:
            raise MemoryError("device")
        return np.ones((len(pixels), 4), np.float32)

    file = io.BytesIO()
    Image.new("RGB", (300, 300)).save(file, "PNG")
    records = [ImageRecord(str(n), 0, "s", file.getvalue()) for n in range(5)]
    settings = encoders.parse({"kind": "saved_model", "path": "m", "batch_size": 8})
    encoder = BatchedEncoder(embed, 8)
    small = embed_records(records, lambda: encoder, settings, ImageSettings())
    assert small.batch_size == 2
    assert gather([small, Embedded.nothing()])[0].batch_size == 2


def test_a_thread_that_halves_the_shape_disturbs_no_other():
    """One encodes eight images while another runs out of memory with as many."""
    inside, halved = threading.Event(), threading.Event()

    def embed(pixels):
        if pixels[0, 0, 0, 0] == 1:  # the one that has the memory
            inside.set()
            assert halved.wait(10)
        elif len(pixels) > 4:
            assert inside.wait(10)
            raise MemoryError("device")
        else:
            halved.set()
        return np.ones((len(pixels), 4), np.float32)

    encoder = BatchedEncoder(embed, 8)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(encoder, np.ones((8, 2, 2, 3), np.uint8))
        second = pool.submit(encoder, np.zeros((8, 2, 2, 3), np.uint8))
        assert first.result().shape == second.result().shape == (8, 4)
    assert encoder.batch_size == 4


def test_gathering_does_not_depend_on_the_order():
    parts = [
        Embedded(block_of(["a", "b", "a"], [2, 1, 1]), (Rejected("x", "s", "1"),)),
        Embedded(block_of(["b", "c"], [0, 5], seed=1), (Rejected("x", "s", "1"),)),
        Embedded(block_of(["a"], [1], seed=2), (Rejected("x", "s", "2"),)),
        Embedded.nothing(),
    ]
    expected, duplicates = gather(parts)
    assert expected.block.ids.tolist() == ["c"]
    assert expected.block.labels.tolist() == [5]
    conflicts = [(item.id, item.images) for item in expected.rejected if "differ" in item.reason]
    assert conflicts == [("a", 3), ("b", 2)]
    assert [item.reason for item in expected.rejected if item.id == "x"] == ["1", "2"]
    assert duplicates == 1
    read = sum(len(p.block) + len(p.rejected) for p in parts)
    assert read == 1 + count_images(expected.rejected) + duplicates
    for seed in range(6):
        shuffled = random.Random(seed).sample(parts, len(parts))
        found, count = gather(shuffled)
        assert count == duplicates
        assert_same(found, expected)
