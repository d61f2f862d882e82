"""From encoded bytes to the pixels an encoder sees.

Decoding and resizing are Pillow's: both run outside Python's lock, so a thread pool
decodes in parallel. What the bytes say counts, not a file's name: a PNG called
``.jpg`` is decoded as PNG.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from typing import IO, Annotated, Literal, NamedTuple

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)
from pydantic import BaseModel, ConfigDict, Field, model_validator

# An explicit list: Pillow knows formats whose decoders start other programs. They are opened
# without Image.open, which has a limit of pixels of its own for the whole process.
_OPENERS: dict[str, tuple[tuple[bytes, ...], Callable[[IO[bytes]], Image.Image]]] = {
    "JPEG": ((b"\xff\xd8\xff",), JpegImagePlugin.jpeg_factory),
    "PNG": ((b"\x89PNG\r\n\x1a\n",), PngImagePlugin.PngImageFile),
    "WEBP": ((b"RIFF",), WebPImagePlugin.WebPImageFile),
    "GIF": ((b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile),
    "BMP": ((b"BM",), BmpImagePlugin.BmpImageFile),
}
FORMATS = tuple(_OPENERS)

DEFAULT_MAX_PIXELS = 100_000_000

# Of a progressive JPEG every scan is a pass over all pixels. Encoders write about ten.
_SCANS_OF_MAX_PIXELS = 10

_MARGIN = 2  # how much larger than needed a JPEG is decoded before it is resized

Channel = Annotated[tuple[float, float, float], Field(description="red, green, blue")]


class BadImage(Exception):
    """The bytes are not a usable image; the text says why, for the quarantine table."""


class Preprocessing(BaseModel):
    """How an encoder wants its pixels; part of the encoder's fingerprint.

    The shorter side is resized to ``resize`` (antialiased), the centre is cropped to
    ``crop`` x ``crop``, and values become (pixel / 255 - mean) / std.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize: int = Field(256, ge=1, le=4096)
    crop: int = Field(224, ge=1, le=4096)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: Channel = (0.0, 0.0, 0.0)
    std: Channel = (1.0, 1.0, 1.0)

    @model_validator(mode="after")
    def _check(self) -> Preprocessing:
        if self.crop > self.resize:
            raise ValueError(
                f"crop {self.crop} is larger than resize {self.resize}: the crop is taken from "
                "the resized image; raise resize or lower crop"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std {self.std} must be positive in every channel")
        return self


class PreparedImage(NamedTuple):
    """pixels: (crop, crop, 3) uint8 RGB. thumbnail: JPEG bytes, or None."""

    pixels: np.ndarray
    thumbnail: bytes | None


def prepare(
    data: bytes,
    preprocessing: Preprocessing,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    thumbnail_pixels: int = 0,
) -> PreparedImage:
    """Decodes, resizes and crops one image; makes a thumbnail if asked for.

    A JPEG of which much more than that is stored is decoded at half, a quarter or an eighth
    of its size, at least twice as large as needed. All threads together decode images of at
    most DECODED_PIXELS pixels at a time, or a single larger one. Raises BadImage when the
    bytes are not an image, have more than ``max_pixels``, or take too many passes to decode.
    """
    needed = _MARGIN * max(preprocessing.resize, thumbnail_pixels)
    with _opened(data, max_pixels) as image:
        image = _decoded(image, needed)
        thumbnail = make_thumbnail(image, thumbnail_pixels) if thumbnail_pixels else None
        return PreparedImage(resize_and_crop(image, preprocessing), thumbnail)


def decode(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """The first frame as an upright RGB image.

    EXIF orientation is applied, transparency is laid on white, 16-bit greyscale keeps
    its upper eight bits, CMYK and palettes are converted. Raises BadImage.
    """
    with _opened(data, max_pixels) as image:
        return _decoded(image, None)


DECODED_PIXELS = DEFAULT_MAX_PIXELS


class _Budget:
    """Lets threads pass while what they hold together is within a limit, or one alone."""

    def __init__(self, limit: int):
        self._limit, self._held = limit, 0
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + amount <= self._limit)
            self._held += amount
        try:
            yield
        finally:
            with self._changed:
                self._held -= amount
                self._changed.notify_all()


_budget = _Budget(DECODED_PIXELS)


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose pixels are not decoded yet, with leave to decode them in the block."""
    if not data:
        raise BadImage("the file is empty (0 bytes)")
    known = [name for name, (beginnings, _) in _OPENERS.items() if data.startswith(beginnings)]
    if not known:
        raise BadImage(_unrecognised(data))
    try:
        image = _OPENERS[known[0]][1](io.BytesIO(data))
    except Image.DecompressionBombError as error:  # a frame larger than the image
        raise BadImage(f"too large: {_short(error)}") from error
    except Exception as error:  # decoders of untrusted bytes raise anything
        raise BadImage(_unrecognised(data)) from error
    width, height = image.size
    pixels = width * height
    if pixels > max_pixels:
        raise BadImage(
            f"too large: {width} x {height} is {pixels:,} pixels, the limit max_pixels "
            f"is {max_pixels:,}"
        )
    scans = data.count(b"\xff\xda") if known == ["JPEG"] else 1
    if scans * pixels > _SCANS_OF_MAX_PIXELS * max_pixels:
        raise BadImage(
            f"too large: {scans} scans of {width} x {height} pixels, the limit is "
            f"{_SCANS_OF_MAX_PIXELS} scans of max_pixels"
        )
    with _budget.hold(pixels):
        yield image


def _decoded(image: Image.Image, needed: int | None) -> Image.Image:
    """The decoded image; needed: pixels of the shorter side that do, None for all."""
    try:
        if needed is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            width, height = image.size
            shorter = min(width, height)
            image.draft(None, (width * needed // shorter, height * needed // shorter))
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF does not damage the picture
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except Exception as error:
        raise BadImage(f"damaged {image.format or 'image'}: {_short(error)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):
        # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
        values = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return Image.fromarray(values.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """(crop, crop, 3) uint8: the centre of the image with its shorter side at ``resize``.

    Only the part of the image that the crop shows is resampled: a panorama of extreme
    proportions would otherwise grow to gigabytes on its way to a small square.
    """
    width, height = image.size
    shorter = min(width, height)
    resized = tuple(preprocessing.resize * side // shorter for side in (width, height))
    crop = preprocessing.crop
    left, top = (round((side - crop) / 2) for side in resized)
    scale_x, scale_y = width / resized[0], height / resized[1]
    box = (
        left * scale_x,
        top * scale_y,
        min((left + crop) * scale_x, width),
        min((top + crop) * scale_y, height),
    )
    method = Image.Resampling[preprocessing.interpolation.upper()]
    return np.asarray(image.resize((crop, crop), method, box=box))


def make_thumbnail(image: Image.Image, pixels: int) -> bytes:
    """JPEG bytes of the whole image, its longer side at most ``pixels``."""
    small = image.copy()
    small.thumbnail((pixels, pixels), Image.Resampling.BICUBIC, reducing_gap=2.0)
    with io.BytesIO() as file:
        small.save(file, "JPEG", quality=80)
        return file.getvalue()


def _unrecognised(data: bytes) -> str:
    known = ", ".join(FORMATS)
    head = data[:512]
    if head.lstrip()[:1] in (b"<", b"{", b"[") or _is_text(head):
        return f"not an image: the content is text, not one of {known}"
    if not any(data):
        return f"not an image: {len(data):,} zero bytes"
    return f"not a readable image: the header is none of {known}, or is damaged"


def _is_text(head: bytes) -> bool:
    try:  # the head may end within a character
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character.isspace() for character in text)


def _short(error: Exception) -> str:
    text = str(error).splitlines()[0][:200] if str(error) else ""
    return text or type(error).__name__
