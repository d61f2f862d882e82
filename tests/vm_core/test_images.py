"""Decoding: odd files give the right pixels, broken ones a reason that a user understands."""

from __future__ import annotations

import contextlib
import io
import random
import resource
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vm_core import images
from vm_core.images import BadImage, Preprocessing, decode, make_thumbnail, prepare, resize_and_crop

ORIENTATION = 0x0112
KNOWN = "JPEG, PNG, WEBP, GIF, BMP"
UNKNOWN_HEADER = f"not a readable image: the header is none of {KNOWN}, or is damaged"
TEXT = f"not an image: the content is text, not one of {KNOWN}"


@pytest.fixture(scope="module")
def photo(photos) -> Image.Image:
    """A photo of 100 x 80 pixels, RGB."""
    image = Image.open(sorted(Path(photos, "rose").iterdir())[0]).convert("RGB")
    return image.resize((100, 80))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def assert_reads(data: bytes, expected: Image.Image, tolerance: float = 0) -> None:
    found = decode(data)
    assert (found.mode, found.size) == ("RGB", expected.size)
    assert np.abs(pixels(found) - pixels(expected)).mean() <= tolerance


@contextlib.contextmanager
def little_memory(megabytes: int = 200):
    """Pillow's memory is not Python's: what counts is the peak of the process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < megabytes << 10


def png(width: int, height: int, depth: int, color: int, rows: bytes, *chunks: tuple) -> bytes:
    """A PNG file from its parts, whatever Pillow is able to write. chunks: before the data."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )


def png_rows(values: np.ndarray) -> bytes:
    """The rows of an array, (H, W) or (H, W, C), big-endian, none of them filtered."""
    return b"".join(b"\0" + row.tobytes() for row in values)


# --- good files ---


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_lossless_formats_give_the_very_pixels(photo, kind):
    assert_reads(encoded(photo, kind), photo)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("WEBP", {"quality": 95}),
        ("GIF", {}),
    ],
)
def test_lossy_formats_give_what_pillow_gives(photo, kind, options):
    data = encoded(photo, kind, **options)
    assert_reads(data, Image.open(io.BytesIO(data)).convert("RGB"))
    assert_reads(data, photo, tolerance=10)


def test_lossless_webp(photo):
    assert_reads(encoded(photo, "WEBP", lossless=True), photo)


def test_interlaced_png(photo):
    """Adam7, written by hand since Pillow does not: seven small pictures one after another."""
    values = pixels(photo).astype(np.uint8)
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2)]
    passes += [(0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(png_rows(values[y::dy, x::dx]) for y, x, dy, dx in passes)
    interlaced = bytearray(png(100, 80, 8, 2, rows))
    interlaced[28] = 1
    interlaced[29:33] = struct.pack(">I", zlib.crc32(interlaced[12:29]))
    assert_reads(bytes(interlaced), photo)


def test_cmyk_jpeg_keeps_its_colours(photo):
    """The exact inverse of Pillow's RGB to CMYK would be the original; JPEG loses a little."""
    data = encoded(photo.convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert_reads(data, photo, tolerance=5)


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    values = np.arange(65536, dtype=np.uint32).reshape(256, 256).astype(np.uint16)
    found = pixels(decode(encoded(Image.fromarray(values), "PNG")))
    np.testing.assert_array_equal(found, (values >> 8)[..., None].repeat(3, axis=2))


def test_sixteen_bit_grey_as_older_pillow_opens_it(monkeypatch):
    """Pillow before 11 opened it in mode I, 32 bits, where later ones have I;16."""
    image = Image.fromarray(np.array([[0, 255, 256, 65535]], np.int32))
    assert image.mode == "I"
    assert pixels(images._to_rgb(image))[0, :, 0].tolist() == [0, 0, 1, 255]


def test_sixteen_bit_rgb_png():
    values = np.random.default_rng(3).integers(0, 65536, (20, 30, 3)).astype(np.uint16)
    data = png(30, 20, 16, 2, png_rows(values.astype(">u2")))
    np.testing.assert_array_equal(pixels(decode(data)), values >> 8)


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_one_bit_and_palette(photo, mode):
    image = photo.convert(mode)
    assert_reads(encoded(image, "PNG"), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(photo, mode):
    image = photo.convert(mode)
    alpha = np.tile(np.linspace(0, 255, 100).astype(np.uint8), (80, 1))
    image.putalpha(Image.fromarray(alpha))
    opacity = alpha[..., None] / 255
    expected = pixels(photo.convert(mode[:-1]).convert("RGB")) * opacity + 255 * (1 - opacity)
    found = pixels(decode(encoded(image, "PNG")))
    assert np.abs(found - expected).max() <= 1
    assert (found[:, 0] == 255).all()


def test_transparent_palette_entry_is_white(photo):
    image = photo.quantize(16)
    found = pixels(decode(encoded(image, "PNG", transparency=3)))
    indices = np.asarray(image)
    assert (found[indices == 3] == 255).all()
    np.testing.assert_array_equal(found[indices != 3], pixels(image.convert("RGB"))[indices != 3])


@pytest.mark.parametrize(("mode", "key"), [("RGB", (10, 20, 30)), ("L", 77)])
def test_transparent_colour_is_white(mode, key):
    image = Image.new(mode, (4, 2), key)
    image.putpixel((1, 1), 200 if mode == "L" else (200, 200, 200))
    found = pixels(decode(encoded(image, "PNG", transparency=key)))
    assert (found[0] == 255).all()
    assert found[1, 1].tolist() == [200, 200, 200]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(photo, kind):
    others = [photo.rotate(90 * turn) for turn in (1, 2, 3)]
    exact = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(photo, kind, save_all=True, append_images=others, duration=50, **exact)
    assert Image.open(io.BytesIO(data)).n_frames == 4
    assert_reads(data, photo, tolerance=10 if kind == "GIF" else 0)


def test_several_pictures_in_a_jpeg_give_the_first(photo):
    data = encoded(photo, "MPO", save_all=True, append_images=[photo.rotate(90)], quality=95)
    assert_reads(data, photo, tolerance=10)


TURNED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a camera stores an upright picture under each EXIF orientation."""


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_every_exif_orientation_gives_the_upright_picture(photo, orientation, kind):
    turn = TURNED[orientation]
    stored = photo if turn is None else photo.transpose(turn)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    assert_reads(encoded(stored, kind, exif=exif, **options), photo)


def test_exif_orientation_of_a_jpeg(photo):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encoded(photo.transpose(TURNED[6]), "JPEG", quality=95, exif=exif)
    assert_reads(data, photo, tolerance=10)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"z" * 50,
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0nonsense",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",  # 99
    ],
)
def test_broken_exif_does_not_harm_the_picture(photo, exif):
    data = encoded(photo, "JPEG", quality=95, exif=exif)
    assert_reads(data, Image.open(io.BytesIO(data)))


def test_garbage_after_the_end_does_no_harm(photo):
    data = encoded(photo, "JPEG", quality=95)
    assert_reads(data + random.Random(1).randbytes(3000), decode(data))


def test_garbage_inside_a_jpeg_gives_a_picture_or_a_reason(photo):
    """The format has no checksum: what decodes is kept. Nothing else may come out."""
    whole = encoded(photo, "JPEG", quality=95)
    generator = random.Random(2)
    for _ in range(50):
        data = bytearray(whole)
        start = generator.randrange(len(data) - 50)
        data[start : start + 50] = generator.randbytes(50)
        try:
            assert decode(bytes(data)).mode == "RGB"
        except BadImage as error:
            assert str(error).startswith(("damaged JPEG: ", "not ", "too large: "))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP"])
def test_flipped_bytes_give_a_picture_or_a_reason(photo, kind):
    whole = encoded(photo.resize((20, 16)), kind)
    generator = random.Random(4)
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(3):
            data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            assert decode(bytes(data)).mode == "RGB"
        except BadImage as error:
            assert str(error)


# --- sizes ---


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 5000), (5000, 1), (30000, 300), (300, 30000), (224, 224), (257, 256)]
)
def test_any_size_becomes_the_encoders(photo, size):
    found = prepare(encoded(photo.resize(size), "PNG"), Preprocessing(), thumbnail_pixels=96)
    assert (found.pixels.shape, found.pixels.dtype) == ((224, 224, 3), np.uint8)
    assert max(Image.open(io.BytesIO(found.thumbnail)).size) == min(96, max(size))


def test_a_panorama_needs_little_more_memory_than_its_pixels():
    """Resizing the whole of it first would make 7,680,000 x 256 pixels, 8 GB."""
    image = Image.new("RGB", (30000, 1), (9, 99, 200))
    with little_memory():
        found = resize_and_crop(image, Preprocessing(resize=256, crop=224))
    assert (found == (9, 99, 200)).all()


@pytest.mark.parametrize("limit", [7999, 1])
def test_larger_than_the_limit_is_refused(photo, limit):
    with pytest.raises(BadImage, match=rf"too large: 100 x 80 is 8,000 pixels, .* is {limit:,}$"):
        decode(encoded(photo, "PNG"), max_pixels=limit)
    assert decode(encoded(photo, "PNG"), max_pixels=8000).size == (100, 80)


def test_decompression_bomb_is_refused_unopened():
    """A few bytes that claim 7.5 GB."""
    bomb = png(50000, 50000, 8, 2, b"\0" * 1000)
    with (
        little_memory(),
        pytest.raises(BadImage, match=r"^too large: 50000 x 50000 is 2,500,000,000 pixels"),
    ):
        decode(bomb)


def test_gif_frame_larger_than_its_screen_is_refused():
    """The header says 1 x 1, the frame inside it 60000 x 60000."""
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 60000, 60000, 0) + b"\x02\x02\x4c\x01\0\x3b"
    data = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6) + frame
    with pytest.raises(BadImage, match="^too large: "):
        decode(data)


def test_a_valid_huge_image_is_read_without_a_warning(recwarn):
    """Pillow would warn from 89 million pixels on and refuse twice as many."""
    assert decode(encoded(Image.new("1", (20000, 4800)), "PNG")).size == (20000, 4800)
    assert not recwarn.list


# --- broken files ---


def test_truncated_files(photo):
    for kind in ("JPEG", "PNG", "BMP", "GIF"):
        whole = encoded(photo, kind)
        with pytest.raises(BadImage, match=rf"^damaged {kind}: .*truncated"):
            decode(whole[: len(whole) // 2])
    whole = encoded(photo, "WEBP")
    with pytest.raises(BadImage, match="WEBP"):
        decode(whole[: len(whole) // 2])


def test_png_with_a_wrong_checksum(photo):
    data = bytearray(encoded(photo, "PNG"))
    data[-20] ^= 0xFF  # in the checksum of the last IDAT chunk, or its data
    with pytest.raises(BadImage, match=r"^damaged PNG: "):
        decode(bytes(data))
    data = bytearray(encoded(photo, "PNG"))
    data[29] ^= 0xFF
    with pytest.raises(BadImage) as error:
        decode(bytes(data))
    assert str(error.value) == UNKNOWN_HEADER


def test_png_without_its_data():
    with pytest.raises(BadImage, match=r"^damaged PNG: "):
        decode(png(50, 50, 8, 2, b""))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty (0 bytes)"),
        (bytes(70000), "not an image: 70,000 zero bytes"),
        (b"This is a note.\nNot a photo.\n", TEXT),
        (b"<!DOCTYPE html><html><body>404</body></html>", TEXT),
        (b'{"error": "quota exceeded"}', TEXT),
        ("\ufeffNotiz mit Markierung".encode(), TEXT),
        (random.Random(5).randbytes(5000), UNKNOWN_HEADER),
        (b"\xff\xd8", UNKNOWN_HEADER),
        (b"\x89PNG\r\n\x1a\n", UNKNOWN_HEADER),
    ],
    ids=["empty", "zeros", "text", "html", "json", "bom", "random", "jpeg mark", "png mark"],
)
def test_what_is_no_image_has_a_reason(data, reason):
    with pytest.raises(BadImage) as error:
        decode(data)
    assert str(error.value) == reason


@pytest.mark.parametrize("shift", range(3))
def test_text_is_recognised_wherever_its_characters_are_cut(shift):
    with pytest.raises(BadImage) as error:
        decode(b"x" * shift + "写真ではなく文章です。".encode() * 100)
    assert str(error.value) == TEXT


@pytest.mark.parametrize("kind", ["TIFF", "ICO", "PPM"])
def test_formats_that_are_not_read_say_which_are(photo, kind):
    with pytest.raises(BadImage) as error:
        decode(encoded(photo, kind))
    assert str(error.value) == UNKNOWN_HEADER


def test_eps_is_not_given_to_another_program(photo):
    """Pillow would start Ghostscript."""
    with pytest.raises(BadImage) as error:
        decode(encoded(photo, "EPS"))
    assert str(error.value) == TEXT


# --- resizing ---


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 64),
    st.integers(0, 63),
    st.sampled_from(["bicubic", "bilinear"]),
    st.integers(0, 2**32 - 1),
)
def test_resize_and_crop_equals_resize_then_crop(width, height, resize, less, method, seed):
    """To the last bit or the next: the two compute the same filter from other origins."""
    crop = max(1, resize - less)
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(noise)
    shorter = min(width, height)
    size = (resize * width // shorter, resize * height // shorter)
    left, top = (round((side - crop) / 2) for side in size)
    expected = image.resize(size, Image.Resampling[method.upper()])
    expected = pixels(expected.crop((left, top, left + crop, top + crop)))
    found = resize_and_crop(
        image, Preprocessing(resize=resize, crop=crop, interpolation=method)
    ).astype(int)
    assert np.abs(found - expected).max() <= 1


def test_nothing_is_resampled_when_the_size_is_right(photo):
    square = photo.crop((0, 0, 64, 64))
    np.testing.assert_array_equal(
        resize_and_crop(square, Preprocessing(resize=64, crop=64)), pixels(square)
    )


def test_thumbnail_shows_the_whole_picture(photo):
    small = Image.open(io.BytesIO(make_thumbnail(photo, 50)))
    assert small.size == (50, 40)
    reference = photo.resize((50, 40), Image.Resampling.BICUBIC)
    assert np.abs(pixels(small) - pixels(reference)).mean() < 10
    assert photo.size == (100, 80)  # the original is left as it was


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resize": 200, "crop": 224}, "crop 224 is larger than resize 200"),
        ({"std": (1, 0, 1)}, "must be positive in every channel"),
        ({"interpolation": "nearest"}, "'bicubic' or 'bilinear'"),
        ({"centre": 224}, "Extra inputs are not permitted"),
    ],
)
def test_preprocessing_is_checked(values, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**values)


def test_pillow_s_own_limit_is_left_alone():
    """Another library in the process may rely on it."""
    assert Image.MAX_IMAGE_PIXELS is not None
    large = encoded(Image.new("L", (20_000, 10_000)), "PNG")  # above Pillow's limit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match="200,000,000 pixels, the limit max_pixels"):
            decode(large)
        assert decode(large, 200_000_000).size == (20_000, 10_000)


def test_threads_share_a_budget_of_pixels():
    budget, held, most = images._Budget(10), [], []

    def work(amount):
        with budget.hold(amount):
            held.append(amount)
            most.append(sum(held))
            time.sleep(0.01)
            held.remove(amount)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [4, 6, 3, 10, 25, 1, 9, 2] * 3))
    # One alone may be larger than the budget; none waits for ever.
    assert max(total for total in most if total != 25) <= 10
    assert held == [] and len(most) == 24


def test_a_budget_is_given_back_after_an_error():
    budget = images._Budget(10)
    with pytest.raises(KeyError), budget.hold(10):
        raise KeyError
    with budget.hold(10):
        pass


def test_passes_over_a_progressive_jpeg_are_limited():
    """Each scan is a pass over all pixels: a small file can take seconds."""
    file = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG", progressive=True)
    scans = file.count(b"\xff\xda")
    assert scans > 5
    assert decode(file, 64 * 64).size == (64, 64)
    scan = file[file.rindex(b"\xff\xda") : -2]
    with pytest.raises(BadImage, match=r"^too large: \d\d scans of 64 x 64 pixels"):
        decode(file[:-2] + scan * 80 + file[-2:], 64 * 64)


def test_photos_much_larger_than_needed_are_decoded_at_a_fraction(monkeypatch):
    sizes = []
    to_rgb = images._to_rgb
    monkeypatch.setattr(images, "_to_rgb", lambda image: sizes.append(image.size) or to_rgb(image))
    preprocessing = Preprocessing(resize=32, crop=32)
    gradient = Image.linear_gradient("L").resize((1024, 768)).convert("RGB")
    for side, decoded in ((1, (1024, 768)), (32, (128, 96)), (96, (256, 192)), (400, (1024, 768))):
        settings = preprocessing.model_copy(update={"resize": side, "crop": min(side, 32)})
        for format, size in (("JPEG", decoded), ("PNG", (1024, 768))):
            sizes.clear()
            prepare(encoded(gradient, format), settings)
            if side > 1:
                assert sizes == [size]
    # What an encoder sees is nearly the same.
    full = resize_and_crop(decode(encoded(gradient, "JPEG")), preprocessing).astype(int)
    drafted = prepare(encoded(gradient, "JPEG"), preprocessing).pixels.astype(int)
    assert np.abs(full - drafted).max() <= 4
