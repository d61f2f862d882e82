"""One file in ten is broken, in every way that files are: each costs only itself."""

import io
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.integration.harness import (
    build_memory,
    configuration,
    rows_of,
    run_python,
    table,
    write_config,
)
from vm_core.memory import Memory


def encoded(image: Image.Image, format: str, **options) -> bytes:
    with io.BytesIO() as file:
        image.save(file, format, **options)
        return file.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A valid PNG header that promises more pixels than any memory holds."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + pixels + png_chunk(b"IEND", b"")


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def unusual(photo: Image.Image) -> dict[str, bytes]:
    """Files that look odd and are images all the same."""
    rgb = photo.convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6
    grey16 = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) << 8)
    frames = [rgb.rotate(angle).convert("P") for angle in (0, 90, 180)]
    panorama = rgb.resize((6000, 20))
    return {
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "sixteen-bit.png": encoded(grey16, "PNG"),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "turned.jpg": encoded(rgb, "JPEG", exif=turned),
        "one-pixel.png": encoded(rgb.resize((1, 1)), "PNG"),
        "panorama.jpg": encoded(panorama, "JPEG"),
        "tower.jpg": encoded(panorama.rotate(90, expand=True), "JPEG"),
        "palette.png": encoded(rgb.convert("P"), "PNG"),
        "transparent.png": encoded(photo.convert("RGBA"), "PNG"),
        "grey.jpg": encoded(rgb.convert("L"), "JPEG"),
        "bilevel.png": encoded(rgb.convert("1"), "PNG"),
        "progressive.jpg": encoded(rgb, "JPEG", progressive=True),
        "picture.webp": encoded(rgb, "WEBP"),
        "picture.bmp": encoded(rgb, "BMP"),
        "png-inside.jpg": encoded(rgb, "PNG"),
        "no-extension": encoded(rgb, "JPEG"),
        "trailing.jpg": encoded(rgb, "JPEG") + b"more bytes after the end",
        "größe 中文.png": encoded(rgb, "PNG"),
    }


def broken(photo: Image.Image) -> dict[str, bytes]:
    rgb = photo.convert("RGB")
    jpeg, png = encoded(rgb, "JPEG"), encoded(rgb, "PNG")
    return {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[: len(png) // 2],
        "truncated.webp": encoded(rgb, "WEBP")[:200],
        "truncated.gif": encoded(rgb.convert("P"), "GIF")[:300],
        "header-only.jpg": jpeg[:20],
        "zero-bytes.jpg": bytes(5_000),
        "empty.jpg": b"",
        "text.jpg": b"This was once a photo.\n" * 50,
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "error.png": b'{"error": "access denied"}',
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "random.jpg": np.random.default_rng(0).bytes(10_000),
        "random-after-header.jpg": jpeg[:200] + np.random.default_rng(1).bytes(3_000),
        "bomb.png": bomb(60_000, 60_000),
        "huge-bomb.png": bomb(2**31 - 1, 2**31 - 1),
        "bad-crc.png": flipped(png, 30),
        "bad-data.png": flipped(png, len(png) // 2),
        "no-size.png": bomb(0, 0),
        "photo.tiff": encoded(rgb, "TIFF"),
        "archive.jpg": b"PK\x03\x04" + bytes(200),
    }


@pytest.fixture(scope="module")
def folders(photos, tmp_path_factory):
    """The same good files twice, the second time with broken ones among them."""
    good = tmp_path_factory.mktemp("good") / "flowers"
    some = sorted(Path(photos).glob("*/*.png"))[:180]
    for path in some:
        (good / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, good / path.parent.name)
    odd = unusual(Image.open(some[0]))
    for name, data in odd.items():
        (good / "iris" / name).write_bytes(data)
    mixed = tmp_path_factory.mktemp("mixed") / "flowers"
    shutil.copytree(good, mixed)
    bad = broken(Image.open(some[1]))
    classes = sorted(os.listdir(mixed))
    for number, (name, data) in enumerate(bad.items()):
        (mixed / classes[number % len(classes)] / name).write_bytes(data)
    os.mkfifo(mixed / "iris" / "pipe.jpg")  # reading it would wait for ever
    return good, mixed, bad


@pytest.mark.slow
def test_broken_files_cost_only_themselves(folders, small_encoder, tmp_path):
    good, mixed, bad = folders
    files = sum(path.is_file() for path in mixed.rglob("*"))
    assert 0.09 < len(bad) / files < 0.12
    settings = configuration(tmp_path / "memory", small_encoder, mixed, max_failure_share=0.15)
    config = write_config(tmp_path / "config.yaml", settings)
    run = run_python("-m", "pipelines.build", "--config", config, timeout=180)
    assert run.returncode == 0, run.stderr
    assert f"{files} read = {files - len(bad)} embedded + {len(bad)} quarantined" in run.stdout

    memory = Memory(str(tmp_path / "memory"))
    rows = table(f"{memory.root}/builds/{memory.manifest.build}/quarantine-*.parquet").to_pylist()
    reasons = {row["id"].rpartition("/")[2]: row["reason"] for row in rows}
    assert reasons.keys() == bad.keys() and len(rows) == len(bad)
    assert all(row["source"] == "flowers" for row in rows)
    assert all(len(reason) > 10 and "\n" not in reason for reason in reasons.values())
    assert reasons["empty.jpg"] == "the file is empty (0 bytes)"
    assert reasons["zero-bytes.jpg"] == "not an image: 5,000 zero bytes"
    assert "3,600,000,000 pixels" in reasons["bomb.png"]
    assert "damaged JPEG" in reasons["truncated.jpg"]
    assert "content is text" in reasons["page.jpg"]

    alone = build_memory(configuration(tmp_path / "alone", small_encoder, good))
    assert alone.manifest.total("quarantined") == 0
    expected, found = rows_of(alone), rows_of(memory)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.vectors, expected.vectors)
    assert memory.thumbnails(found.ids) == alone.thumbnails(expected.ids)
