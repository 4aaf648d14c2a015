"""TarShards: real archives of real pictures; every row from its own place, and a clear error for one that is not whole."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from gates import HANG_SECONDS
from sources.sized_source import check_every_row_comes_once, fetch

import input_workers as iw
from input_workers.sources import TarShards, files, image_decode, tar_shards

REPOSITORY = Path(iw.__file__).parents[1]


def picture(number: int, height: int = 12, width: int = 10) -> np.ndarray:
    few = np.random.default_rng(number).integers(30, 226, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(few, (width, height), interpolation=cv2.INTER_CUBIC)


def encoded(number: int, extension: str = ".jpg") -> bytes:
    done, content = cv2.imencode(extension, cv2.cvtColor(picture(number), cv2.COLOR_RGB2BGR))
    assert done
    return content.tobytes()


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def write(path: Path, members: Any, format: int = tarfile.PAX_FORMAT) -> Path:  # noqa: A002
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in dict(members).items() if isinstance(members, dict) else members:
            if isinstance(content, bytes):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            else:  # a kind of member and where it leads
                info = tarfile.TarInfo(name)
                info.type, info.linkname = content
                archive.addfile(info)
    return path


def numbers(path: Path, *values: int) -> Path:
    return write(path, {f"{value}.cls": str(value).encode() for value in values})


def descriptors(path: Path) -> int:
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:  # the one that lists the folder
            pass
    return sum(link.startswith(str(path)) for link in links)


class TestRows:
    def test_members_with_one_key_are_a_row_wherever_they_stand(self, tmp_path: Path) -> None:
        first = write(
            tmp_path / "a.tar",
            {"x/1.png": encoded(1, ".png"), "x/2.json": b"{}", "2.cls": b"2", "x/1.cls": b" 11\n", "x/2.cls": b"-12",
             "2.png": encoded(2, ".png"), "x/2.PNG": encoded(3, ".png")},
        )  # fmt: skip
        second = write(tmp_path / "b.tar", {"2.cls": b"22", "2.png": encoded(4, ".png")})
        source = TarShards([second, first], ["png", "cls"], image_size=(12, 10))
        assert [source.file_of(row) for row in range(len(source))] == [
            f"{second}:2", f"{first}:x/1", f"{first}:2", f"{first}:x/2",
        ]  # fmt: skip
        images, labels = fetch(source, 3, 0, 1, 2, 3)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
        assert labels.tolist() == [-12, 22, 11, 2, -12]
        assert (images == [picture(number) for number in (3, 4, 1, 2, 3)]).all()
        assert (source.fields, source.paths) == (("png", "cls"), (str(second), str(first)))

    def test_jpegs_are_decoded_as_image_folder_does_it(self, tmp_path: Path) -> None:
        (tmp_path / "set" / "cat").mkdir(parents=True)
        for number in range(3):
            (tmp_path / "set" / "cat" / f"{number}.jpg").write_bytes(encoded(number))
        path = write(tmp_path / "a.tar", {f"{number}.jpg": encoded(number) for number in range(3)})
        for size in ((12, 10), (5, 7)):
            images = fetch(TarShards(path, ["jpg"], image_size=size), 2, 0, 1)[0]
            assert (images == fetch(iw.sources.ImageFolder(tmp_path / "set", size), 2, 0, 1)[0]).all()

    def test_arrays_and_what_decoders_return_are_rows_as_they_are(self, tmp_path: Path) -> None:
        path = write(
            tmp_path / "a.tar",
            {name: content for row in range(3) for name, content in
             {f"{row}.a.npy": npy(np.full((2, 2), row, ">f2")), f"{row}.json": f"[{row}, 5]".encode()}.items()},
        )  # fmt: skip
        parsed = threading.Event()

        def decode(content: bytes) -> np.ndarray:
            parsed.set()
            return np.array(eval(content), np.int16)

        lists, arrays = fetch(TarShards(path, {"json": decode, "a.npy": None}), 2, 1)
        assert (lists.dtype, lists.tolist()) == (np.int16, [[2, 5], [1, 5]])
        assert (arrays.dtype, arrays[:, 1, 0].tolist()) == (np.dtype(">f2"), [2, 1])
        assert parsed.is_set()

    @pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_every_format_of_tar_is_read_with_its_long_names(self, tmp_path: Path, kind: int) -> None:
        folder = "d" * 60 + "/" + "e" * 60 + ("/" + "f" * 90 if kind != tarfile.USTAR_FORMAT else "")
        name = "é" if kind == tarfile.PAX_FORMAT else "e"
        path = write(tmp_path / "a.tar", {f"{folder}/{name}.cls": b"1", f"{folder}/2.cls": b"2"}, kind)
        source = TarShards(path, ["cls"])
        assert fetch(source, 1, 0)[0].tolist() == [2, 1]
        assert source.file_of(0) == f"{path}:{folder}/{name}"

    def test_names_that_are_no_utf_8_are_read(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tar", {"\udcff.cls": b"1", "2.cls": b"x"}, tarfile.GNU_FORMAT)
        source = TarShards(path, ["cls"])
        assert fetch(source, 0)[0].tolist() == [1]
        assert source.file_of(0) == f"{path}:\udcff"

    def test_what_is_no_field_is_left_out(self, tmp_path: Path) -> None:
        members = [("d.cls", (tarfile.DIRTYPE, "")), ("README", b"1"), (".cls", b"1"), ("._1.cls", b"1"), ("1.cls", b"1")]
        members += [("1.txt.bak", b"1"), ("2.jpg", b"1"), ("l.jpg", (tarfile.SYMTYPE, "1.cls"))]
        source = TarShards(write(tmp_path / "a.tar", members), ["cls"])
        assert [source.file_of(row) for row in range(len(source))] == [f"{tmp_path}/a.tar:1"]

    def test_offered_memory_is_written_and_returned(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tar", {"1.png": encoded(1, ".png"), "1.cls": b"7"})
        out = [np.zeros((1, 12, 10, 3), np.uint8), np.zeros(1, np.int64)]
        arrays = fetch(TarShards(path, ["png", "cls"], image_size=(12, 10)), 0, out=out)
        assert [array is given for array, given in zip(arrays, out, strict=True)] == [True, True]
        assert (out[0][0] == picture(1)).all()
        assert out[1].tolist() == [7]

    @pytest.mark.parametrize(
        "images",
        [np.zeros((1, 12, 10, 3), np.float32), np.zeros((1, 12, 10, 6), np.uint8)[..., :3],
         np.frombuffer(bytes(360), np.uint8).reshape(1, 12, 10, 3), np.zeros((2, 12, 10, 3), np.uint8)],
        ids=["dtype", "strided", "read-only", "rows"],
    )  # fmt: skip
    def test_offered_memory_that_does_not_fit_is_refused(self, tmp_path: Path, images: Any) -> None:
        path = write(tmp_path / "a.tar", {"1.png": encoded(1, ".png")})
        with pytest.raises(iw.SpecMismatch, match=r"request\.out"):
            fetch(TarShards(path, ["png"], image_size=(12, 10)), 0, out=[images])

    @pytest.mark.parametrize("row", [-1, 2])
    def test_a_row_outside_is_an_error(self, tmp_path: Path, row: int) -> None:
        source = TarShards(numbers(tmp_path / "a.tar", 1, 2), ["cls"])
        with pytest.raises(IndexError, match=r"wanted 0\.\.1"):
            fetch(source, 0, row)
        with pytest.raises(IndexError, match=r"wanted 0\.\.1"):
            source.file_of(row)

    def test_blocks_are_as_large_as_the_mean_archive_or_as_said(self, tmp_path: Path) -> None:
        paths = [numbers(tmp_path / "a.tar", *range(7)), numbers(tmp_path / "b.tar", *range(2))]
        assert TarShards(paths, ["cls"]).block_rows == 4  # 4.5 to the even one
        assert TarShards(paths, ["cls"], block_rows=3).block_rows == 3

    def test_every_row_comes_once_through_a_shuffled_stream(self, tmp_path: Path, coordinator: iw.GlobalCoordinator) -> None:
        paths = []
        for shard in range(3):
            values = range(10 * shard, 10 * shard + 7)
            members = {name: content for value in values for name, content in
                       {f"{value}.jpg": encoded(value), f"{value}.cls": str(value).encode()}.items()}  # fmt: skip
            paths.append(write(tmp_path / f"{shard}.tar", members))
        source = TarShards(paths, ["jpg", "cls"], image_size=(12, 10), max_open_files=1)
        check_every_row_comes_once(coordinator, source, 2, [10 * shard + at for shard in range(3) for at in range(7)])
        source.close()


class TestArchivesThatAreNotWhole:
    def test_a_truncated_one_is_refused_at_every_length(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tar", {"1.cls": b"1", "2.cls": b"2" * 600})
        whole = path.read_bytes()
        end = 512 * 5  # header, data; header, two blocks of data; then comes the end mark
        for length in [*range(0, end + 512, 128), end - 1, end + 511]:
            path.write_bytes(whole[:length])
            with pytest.raises(iw.ConfigError, match=r"a\.tar' cannot be read as a tar archive: .*; wanted a whole"):
                TarShards(path, {"cls": np.frombuffer})
        path.write_bytes(whole[: end + 512])  # some write one block of zeros for an end
        assert len(TarShards(path, {"cls": np.frombuffer})) == 2

    def test_a_damaged_byte_in_a_header_is_refused_unless_it_is_of_no_account(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tar", {"1.cls": b"1", "2.cls": b"2", "3.cls": b"3"})
        whole = path.read_bytes()
        for at in [*range(1024, 1536), *range(0, 512, 7)]:
            for flip in (1, 0x80):
                content = bytearray(whole)
                content[at] ^= flip
                path.write_bytes(content)
                if at % 512 in (154, 155):  # what ends the checksum; it may have other ends
                    with contextlib.suppress(iw.ConfigError):
                        assert fetch(TarShards(path, ["cls"]), 0, 1, 2)[0].tolist() == [1, 2, 3]
                    continue
                with pytest.raises(iw.ConfigError, match=r"a\.tar' cannot be read as a tar archive"):
                    TarShards(path, ["cls"])

    def test_a_header_that_leads_back_is_refused(self, tmp_path: Path) -> None:
        info = tarfile.TarInfo("1.json")
        info.size = -1536  # from its data back to the first header, for ever
        header = info.tobuf(tarfile.GNU_FORMAT)
        assert header[124] == 0xFF
        first = write(tmp_path / "b.tar", {"0.json": b"0"}).read_bytes()[:1024]
        (tmp_path / "a.tar").write_bytes(first + header + bytes(10240))
        check = f"import input_workers as iw; iw.sources.TarShards({str(tmp_path / 'a.tar')!r}, ['cls'])"
        done = subprocess.run(
            [sys.executable, "-c", check], cwd=REPOSITORY, capture_output=True, text=True, timeout=HANG_SECONDS
        )
        assert "a.tar' cannot be read as a tar archive: " in done.stderr.splitlines()[-1]
        assert "leads back" in done.stderr.splitlines()[-1]

    @pytest.mark.parametrize("content", [b"", b"text", b"text" * 1000, os.urandom(2000)])
    def test_what_is_no_tar_is_refused(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(iw.ConfigError, match=r"a\.tar' cannot be read as a tar archive"):
            TarShards(tmp_path / "a.tar", ["cls"])

    def test_archives_joined_by_cat_are_refused(self, tmp_path: Path) -> None:
        both = numbers(tmp_path / "a.tar", 1).read_bytes() + numbers(tmp_path / "b.tar", 2).read_bytes()
        (tmp_path / "a.tar").write_bytes(both)
        with pytest.raises(iw.ConfigError, match="more data follow the end mark at byte 1024"):
            TarShards(tmp_path / "a.tar", ["cls"])

    @pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
    def test_a_compressed_one_is_refused(self, tmp_path: Path, mode: Any) -> None:
        with tarfile.open(tmp_path / "a.tar", f"w:{mode}") as archive:
            archive.addfile(tarfile.TarInfo("1.cls"))
        with pytest.raises(iw.ConfigError, match=r"a\.tar' is compressed \(.*\); wanted an uncompressed \.tar"):
            TarShards(tmp_path / "a.tar", ["cls"])

    def test_an_empty_one_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(iw.ConfigError, match=r"a\.tar' holds no row; .*no file with an extension"):
            TarShards(write(tmp_path / "a.tar", {}), ["cls"])
        with pytest.raises(iw.ConfigError, match=r"b\.tar' holds no row; wanted .*\['cls'\]; its fields are \['jpg'\]"):
            TarShards([numbers(tmp_path / "c.tar", 1), write(tmp_path / "b.tar", {"1.jpg": b""})], ["cls"])

    def test_a_row_without_a_field_is_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tar", {"1.cls": b"1", "1.jpg": b"", "d/2.cls": b"1", "3.jpg": b"", "d/2.json": b""})
        with pytest.raises(iw.ConfigError, match=r"'d/2' has no \['jpg'\], and 2 of 3 rows lack.*'cls', 'jpg', 'json'"):
            TarShards(path, ["jpg", "cls"])

    def test_a_field_that_occurs_twice_is_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tar", [("1.cls", b"1"), ("2.cls", b"1"), ("1.CLS", b"1")])
        with pytest.raises(iw.ConfigError, match=r"a\.tar': '1\.CLS' occurs twice"):
            TarShards(path, ["cls"])

    @pytest.mark.parametrize(
        ("kind", "text"),
        [(tarfile.SYMTYPE, "a symbolic link"), (tarfile.LNKTYPE, "a hard link"), (tarfile.FIFOTYPE, "a device or a FIFO"),
         (tarfile.CHRTYPE, "a device or a FIFO")],
    )  # fmt: skip
    def test_a_field_that_is_no_regular_file_is_refused(self, tmp_path: Path, kind: bytes, text: str) -> None:
        path = write(tmp_path / "a.tar", [("1.cls", b"1"), ("2.cls", (kind, "1.cls"))])
        with pytest.raises(iw.ConfigError, match=rf"'2\.cls' is {text}; wanted a regular file \(tar --deref"):
            TarShards(path, ["cls"])

    def test_a_sparse_file_is_refused(self, tmp_path: Path) -> None:
        with open(tmp_path / "1.cls", "wb") as stream:
            stream.truncate(1 << 20)
            stream.seek(1 << 20)
            stream.write(b"1")
        subprocess.run(["tar", "--sparse", "-cf", "a.tar", "1.cls"], cwd=tmp_path, check=True, timeout=60)
        with pytest.raises(iw.ConfigError, match="is a sparse file"):
            TarShards(tmp_path / "a.tar", ["cls"])

    def test_an_archive_of_the_tar_program_is_read(self, tmp_path: Path) -> None:
        (tmp_path / "1.cls").write_bytes(b"5")
        subprocess.run(["tar", "-cf", "a.tar", "./1.cls"], cwd=tmp_path, check=True, timeout=60)
        assert fetch(TarShards(tmp_path / "a.tar", ["cls"]), 0)[0].tolist() == [5]


class TestParameters:
    @pytest.mark.parametrize(
        ("paths", "text"),
        [([], "got none"), (["missing.tar"], "missing.tar' cannot be read"), (3, "got 3"), ([3], r"got \[3\]"),
         (["."], r"is no regular file; .*glob"), (["a.tar", "./a.tar"], "is given twice"), (["nul\0"], "cannot be read")],
    )  # fmt: skip
    def test_wrong_paths_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: Any, text: str) -> None:
        monkeypatch.chdir(tmp_path)
        numbers(tmp_path / "a.tar", 1)
        with pytest.raises(iw.ConfigError, match=f"TarShards: paths: .*{text}"):
            TarShards(paths, ["cls"])

    def test_a_fifo_is_refused_and_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "a.tar")
        with pytest.raises(iw.ConfigError, match="is no regular file"):
            TarShards(tmp_path / "a.tar", ["cls"])

    @pytest.mark.parametrize(
        ("fields", "text"),
        [("cls", "got 'cls'"), ([], r"got \[\]"), (["cls", "cls"], "each name once"), ([3], "got 3"), ({"cls": 3}, "'cls': 3"),
         (None, "got None"),
         (["json"], r"'json' has no built-in decoder; .*npy.*\{'json': decode\}"), (["CLS"], "in lower case")],
    )  # fmt: skip
    def test_wrong_fields_are_refused(self, tmp_path: Path, fields: Any, text: str) -> None:
        with pytest.raises(iw.ConfigError, match=f"fields: .*{text}"):
            TarShards(numbers(tmp_path / "a.tar", 1), fields)

    @pytest.mark.parametrize("name", ["block_rows", "max_open_files", "max_pixels"])
    @pytest.mark.parametrize("value", [0, -1, 1.5, "2"])
    def test_wrong_numbers_are_refused(self, tmp_path: Path, name: str, value: Any) -> None:
        with pytest.raises(iw.ConfigError, match=f"TarShards: {name}: got {value!r}; wanted a whole number of at least 1"):
            TarShards(numbers(tmp_path / "a.tar", 1), ["cls"], **{name: value})

    def test_opencv_is_needed_for_pictures_alone(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        image_decode.load_opencv.cache_clear()
        monkeypatch.setitem(sys.modules, "cv2", None)
        path = write(tmp_path / "a.tar", {"1.jpg": b"", "1.cls": b"1"})
        assert len(TarShards(path, ["cls"])) == 1
        with pytest.raises(iw.ConfigError, match=r"pip install input-workers\[images\]"):
            TarShards(path, ["jpg"])


class TestBadRows:
    def test_all_bad_rows_are_named_with_archive_key_and_field(self, tmp_path: Path) -> None:
        whole = encoded(1)
        path = write(
            tmp_path / "a.tar",
            [(name, content) for row, image in enumerate([whole, b"", whole, whole[:-9], b"text"])
             for name, content in ((f"d/{row}.jpg", image), (f"d/{row}.cls", b"x" if row == 2 else b"1"))],
        )  # fmt: skip
        source = TarShards(path, ["jpg", "cls"])
        with pytest.raises(
            iw.BadRows, match=r"row 3: '.*a\.tar:d/3' field 'jpg' is a JPEG.*truncated.* \(3 more rows.*Write the archive"
        ) as caught:
            fetch(source, 0, 3, 2, 1, 4)
        assert caught.value.rows == (3, 2, 1, 4)
        with pytest.raises(iw.BadRows, match=r"d/2' field 'cls' holds b'x'; wanted a whole number"):
            fetch(source, 2)

    @pytest.mark.parametrize("text", [b"", b"1.5", b"1_000", b"0x1", b"9223372036854775808", b"\xd9\xa1", b"1 2"])
    def test_what_is_no_whole_number_is_bad(self, tmp_path: Path, text: bytes) -> None:
        with pytest.raises(iw.BadRows, match="wanted a whole number"):
            fetch(TarShards(write(tmp_path / "a.tar", {"1.txt": text}), ["txt"]), 0)

    @pytest.mark.parametrize("text", [b"9223372036854775807", b"-9223372036854775808", b"+5\r\n"])
    def test_every_whole_number_of_64_bits_is_good(self, tmp_path: Path, text: bytes) -> None:
        array = fetch(TarShards(write(tmp_path / "a.tar", {"1.txt": text}), ["txt"]), 0)[0]
        assert (array.dtype, array.tolist()) == (np.int64, [int(text)])

    def test_an_array_that_is_none_is_bad_and_never_unpickled(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "trapped"),)

        huge = npy(np.zeros(9, np.int8)).replace(b"(9,), }" + b" " * 12, b"(9999999999999,), }")
        assert b"9999" in huge
        npz = io.BytesIO()
        np.savez(npz, a=np.zeros(1))
        objects = io.BytesIO()
        np.save(objects, np.array([Trap()], object), allow_pickle=True)
        whole = npy(np.zeros(100))
        for content in (b"", b"text", whole[:-1], whole[:30], huge, npz.getvalue(), objects.getvalue(), pickle.dumps(Trap())):
            source = TarShards(write(tmp_path / "a.tar", {"1.npy": content}), ["npy"])
            with pytest.raises(iw.BadRows, match=r"a\.tar:1' field 'npy' is "):
                fetch(source, 0)
            source.close()
        assert not (tmp_path / "trapped").exists()

    def test_a_decoder_that_raises_makes_its_row_bad(self, tmp_path: Path) -> None:
        def decode(content: bytes) -> np.ndarray:
            return np.array(1 // (int(content) - 2))

        with pytest.raises(iw.BadRows, match=r":2' field 'cls' cannot be decoded, ZeroDivisionError") as caught:
            fetch(TarShards(numbers(tmp_path / "a.tar", 1, 2, 3), {"cls": decode}), 0, 1, 2)
        assert caught.value.rows == (1,)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def test_rows_of_other_shapes_are_refused(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tar", {f"{row}.npy": npy(np.zeros(row)) for row in (1, 2)})
        with pytest.raises(iw.SpecMismatch, match=r"'npy', row 1: got .*\(2,\); wanted .*\(1,\), as row 0"):
            fetch(TarShards(path, ["npy"]), 0, 1)

    @pytest.mark.parametrize("change", ["removed", "rewritten", "cut"])
    def test_a_changed_archive_makes_its_rows_bad_and_no_others(self, tmp_path: Path, change: str) -> None:
        paths = [numbers(tmp_path / "a.tar", 1, 2), numbers(tmp_path / "b.tar", 3)]
        source = TarShards(paths, ["cls"])
        if change == "removed":
            paths[0].unlink()
        elif change == "rewritten":
            os.utime(numbers(paths[0], 2, 1), ns=(0, 0))
        else:
            os.truncate(paths[0], 600)
        with pytest.raises(
            iw.BadRows, match=r"a\.tar:2' (cannot be read: No such file|was changed after it was ind)"
        ) as caught:
            fetch(source, 2, 1)
        assert caught.value.rows == (1,)

    def test_an_archive_that_is_cut_while_it_is_open_makes_its_rows_bad(self, tmp_path: Path) -> None:
        source = TarShards(numbers(tmp_path / "a.tar", 1, 2), ["cls"])
        fetch(source, 0)
        os.truncate(tmp_path / "a.tar", 1536)
        assert fetch(source, 0)[0].tolist() == [1]
        with pytest.raises(iw.BadRows, match="ends at byte 1536, within this row"):
            fetch(source, 1)


class TestDescriptors:
    @pytest.fixture
    def paths(self, tmp_path: Path) -> list[Path]:
        return [numbers(tmp_path / f"{shard}.tar", shard, shard + 100) for shard in range(6)]

    def test_they_are_kept_and_bounded_and_the_ones_used_last_stay(self, tmp_path: Path, paths: Any, monkeypatch: Any) -> None:
        opened = []
        real = os.open
        monkeypatch.setattr(os, "open", lambda path, *more, **named: opened.append(path) or real(path, *more, **named))
        source = TarShards(paths, ["cls"], max_open_files=2)
        assert descriptors(tmp_path) == 0
        opened.clear()
        for row in (0, 2, 1, 4, 0, 2):  # archives 0, 1, 0, 2, 0, 1
            fetch(source, row)
            assert descriptors(tmp_path) <= 2
        assert opened == [str(paths[shard]) for shard in (0, 1, 2, 1)]

    def test_close_and_dropping_give_them_back_and_a_later_fetch_opens_again(self, tmp_path: Path, paths: Any) -> None:
        source = TarShards(paths, ["cls"])
        for _ in range(2):
            assert fetch(source, *range(12))[0].tolist() == [shard + more for shard in range(6) for more in (0, 100)]
            assert descriptors(tmp_path) == 6
            source.close()
            assert descriptors(tmp_path) == 0
        fetch(source, 0)
        del source
        assert descriptors(tmp_path) == 0

    def test_a_pickled_source_opens_its_own(self, tmp_path: Path, paths: Any) -> None:
        source = TarShards(paths, ["cls"])
        fetch(source, 0)
        again = pickle.loads(pickle.dumps(source))
        source.close()
        assert descriptors(tmp_path) == 0
        assert fetch(again, 3, 0)[0].tolist() == [101, 0]
        assert again.file_of(3) == f"{paths[1]}:101"

    def test_one_that_is_being_read_is_closed_by_its_reader(self, tmp_path: Path, paths: Any, monkeypatch: Any) -> None:
        inside, go_on = threading.Barrier(3), threading.Event()
        real = os.pread

        def pread(*arguments: Any) -> bytes:
            inside.wait(HANG_SECONDS)
            assert go_on.wait(HANG_SECONDS)
            return real(*arguments)

        source = TarShards(paths, ["cls"], max_open_files=1)
        monkeypatch.setattr(os, "pread", pread)
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(fetch, source, row) for row in (0, 2)]
            inside.wait(HANG_SECONDS)
            assert descriptors(tmp_path) == 2
            source.close()
            assert descriptors(tmp_path) == 2
            go_on.set()
            assert [answer.result(HANG_SECONDS)[0][0] for answer in answers] == [0, 1]
        assert descriptors(tmp_path) == 0

    def test_those_beyond_the_bound_are_closed_when_their_reading_is_done(
        self, tmp_path: Path, paths: Any, monkeypatch: Any
    ) -> None:
        together = threading.Barrier(3)
        real = os.pread

        def pread(*arguments: Any) -> bytes:
            together.wait(HANG_SECONDS)
            return real(*arguments)

        source = TarShards(paths, ["cls"], max_open_files=1)
        monkeypatch.setattr(os, "pread", pread)
        with ThreadPoolExecutor(3) as pool:
            assert [answer[0][0] for answer in pool.map(lambda row: fetch(source, row), (0, 2, 4))] == [0, 1, 2]
        assert descriptors(tmp_path) == 1
        source.close()

    def test_two_threads_that_open_one_archive_at_once_keep_one(self, tmp_path: Path, paths: Any, monkeypatch: Any) -> None:
        together = threading.Barrier(2)
        real = os.open

        def open_together(*arguments: Any, **named: Any) -> int:
            together.wait(HANG_SECONDS)
            return real(*arguments, **named)

        source = TarShards(paths, ["cls"])
        monkeypatch.setattr(files.os, "open", open_together)
        with ThreadPoolExecutor(2) as pool:
            assert [answer[0][0] for answer in pool.map(lambda row: fetch(source, row), (0, 1))] == [0, 100]
        assert descriptors(tmp_path) == 1
        source.close()
        assert descriptors(tmp_path) == 0

    def test_many_threads_get_their_own_rows_while_descriptors_come_and_go(self, paths: Any) -> None:
        source = TarShards(paths, ["cls"], max_open_files=2)
        orders = [np.random.default_rng(seed).permutation(12).tolist() for seed in range(60)]
        with ThreadPoolExecutor(8) as pool:
            for order, answer in zip(orders, pool.map(lambda order: fetch(source, *order), orders), strict=True):
                assert answer[0].tolist() == [row // 2 + 100 * (row % 2) for row in order]
        source.close()

    def test_a_file_handed_over_in_pieces_is_read_whole(self, paths: Any, monkeypatch: Any) -> None:
        source = TarShards(paths, ["cls"])
        real = os.pread
        monkeypatch.setattr(os, "pread", lambda descriptor, size, offset: real(descriptor, min(size, 1), offset))
        assert fetch(source, 7)[0].tolist() == [103]

    def test_a_file_that_was_changed_is_not_kept_open(self, tmp_path: Path, paths: Any) -> None:
        source = TarShards(paths, ["cls"])
        os.utime(paths[0], ns=(0, 0))
        for _ in range(3):
            with pytest.raises(iw.BadRows, match="was changed after it was indexed"):
                fetch(source, 0)
        assert descriptors(tmp_path) == 0


def test_importing_the_sources_loads_neither_opencv_nor_pyarrow_and_tarfile_only_for_tars() -> None:
    check = (
        "import sys, input_workers as iw; assert not {'tarfile', 'cv2', 'pyarrow'} & set(sys.modules);"
        "iw.sources.TarShards, iw.sources.Parquet, iw.sources.Map, iw.sources.Generators;"
        "assert not {'cv2', 'pyarrow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, check=True, timeout=60)


def test_filling_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = numbers(tmp_path / "a.tar", 1)
    os.truncate(path, 1024 + 4096)
    monkeypatch.setattr(tar_shards, "MAX_FILLING_BYTES", 4096)
    assert len(TarShards(path, ["cls"])) == 1
    os.truncate(path, 1024 + 4097)
    with pytest.raises(iw.ConfigError, match="more data follow"):
        TarShards(path, ["cls"])


def test_gzip_is_recognised_by_its_content(tmp_path: Path) -> None:
    path = numbers(tmp_path / "a.tar", 1)
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(iw.ConfigError, match=r"compressed \(gzip\)"):
        TarShards(path, ["cls"])
