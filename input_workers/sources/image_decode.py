"""Bytes of an image file in, an RGB picture of the wanted size out, written straight into a row of a chunk.

The header is read here, before OpenCV sees the bytes: it decides whether the picture is small enough to decode at all,
and whether a JPEG may be decoded at a half, a quarter or an eighth of its size.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from input_workers.checks import check_whole
from input_workers.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Header", "check_image_size", "decode_into", "load_opencv", "read_header"]

JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..15; the three are DHT, JPG and DAC
# The next marker that has a length after it: not a fill byte, stuffing, TEM, RST0..7 or SOI. What lies between segments
# is skipped, as libjpeg does.
JPEG_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)
MAX_JPEG_SEGMENTS = 10_000  # before the first scan; real files have some ten, or some hundred with a large colour profile
PNG_ANIMATION_CHUNKS = frozenset({b"acTL", b"fcTL", b"fdAT"})


class Header(NamedTuple):
    """What an image file says about itself.

    Attributes:
        kind: JPEG, PNG, WebP or BMP, by content.
        width: pixels, as stored.
        height: pixels, as stored.
        may_turn: a JPEG with EXIF, which may swap width and height.
        animated: a PNG with chunks of an animation.
    """

    kind: str
    width: int
    height: int
    may_turn: bool = False
    animated: bool = False


def check_image_size(owner: str, image_size: Sequence[int], max_pixels: int) -> tuple[int, int]:
    """Return (height, width) of two parameters that every source of images has.

    Raises:
        ConfigError: `image_size` is not two whole numbers of at least 1, or `max_pixels` not one.
    """
    try:
        height, width = (operator.index(side) for side in image_size)
    except (TypeError, ValueError):
        height = width = 0
    if height < 1 or width < 1:
        raise ConfigError(f"{owner}: image_size: got {image_size!r}; wanted (height, width), both at least 1")
    check_whole(f"{owner}: max_pixels", max_pixels, 1)
    return height, width


@functools.cache
def load_opencv() -> Any:
    """Return the module `cv2`, imported at the first call.

    Raises:
        ConfigError: OpenCV is not installed, or cannot be loaded here.
    """
    try:
        import cv2
    except ImportError as error:
        raise ConfigError(
            f"images: OpenCV (cv2) cannot be imported ({error}); wanted it: pip install input-workers[images]"
        ) from error
    # Of the whole process. The fetchers are the parallel part; a second level of threads below each of them would only
    # compete for the same cores, and a pool that OpenCV started would not survive a fork.
    cv2.setNumThreads(1)
    return cv2


def decode_into(row: NDArray[np.uint8], encoded: bytes, max_pixels: int) -> None:
    """Decode a JPEG, PNG, WebP or BMP file, turn it as its EXIF tells, resize it to `row` and write it there.

    Alpha is left out, greyscale is repeated in the three channels, 16 bits per channel become 8. Of an animation it is
    the first or the still picture. Thread-safe; OpenCV releases the GIL meanwhile.

    Args:
        row: uint8 (height, width, 3), C-contiguous and writeable: the picture in RGB.
        encoded: the whole file.
        max_pixels: refuse a picture whose header announces more, before any of it is decoded.

    Raises:
        ValueError: the file is empty, foreign, truncated, damaged or too large; the text says which and what to do.
    """
    cv2 = load_opencv()
    kind, width, height, may_turn, animated = read_header(encoded)
    if width * height > max_pixels:
        raise ValueError(
            f"is a {kind} of {width} x {height} = {width * height} pixels; wanted at most max_pixels={max_pixels} "
            "(raise it if the picture is genuine)"
        )
    wanted_height, wanted_width = row.shape[:2]
    # The RGB flag, which older OpenCV lacks, excludes IMREAD_COLOR, which is part of every IMREAD_REDUCED_COLOR_n: the
    # scale is taken from the grey flags, which hold nothing else.
    rgb_flag = getattr(cv2, "IMREAD_COLOR_RGB", None)
    flags = cv2.IMREAD_COLOR if rgb_flag is None else rgb_flag
    if kind == "JPEG":
        times = min(width // wanted_width, height // wanted_height)
        if may_turn:  # OpenCV may swap the sides: what is left must be large enough either way
            times = min(times, height // wanted_width, width // wanted_height)
        if times >= 8:
            flags |= cv2.IMREAD_REDUCED_GRAYSCALE_8
        elif times >= 4:
            flags |= cv2.IMREAD_REDUCED_GRAYSCALE_4
        elif times >= 2:
            flags |= cv2.IMREAD_REDUCED_GRAYSCALE_2
    if animated:
        encoded = _still_png(encoded)
    try:
        picture = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
        if picture is None:
            raise ValueError(f"is a damaged {kind}, truncated or altered; wanted the whole file as it was written")
        got_height, got_width = picture.shape[:2]
        if (got_height, got_width) == (wanted_height, wanted_width):
            if rgb_flag is None:
                cv2.cvtColor(picture, cv2.COLOR_BGR2RGB, dst=row)
            else:
                row[...] = picture
            return
        shrinks = got_height >= wanted_height and got_width >= wanted_width
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        cv2.resize(picture, (wanted_width, wanted_height), dst=row, interpolation=interpolation)
        if rgb_flag is None:
            cv2.cvtColor(row, cv2.COLOR_BGR2RGB, dst=row)
    except cv2.error as error:
        raise ValueError(f"is a {kind} that OpenCV cannot decode ({error}); wanted an undamaged file") from error


def read_header(encoded: bytes) -> Header:
    """Return what the file's header announces; nothing is decoded. The content decides, not the file's name.

    Raises:
        ValueError: no JPEG, PNG, WebP or BMP; a header without a size; a JPEG or PNG without its end.
    """
    may_turn = animated = False
    if encoded.startswith(b"\xff\xd8\xff"):
        kind = "JPEG"
        width, height, may_turn = _jpeg_size(encoded)
    elif encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        kind = "PNG"
        width, height, animated = _png_size(encoded)
    elif encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        kind = "WebP"
        width, height = _webp_size(encoded)
    elif encoded.startswith(b"BM"):
        kind = "BMP"
        if encoded[14:18] == b"\x0c\0\0\0":  # the OS/2 header has two bytes a side
            width, height = int.from_bytes(encoded[18:20], "little"), int.from_bytes(encoded[20:22], "little")
        else:  # a negative height says that the rows run from top to bottom
            width = int.from_bytes(encoded[18:22], "little", signed=True)
            height = abs(int.from_bytes(encoded[22:26], "little", signed=True))
    elif encoded:
        raise ValueError(f"begins with {encoded[:8]!r}; wanted a JPEG, PNG, WebP or BMP file")
    else:
        raise ValueError("is empty; wanted a JPEG, PNG, WebP or BMP file")
    if width <= 0 or height <= 0:
        raise ValueError(f"is a {kind} of {width} x {height} pixels by its header; wanted at least 1 x 1")
    return Header(kind, width, height, may_turn, animated)


def _jpeg_size(encoded: bytes) -> tuple[int, int, bool]:
    """Walk the segments up to the first scan and see that the picture's end marker follows it."""
    width = height = 0
    may_turn = False
    at = 2
    for _ in range(MAX_JPEG_SEGMENTS):
        found = JPEG_MARKER.search(encoded, at)
        if found is None:
            raise ValueError("is a JPEG that ends in its header, truncated; wanted the whole file as it was written")
        at = found.end()
        marker = encoded[at - 1]
        if marker == 0xDA:  # SOS: compressed data from here on, in which the end marker cannot occur by chance
            if encoded.rfind(b"\xff\xd9", at) < 0:
                # Older OpenCV fills what is missing with grey; all of them do so where zeros take its place.
                raise ValueError("is a JPEG without an end marker, truncated; wanted the whole file as it was written")
            return width, height, may_turn
        if marker in JPEG_SIZE_MARKERS and not width:
            height = int.from_bytes(encoded[at + 3 : at + 5], "big")
            width = int.from_bytes(encoded[at + 5 : at + 7], "big")
        elif marker == 0xE1 and encoded[at + 2 : at + 6] == b"Exif":
            may_turn = True
        at += max(2, int.from_bytes(encoded[at : at + 2], "big"))
    raise ValueError(f"is a JPEG with more than {MAX_JPEG_SEGMENTS} segments before its picture; wanted an undamaged file")


def _png_size(encoded: bytes) -> tuple[int, int, bool]:
    """Read IHDR, see that every chunk up to IEND lies within the file, and look for chunks of an animation."""
    if encoded[12:16] != b"IHDR":
        raise ValueError("is a damaged PNG, its first chunk is not IHDR; wanted the whole file as it was written")
    # Newer OpenCV allocates what a chunk says it holds, up to 4 GiB, before it looks whether the file has so much.
    animated = False
    at = 8
    while at < len(encoded):
        name = encoded[at + 4 : at + 8]
        at += 12 + int.from_bytes(encoded[at : at + 4], "big")
        if name in PNG_ANIMATION_CHUNKS:
            animated = True
        elif name == b"IEND" and at <= len(encoded):
            return int.from_bytes(encoded[16:20], "big"), int.from_bytes(encoded[20:24], "big"), animated
    raise ValueError("is a PNG that ends within a chunk, truncated; wanted the whole file as it was written")


def _still_png(encoded: bytes) -> bytes:
    """Leave out the animation of a PNG that `_png_size` walked: damaged ones crash OpenCV 4.12 and 5.0."""
    parts = [encoded[:8]]
    at = 8
    while at < len(encoded):
        name = encoded[at + 4 : at + 8]
        start, at = at, at + 12 + int.from_bytes(encoded[at : at + 4], "big")
        if name not in PNG_ANIMATION_CHUNKS:
            parts.append(encoded[start:at])
        if name == b"IEND":
            break
    return b"".join(parts)


def _webp_size(encoded: bytes) -> tuple[int, int]:
    """Read the first chunk: a lossy picture, a lossless one, or the canvas of the extended format."""
    chunk = encoded[12:16]
    if chunk == b"VP8X":
        return 1 + int.from_bytes(encoded[24:27], "little"), 1 + int.from_bytes(encoded[27:30], "little")
    if chunk == b"VP8L":
        sides = int.from_bytes(encoded[21:25], "little")  # 14 bits each, less one
        return 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
    if chunk == b"VP8 ":  # the two upper bits of each side are a hint for scaling
        return int.from_bytes(encoded[26:28], "little") & 0x3FFF, int.from_bytes(encoded[28:30], "little") & 0x3FFF
    raise ValueError(f"is a WebP whose first chunk is {chunk!r}; wanted VP8, VP8L or VP8X")
