"""ImageFolder: the same picture in every format, and a clear error for every file that is no whole picture."""

import os
import pickle
import random
import struct
import subprocess
import sys
import tempfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from input_workers.contracts import ArraySpec, FetchRequest
from input_workers.errors import BadRows, ConfigError, SpecMismatch
from input_workers.sources import image_decode, image_folder
from input_workers.sources.image_folder import ImageFolder

cv2 = pytest.importorskip("cv2")

REPOSITORY = Path(image_folder.__file__).parents[2]
FORMATS = {
    "jpeg": (".jpg", []),
    "progressive": (".jpeg", [cv2.IMWRITE_JPEG_PROGRESSIVE, 1]),
    "restarts": (".JPG", [cv2.IMWRITE_JPEG_RST_INTERVAL, 2]),
    "png": (".png", []),
    "webp": (".webp", [cv2.IMWRITE_WEBP_QUALITY, 90]),
    "webp-lossless": (".WebP", [cv2.IMWRITE_WEBP_QUALITY, 101]),
    "bmp": (".bmp", []),
}
EXACT = ("png", "webp-lossless", "bmp")
every_format = pytest.mark.parametrize("kind", FORMATS)


def smooth(height, width, seed=0):
    """A picture without hard edges, which every format keeps nearly as it is."""
    few = np.random.default_rng(seed).integers(30, 226, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(few, (width, height), interpolation=cv2.INTER_CUBIC)


def encode(kind, picture):
    extension, parameters = FORMATS[kind]
    colours = {2: None, 3: cv2.COLOR_RGB2BGR}[picture.ndim]
    done, encoded = cv2.imencode(extension.lower(), picture if colours is None else cv2.cvtColor(picture, colours), parameters)
    assert done
    return encoded.tobytes()


def write(path, encoded):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded)


def get(source, *rows):
    rows = np.array(rows, np.int64)
    return source.fetch(rows, FetchRequest(0, 0, rows))


def one(tmp_path, encoded, name="x.jpg", **options):
    """Return the picture of a data set that is this one file."""
    write(tmp_path / "cat" / name, encoded)
    return get(ImageFolder(tmp_path, **options), 0)[0][0]


def get_or_report(source, name):
    """Return the pictures of row 0, or None where its file was refused with an error that names it."""
    try:
        images, labels = get(source, 0)
    except BadRows as error:
        named = name in str(error) and error.rows == (0,)
    else:
        assert (images.shape, images.dtype, labels.tolist()) == ((1, *source.image_size, 3), np.uint8, [0])
        return images
    assert named
    return None


def with_exif(jpeg, orientation, order="<"):
    tiff = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 1)
    tiff += struct.pack(order + "HHIHHI", 0x0112, 3, 1, orientation, 0, 0)
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff + jpeg[2:]


def turned(picture, orientation):
    """What EXIF says: rows and columns of the stored picture, put where they are to be seen."""
    if orientation >= 5:
        picture = picture.transpose(1, 0, 2)
    vertical, horizontal = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(orientation, (1, 1))
    return picture[::vertical, ::horizontal]


def png_chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_header(width, height):
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


BOMBS = {
    "png": png_header(50_000, 50_000) + png_chunk(b"IDAT", zlib.compress(bytes(100_000))) + png_chunk(b"IEND", b""),
    "jpeg": b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 8, 8, 50_000, 50_000, 0) + b"\xff\xda\0\x02\0\xff\xd9",
    "bmp": b"BM" + bytes(12) + struct.pack("<IiiHH", 40, 50_000, -50_000, 1, 24) + bytes(100),
    "webp-canvas": b"RIFF\x1e\0\0\0WEBPVP8X" + struct.pack("<II", 10, 0) + 2 * struct.pack("<I", 49_999)[:3],
    "webp-lossless": b"RIFF\x20\0\0\0WEBPVP8L" + struct.pack("<IBI", 20, 0x2F, 0x0FFFFFFF) + bytes(20),
    "webp-lossy": b"RIFF\x20\0\0\0WEBPVP8 " + struct.pack("<I", 20) + b"\0\0\0\x9d\x01\x2a\xff\xff\xff\xff" + bytes(20),
}

NOBODY = 65534  # a user with no rights of its own


class TestRowsAndLabels:
    def test_classes_are_sorted_and_rows_follow_class_then_path(self, tmp_path):
        for name in ("dog/b.jpg", "cat/z.jpg", "cat/a/9.jpg", "cat/a.jpg", "Zebra/1.jpg"):
            write(tmp_path / name, encode("jpeg", smooth(8, 8)))
        source = ImageFolder(tmp_path, (8, 8))
        assert source.class_names == ["Zebra", "cat", "dog"]
        assert source.files == ["Zebra/1.jpg", "cat/a.jpg", "cat/a/9.jpg", "cat/z.jpg", "dog/b.jpg"]
        assert len(source) == 5
        assert get(source, 4, 0, 2)[1].tolist() == [2, 0, 1]

    def test_a_batch_of_any_rows_holds_each_rows_own_picture_and_label(self, tmp_path):
        pictures = [smooth(12, 10, seed) for seed in range(6)]
        for number, picture in enumerate(pictures):
            write(tmp_path / f"c{number % 2}" / f"{number}.png", encode("png", picture))
        source = ImageFolder(tmp_path, (12, 10))
        order = [5, 0, 3, 3]
        images, labels = get(source, *order)
        assert images.dtype == np.uint8
        assert labels.dtype == np.int64
        for image, label, row in zip(images, labels, order, strict=True):
            name = source.files[row]
            assert (image == pictures[int(Path(name).stem)]).all()
            assert source.class_names[label] == name.split("/")[0]

    def test_no_rows_are_two_arrays_without_rows(self, tmp_path):
        write(tmp_path / "cat" / "x.png", encode("png", smooth(8, 8)))
        images, labels = get(ImageFolder(tmp_path))
        assert (images.shape, labels.shape) == ((0, 224, 224, 3), (0,))

    def test_the_specs_are_those_of_what_is_fetched(self, tmp_path):
        write(tmp_path / "cat" / "x.png", encode("png", smooth(8, 8)))
        source = ImageFolder(tmp_path, (6, 5))
        assert list(source.specs) == [ArraySpec(array.shape[1:], array.dtype) for array in get(source, 0)]

    def test_the_file_of_a_row_is_named(self, tmp_path):
        for name in ("cat/1.png", "dog/a/2.png"):
            write(tmp_path / name, encode("png", smooth(8, 8)))
        source = ImageFolder(tmp_path)
        assert [source.file_of(row) for row in (0, 1)] == [f"{source.path}/cat/1.png", f"{source.path}/dog/a/2.png"]
        for row in (-1, 2):
            with pytest.raises(IndexError, match=r"wanted 0\.\.1"):
                source.file_of(row)

    def test_an_empty_class_keeps_its_number(self, tmp_path):
        (tmp_path / "ant").mkdir()
        write(tmp_path / "cat" / "x.png", encode("png", smooth(8, 8)))
        source = ImageFolder(tmp_path)
        assert (source.class_names, source.labels.tolist()) == (["ant", "cat"], [1])

    def test_other_extensions_dot_names_and_files_outside_a_class_are_left_out(self, tmp_path):
        for name in ("cat/x.png", "cat/notes.txt", "cat/._x.png", "cat/.cache/y.png", ".git/z.png", "top.png"):
            write(tmp_path / name, encode("png", smooth(8, 8)))
        assert ImageFolder(tmp_path).files == ["cat/x.png"]

    @pytest.mark.parametrize("row", [-1, 2])
    def test_a_row_outside_the_data_set_is_an_error(self, tmp_path, row):
        for name in ("a", "b"):
            write(tmp_path / "cat" / f"{name}.png", encode("png", smooth(8, 8)))
        with pytest.raises(IndexError, match=r"wanted 0\.\.1"):
            get(ImageFolder(tmp_path), 0, row)

    def test_offered_memory_is_written_and_returned(self, tmp_path):
        picture = smooth(8, 8)
        write(tmp_path / "a" / "x.png", encode("png", picture))
        write(tmp_path / "b" / "x.png", encode("png", picture[::-1]))
        source = ImageFolder(tmp_path, (8, 8))
        request = FetchRequest(0, 0, np.array([1, 0]))
        request.out = [np.zeros((2, 8, 8, 3), np.uint8), np.full(2, -1, np.int64)]
        assert source.fetch(request.rows, request) is request.out
        assert (request.out[0] == [picture[::-1], picture]).all()
        assert request.out[1].tolist() == [1, 0]

    @pytest.mark.parametrize(
        "images",
        [
            np.zeros((1, 8, 8, 3), np.float32),
            np.zeros((2, 8, 8, 3), np.uint8),
            np.zeros((1, 8, 8, 6), np.uint8)[..., :3],
            np.frombuffer(bytes(192), np.uint8).reshape(1, 8, 8, 3),
        ],
        ids=["dtype", "rows", "strided", "read-only"],
    )
    def test_offered_memory_that_does_not_fit_is_refused(self, tmp_path, images):
        write(tmp_path / "a" / "x.png", encode("png", smooth(16, 16)))
        request = FetchRequest(0, 0, np.array([0]))
        request.out = [images, np.zeros(1, np.int64)]
        with pytest.raises(SpecMismatch, match=r"request\.out"):
            ImageFolder(tmp_path, (8, 8)).fetch(request.rows, request)

    def test_a_pickled_source_fetches_the_same(self, tmp_path):
        write(tmp_path / "cat" / "x.jpg", encode("jpeg", smooth(20, 20)))
        source = ImageFolder(tmp_path, (9, 7))
        again = pickle.loads(pickle.dumps(source))
        assert (get(again, 0)[0] == get(source, 0)[0]).all()

    def test_many_threads_get_the_same_bits_as_one(self, tmp_path):
        for number in range(8):
            write(tmp_path / "cat" / f"{number}.jpg", encode("jpeg", smooth(50, 60, number)))
        source = ImageFolder(tmp_path, (20, 20))
        alone = get(source, *range(8))[0]
        with ThreadPoolExecutor(4) as pool:
            for images, _ in pool.map(lambda _: get(source, *range(8)), range(20)):
                assert (images == alone).all()


class TestParameters:
    @pytest.mark.parametrize("image_size", [(0, 8), (8, -1), 8, (8,), (8, 8, 3), (8.5, 8), "ab", None])
    def test_a_wrong_image_size_is_refused(self, tmp_path, image_size):
        with pytest.raises(ConfigError, match=r"image_size: got .*; wanted \(height, width\)"):
            ImageFolder(tmp_path, image_size)

    @pytest.mark.parametrize("max_pixels", [0, -1, 1.5, None])
    def test_a_wrong_max_pixels_is_refused(self, tmp_path, max_pixels):
        with pytest.raises(ConfigError, match="max_pixels"):
            ImageFolder(tmp_path, max_pixels=max_pixels)

    @pytest.mark.parametrize("path", ["missing", "file", "nul\0", None, 3.5])
    def test_a_path_that_is_no_folder_is_refused(self, tmp_path, path):
        write(tmp_path / "file", b"")
        with pytest.raises(ConfigError, match="wanted an existing folder"):
            ImageFolder(tmp_path / path if isinstance(path, str) else path)

    def test_a_folder_without_classes_is_refused(self, tmp_path):
        write(tmp_path / "x.png", encode("png", smooth(8, 8)))
        with pytest.raises(ConfigError, match="has no sub-folder"):
            ImageFolder(tmp_path)

    def test_classes_without_an_image_are_refused(self, tmp_path):
        write(tmp_path / "cat" / "notes.txt", b"")
        with pytest.raises(ConfigError, match=r"hold no image; wanted files that end in \.jpg"):
            ImageFolder(tmp_path)

    def test_without_opencv_the_error_names_what_to_install(self, tmp_path, monkeypatch):
        image_decode.load_opencv.cache_clear()
        monkeypatch.setitem(sys.modules, "cv2", None)
        with pytest.raises(ConfigError, match=r"pip install input-workers\[images\]"):
            ImageFolder(tmp_path)

    def test_opencv_is_loaded_by_use_alone_and_then_has_one_thread(self, tmp_path):
        write(tmp_path / "cat" / "x.png", encode("png", smooth(8, 8)))
        check = (
            "import sys; from input_workers.sources.image_folder import ImageFolder; assert 'cv2' not in sys.modules;"
            f"ImageFolder({str(tmp_path)!r}); assert sys.modules['cv2'].getNumThreads() == 1"
        )
        subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, check=True)


class TestPictures:
    @every_format
    def test_every_format_gives_the_picture_in_rgb(self, tmp_path, kind):
        picture = np.zeros((32, 48, 3), np.uint8)
        picture[:, :16], picture[:, 16:32], picture[:, 32:] = (220, 30, 10), (20, 200, 40), (10, 60, 230)
        image = one(tmp_path, encode(kind, picture), "x" + FORMATS[kind][0], image_size=(32, 48))
        for column in (4, 24, 44):
            assert np.abs(image[:, column].astype(int) - picture[:, column]).max() <= (0 if kind in EXACT else 6)

    def test_the_content_decides_and_not_the_extension(self, tmp_path):
        picture = smooth(9, 9)
        assert (one(tmp_path, encode("png", picture), "x.jpg", image_size=(9, 9)) == picture).all()

    @every_format
    @pytest.mark.parametrize("size", [(20, 16), (7, 5), (60, 64), (10, 64)], ids=["same", "down", "up", "both"])
    def test_an_opencv_without_the_rgb_flag_gives_the_same_bits(self, tmp_path, monkeypatch, kind, size):
        encoded = encode(kind, smooth(20, 16))
        image = one(tmp_path, encoded, image_size=size)
        monkeypatch.delattr(cv2, "IMREAD_COLOR_RGB", raising=False)
        assert (one(tmp_path, encoded, image_size=size) == image).all()

    @every_format
    @pytest.mark.parametrize("size", [(12, 11), (40, 44)], ids=["down", "up"])
    def test_a_resized_picture_is_the_whole_picture_by_area_or_linear(self, tmp_path, kind, size):
        encoded = encode(kind, smooth(20, 21))
        whole = one(tmp_path, encoded, image_size=(20, 21))
        interpolation = cv2.INTER_AREA if size[0] < 20 else cv2.INTER_LINEAR
        assert (one(tmp_path, encoded, image_size=size) == cv2.resize(whole, size[::-1], interpolation=interpolation)).all()

    @pytest.mark.parametrize("kind", ["jpeg", "png", "bmp"])
    def test_grey_becomes_three_equal_channels(self, tmp_path, kind):
        grey = smooth(20, 20)[..., 0]
        image = one(tmp_path, encode(kind, grey), image_size=(20, 20))
        assert (image == image[..., :1]).all()
        assert np.abs(image[..., 0].astype(int) - grey).max() <= (0 if kind in EXACT else 6)

    @pytest.mark.parametrize("extension", [".png", ".webp", ".bmp"])
    def test_alpha_is_left_out(self, tmp_path, extension):
        picture = smooth(20, 20)
        alpha = np.full((20, 20, 1), 255, np.uint8)
        alpha[:10] = 130
        quality = [cv2.IMWRITE_WEBP_QUALITY, 101] if extension == ".webp" else []
        _, encoded = cv2.imencode(extension, np.dstack([picture[..., ::-1], alpha]), quality)
        assert (one(tmp_path, encoded.tobytes(), image_size=(20, 20)) == picture).all()

    @pytest.mark.parametrize("channels", [1, 3])
    def test_sixteen_bits_become_eight(self, tmp_path, channels):
        picture = smooth(20, 20)[..., :channels]
        _, encoded = cv2.imencode(".png", picture[..., ::-1].astype(np.uint16) * 257)
        assert (one(tmp_path, encoded.tobytes(), image_size=(20, 20)) == picture).all()

    def test_bmp_of_both_row_orders_and_of_the_old_header_is_read(self, tmp_path):
        picture = smooth(4, 4)  # 12 bytes a row: no padding
        rows = picture[..., ::-1].tobytes()
        head = b"BM" + struct.pack("<IHHI", 54 + 48, 0, 0, 54)
        down = head + struct.pack("<IiiHHIIiiII", 40, 4, -4, 1, 24, 0, 48, 0, 0, 0, 0) + rows
        up = head + struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 24, 0, 48, 0, 0, 0, 0) + picture[::-1, :, ::-1].tobytes()
        old = b"BM" + struct.pack("<IHHI", 26 + 48, 0, 0, 26) + struct.pack("<IHHHH", 12, 4, 4, 1, 24)
        old += picture[::-1, :, ::-1].tobytes()
        for number, encoded in enumerate((down, up, old)):
            assert (one(tmp_path / str(number), encoded, image_size=(4, 4)) == picture).all()

    def test_of_an_animated_png_the_still_picture_is_read_and_a_damaged_animation_is_harmless(self, tmp_path):
        picture = smooth(8, 8)
        encoded = encode("png", picture)
        frame = png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 8, 8, 0, 0, 1, 1, 0, 0))
        lost = png_chunk(b"fcTl", struct.pack(">IIIIIHHBB", 1, 8, 8, 0, 0, 1, 1, 0, 0))
        behind = png_chunk(b"fdAT", struct.pack(">I", 2) + zlib.compress(bytes(8 * 25)))
        animation = encoded[:33] + png_chunk(b"acTL", struct.pack(">II", 2, 0)) + frame + encoded[33:-12]
        assert image_decode.read_header(animation + encoded[-12:]).animated
        for number, end in enumerate((b"", behind, lost + behind, frame + behind * 3)):
            image = one(tmp_path / str(number), animation + end + encoded[-12:], image_size=(8, 8))
            assert (image == picture).all()

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("order", ["<", ">"])
    def test_exif_turns_the_picture(self, tmp_path, orientation, order):
        encoded = encode("jpeg", smooth(24, 40))
        expected = turned(one(tmp_path / "plain", encoded, image_size=(24, 40)), orientation)
        image = one(tmp_path / "exif", with_exif(encoded, orientation, order), image_size=expected.shape[:2])
        assert (image == expected).all()

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("size", [(60, 20), (20, 60), (40, 40)])
    def test_exif_and_reduced_decoding_go_together(self, tmp_path, orientation, size):
        encoded = encode("jpeg", smooth(120, 160))
        whole = turned(one(tmp_path / "plain", encoded, image_size=(120, 160)), orientation)
        image = one(tmp_path / "exif", with_exif(encoded, orientation), image_size=size)
        expected = cv2.resize(np.ascontiguousarray(whole), size[::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(image.astype(int) - expected).max() <= 6


class TestReducedDecoding:
    @pytest.mark.parametrize(
        ("kind", "stored", "size", "decoded"),
        [
            ("jpeg", (160, 240), (20, 30), (20, 30)),
            ("jpeg", (159, 240), (20, 30), (40, 60)),
            ("jpeg", (160, 239), (40, 59), (40, 60)),
            ("jpeg", (161, 240), (80, 120), (81, 120)),
            ("jpeg", (160, 240), (81, 20), (160, 240)),
            ("jpeg", (160, 240), (20, 121), (160, 240)),
            ("progressive", (160, 240), (80, 120), (80, 120)),
            ("png", (160, 240), (20, 30), (160, 240)),
            ("webp", (160, 240), (20, 30), (160, 240)),
        ],
    )
    def test_the_smallest_decode_that_is_no_smaller_than_wanted_is_used(
        self, tmp_path, monkeypatch, kind, stored, size, decoded
    ):
        shapes = []
        real = cv2.imdecode

        def imdecode(*arguments):
            picture = real(*arguments)
            shapes.append(picture.shape[:2])
            return picture

        monkeypatch.setattr(cv2, "imdecode", imdecode)
        one(tmp_path, encode(kind, smooth(*stored)), image_size=size)
        assert shapes == [decoded]

    def test_a_picture_that_exif_turns_is_never_decoded_smaller_than_wanted(self, tmp_path, monkeypatch):
        encoded = with_exif(encode("jpeg", smooth(100, 200)), 6)  # is seen as 200 high, 100 wide
        shapes = []
        real = cv2.imdecode
        monkeypatch.setattr(cv2, "imdecode", lambda *given: shapes.append(real(*given).shape[:2]) or real(*given))
        one(tmp_path, encoded, image_size=(50, 100))
        one(tmp_path, encoded, image_size=(50, 50))
        assert shapes == [(200, 100), (100, 50)]

    @pytest.mark.parametrize("kind", ["jpeg", "progressive"])
    @pytest.mark.parametrize("factor", [2, 4, 8])
    def test_it_is_close_to_the_full_decode(self, tmp_path, kind, factor):
        encoded = encode(kind, smooth(320, 400))
        whole = one(tmp_path, encoded, image_size=(320, 400))
        size = (320 // factor, 400 // factor)
        image = one(tmp_path, encoded, image_size=size)
        assert np.abs(image.astype(int) - cv2.resize(whole, size[::-1], interpolation=cv2.INTER_AREA)).max() <= 4


class TestDamagedFiles:
    @every_format
    @pytest.mark.parametrize("size", [(12, 16), (5, 7)], ids=["whole", "reduced"])
    def test_a_truncated_file_is_an_error_at_every_length(self, tmp_path, kind, size):
        encoded = encode(kind, smooth(12, 16))
        path = tmp_path / "cat" / "cut.jpg"
        write(path, encoded)
        source = ImageFolder(tmp_path, size)
        whole = get(source, 0)[0]
        for length in range(len(encoded)):
            path.write_bytes(encoded[:length])
            images = get_or_report(source, "cut.jpg")
            assert images is None or (images == whole).all(), length

    @pytest.mark.parametrize("kind", ["jpeg", "progressive", "restarts", "png"])
    def test_a_file_whose_end_was_never_filled_in_is_an_error(self, tmp_path, kind):
        encoded = encode(kind, smooth(12, 16))
        path = tmp_path / "cat" / "cut.jpg"
        write(path, encoded)
        source = ImageFolder(tmp_path, (12, 16))
        whole = get(source, 0)[0]
        for length in range(len(encoded)):
            path.write_bytes(encoded[:length].ljust(len(encoded), b"\0"))
            images = get_or_report(source, "cut.jpg")
            assert images is None or (images == whole).all(), length

    @pytest.mark.parametrize("kind", ["jpeg", "progressive"])
    def test_the_end_of_a_thumbnail_does_not_pass_for_the_end_of_the_picture(self, tmp_path, kind):
        encoded = encode(kind, smooth(12, 16))
        thumbnail = encode("jpeg", smooth(8, 8))
        encoded = encoded[:2] + b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail + encoded[2:]
        assert one(tmp_path, encoded, image_size=(12, 16)).any()
        for cut in (2, 30, 100):
            with pytest.raises(BadRows, match="without an end marker"):
                one(tmp_path, encoded[:-cut].ljust(len(encoded), b"\0"))

    def test_bytes_after_the_end_of_a_jpeg_do_not_matter(self, tmp_path):
        encoded = encode("jpeg", smooth(12, 16))
        whole = one(tmp_path, encoded)
        assert (one(tmp_path, encoded + bytes(100) + b"more") == whole).all()

    @every_format
    def test_altered_bytes_give_a_picture_or_an_error_and_never_a_crash(self, tmp_path, kind):
        rng = random.Random(kind)
        seeds = [encode(kind, smooth(side, 30 - side, side)) for side in (9, 20)]
        path = tmp_path / "cat" / "altered.jpg"
        write(path, seeds[0])
        source = ImageFolder(tmp_path, (12, 16), max_pixels=1_000_000)
        bad = 0
        for _ in range(100):
            altered = bytearray(rng.choice(seeds))
            for _ in range(rng.choice((1, 1, 2, 8))):
                start = rng.randrange(len(altered))
                altered[start : start + rng.choice((0, 1, 1, 4))] = rng.randbytes(rng.choice((0, 1, 1, 4)))
            path.write_bytes(altered)
            bad += get_or_report(source, "altered.jpg") is None
        assert bad, "no alteration was noticed: the test would pass without looking"

    @pytest.mark.parametrize(
        "content",
        [
            b"just some text",
            b"\0",
            b"\xff\xd8\xff",
            b"\xff\xd8" + b"\xff" * 1000,
            b"\xff\xd8\xff\xda\0\x02\xff\xd9",
            b"\xff\xd8" + b"\xff\xe0\0\0" * 20_000,
            b"RIFF\0\0\0\0WEBP",
            b"RIFF\0\0\0\0WAVEfmt ",
            b"BM",
            b"\x89PNG\r\n\x1a\n",
            png_header(0, 5),
            b"GIF89a\x01\0\x01\0\0\0\0;",
            b"II*\0\x08\0\0\0",
        ],
    )
    def test_foreign_content_is_an_error_that_names_the_file(self, tmp_path, content):
        with pytest.raises(BadRows, match=r"row 0: '.*notes\.jpg' .*wanted") as caught:
            one(tmp_path, content, "notes.jpg")
        assert isinstance(caught.value.__cause__, ValueError)

    def test_a_jpeg_of_nothing_but_segments_is_given_up(self, tmp_path):
        with pytest.raises(BadRows, match="more than 10000 segments"):
            one(tmp_path, b"\xff\xd8" + b"\xff\xe0\0\2" * 10_001)

    def test_an_emptied_file_is_an_error(self, tmp_path):
        with pytest.raises(BadRows, match=r"x\.jpg' is empty; wanted"):
            one(tmp_path, b"")

    def test_one_error_names_every_bad_row_of_the_request(self, tmp_path):
        for number in range(5):
            write(tmp_path / "cat" / f"{number}.png", b"text" if number in (1, 4) else encode("png", smooth(8, 8)))
        with pytest.raises(
            BadRows, match=r"row 4: .*4\.png.*begins with b'text'.*1 more rows.*Replace or remove the file"
        ) as caught:
            get(ImageFolder(tmp_path), 0, 4, 2, 1)
        assert caught.value.rows == (4, 1)


class TestTooLarge:
    @pytest.mark.parametrize("kind", BOMBS)
    def test_a_header_that_announces_too_many_pixels_is_refused(self, tmp_path, kind):
        with pytest.raises(BadRows, match=r"pixels; wanted at most max_pixels=178000000 \(raise it"):
            one(tmp_path, BOMBS[kind])

    @every_format
    def test_the_bound_is_exact(self, tmp_path, kind):
        encoded = encode(kind, smooth(20, 30))
        assert one(tmp_path, encoded, max_pixels=600).any()
        with pytest.raises(BadRows, match=r"30 x 20 = 600 pixels; wanted at most max_pixels=599"):
            one(tmp_path, encoded, max_pixels=599)

    def test_the_size_of_a_webp_with_alpha_is_read(self, tmp_path):
        _, encoded = cv2.imencode(".webp", np.dstack([smooth(20, 30), smooth(20, 30)[..., :1]]), [cv2.IMWRITE_WEBP_QUALITY, 80])
        assert encoded.tobytes()[12:16] == b"VP8X"
        assert image_decode.read_header(encoded.tobytes())[:3] == ("WebP", 30, 20)

    def test_a_bomb_costs_no_memory(self, tmp_path):
        write(tmp_path / "cat" / "bomb.png", BOMBS["png"])
        write(tmp_path / "cat" / "chunk.png", png_header(8, 8) + b"\xff\xff\xff\xf0IDAT" + bytes(100))
        write(tmp_path / "cat" / "end.png", png_header(8, 8) + b"\xff\xff\xff\xf0IEND" + bytes(100))
        write(tmp_path / "cat" / "sparse.bmp", b"BM")
        os.truncate(tmp_path / "cat" / "sparse.bmp", 10**11)
        check = f"""
import resource
import numpy as np
from input_workers.contracts import FetchRequest
from input_workers.errors import BadRows
from input_workers.sources.image_folder import ImageFolder

source = ImageFolder({str(tmp_path)!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    source.fetch(np.arange(4), FetchRequest(0, 0, np.arange(4)))
except BadRows as error:
    assert error.rows == (0, 1, 2, 3), error.rows
else:
    raise AssertionError("was not refused")
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 50 * 1024, f"{{grown}} KiB"
"""
        subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, check=True)


class TestOddFiles:
    @pytest.fixture
    def source(self, tmp_path):
        write(tmp_path / "set" / "cat" / "x.png", encode("png", smooth(8, 8)))
        return ImageFolder(tmp_path / "set", (8, 8))

    def test_a_vanished_file_is_an_error(self, source):
        os.remove(f"{source.path}/cat/x.png")
        with pytest.raises(BadRows, match=r"x\.png' cannot be read: No such file or directory") as caught:
            get(source, 0)
        assert isinstance(caught.value.__cause__, FileNotFoundError)

    def test_a_fifo_is_an_error_and_never_waited_for(self, source):
        path = f"{source.path}/cat/x.png"
        os.remove(path)
        os.mkfifo(path)
        errors = []

        def fetch():
            try:
                get(source, 0)
            except BadRows as error:
                errors.append(str(error))

        thread = threading.Thread(target=fetch, daemon=True)
        thread.start()
        thread.join(10)
        waits = thread.is_alive()
        if waits:  # let it go, then fail
            os.close(os.open(path, os.O_RDWR))
            thread.join(10)
        assert not waits
        assert len(errors) == 1
        assert "is a FIFO; wanted a regular file" in errors[0]

    def test_a_folder_in_a_files_place_is_an_error(self, source):
        os.remove(f"{source.path}/cat/x.png")
        os.mkdir(f"{source.path}/cat/x.png")
        with pytest.raises(BadRows, match="is a folder; wanted a regular file"):
            get(source, 0)

    def test_a_folder_with_the_name_of_an_image_is_a_row_that_cannot_be_read(self, source):
        os.mkdir(f"{source.path}/cat/y.jpg")
        again = ImageFolder(source.path)
        assert again.files == ["cat/x.png", "cat/y.jpg"]
        with pytest.raises(BadRows, match=r"y\.jpg' is a folder"):
            get(again, 1)

    def test_a_file_without_permission_is_an_error(self):
        with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which only its owner may enter
            os.chmod(folder, 0o755)
            file = Path(folder) / "cat" / "x.png"
            write(file, encode("png", smooth(8, 8)))
            source = ImageFolder(folder, (8, 8))
            get(source, 0)
            file.chmod(0)
            user = os.geteuid()
            if user == 0:
                os.seteuid(NOBODY)  # root may read everything
            try:
                with pytest.raises(BadRows, match="cannot be read: Permission denied"):
                    get(source, 0)
            finally:
                os.seteuid(user)

    def test_a_link_to_a_file_inside_is_followed(self, source):
        os.symlink("../cat/x.png", f"{source.path}/cat/a.png")
        images = get(ImageFolder(source.path, (8, 8)), 0, 1)[0]
        assert (images[0] == images[1]).all()

    @pytest.mark.parametrize("target", ["../../outside.png", "/dev/zero", "../../set-2/x.png"])
    def test_a_link_that_leads_outside_is_refused(self, tmp_path, source, target):
        write(tmp_path / "outside.png", encode("png", smooth(8, 8)))
        write(tmp_path / "set-2" / "x.png", encode("png", smooth(8, 8)))
        os.symlink(target, f"{source.path}/cat/y.png")
        with pytest.raises(BadRows, match=r"is a symbolic link to .*, outside the folder"):
            get(ImageFolder(source.path), 1)

    @pytest.mark.parametrize(("target", "text"), [("y.png", "symbolic links"), ("missing", "No such file")])
    def test_a_link_that_leads_nowhere_is_an_error(self, source, target, text):
        os.symlink(target, f"{source.path}/cat/y.png")
        with pytest.raises(BadRows, match=rf"y\.png' cannot be read: .*{text}"):
            get(ImageFolder(source.path), 1)

    @pytest.mark.parametrize("place", ["loop", "cat/loop"])
    @pytest.mark.parametrize("target", [".", "..", "/"])
    def test_a_link_to_a_folder_is_refused_before_anything_is_read(self, source, place, target):
        os.symlink(target, f"{source.path}/{place}")
        with pytest.raises(ConfigError, match="loop' is a symbolic link to a folder"):
            ImageFolder(source.path)

    def test_the_folder_itself_may_be_a_link(self, tmp_path, source):
        os.symlink(source.path, tmp_path / "link")
        assert ImageFolder(tmp_path / "link").path == source.path

    @pytest.mark.parametrize(
        "name", [b"two words.png", "größe-猫.png".encode(), b"\xff\xfe.png", b"line\nbreak.png", b"%s{0}'\".png"]
    )
    def test_odd_names_are_read_and_reported(self, source, name):
        path = os.fsencode(source.path) + b"/cat/" + name
        os.rename(os.fsencode(source.path) + b"/cat/x.png", path)
        again = ImageFolder(source.path, (8, 8))
        assert (get(again, 0)[0][0] == smooth(8, 8)).all()
        os.truncate(path, 0)
        with pytest.raises(BadRows, match="is empty") as caught:
            get(again, 0)
        str(caught.value).encode()  # no lone surrogate, which a log could not write
        assert "\n" not in str(caught.value)

    def test_a_file_handed_over_in_pieces_is_read_whole(self, source, monkeypatch):
        whole = get(source, 0)[0]
        real = os.read
        monkeypatch.setattr(os, "read", lambda descriptor, size: real(descriptor, min(size, 10)))
        assert (get(source, 0)[0] == whole).all()

    def test_a_file_that_shrinks_while_it_is_read_is_an_error(self, source, monkeypatch):
        real = os.read

        def read(descriptor, size):
            os.truncate(f"{source.path}/cat/x.png", 20)
            return real(descriptor, size)

        monkeypatch.setattr(os, "read", read)
        with pytest.raises(BadRows, match=r"shrank from .* to 20 bytes"):
            get(source, 0)

    def test_no_file_stays_open(self, source):
        before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        write(Path(source.path) / "cat" / "y.png", b"text")
        os.mkfifo(f"{source.path}/cat/z.png")
        again = ImageFolder(source.path)
        for _ in range(20):
            with pytest.raises(BadRows):
                get(again, 0, 1, 2)
        assert (len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0) == before
