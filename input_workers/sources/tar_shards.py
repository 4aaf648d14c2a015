"""Tar archives of samples in (`0001.jpg`, `0001.cls`), rows by number out: the layout that WebDataset writes.

The archives are read through once, for their index; a row is then read where it lies.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from input_workers.checks import check_whole
from input_workers.errors import ConfigError, SpecMismatch, describe
from input_workers.sources.columns import Failures, check_rows
from input_workers.sources.files import DataFile, Decoder, OpenFiles, chosen_decoders, list_files
from input_workers.sources.image_decode import check_image_size, decode_into, load_opencv
from input_workers.sources.padding import arrays_of, checked_pads, make_padded_columns

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from input_workers.contracts import FetchRequest

__all__ = ["TarShards"]

IMAGES = frozenset({"jpg", "jpeg", "png", "webp", "bmp"})
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
WHOLE_NUMBER = re.compile(rb"[+-]?[0-9]{1,19}")
# Writers fill up the last record with zeros, usually to 10 KiB. What is longer is no filling.
MAX_FILLING_BYTES = 1024 * 1024


class TarShards:
    """A Source over uncompressed tar archives: members with the same key are a row, their extensions are its fields.

    The key of `train/0001.seg.png` is `train/0001`, its field `seg.png`: everything after the first dot of the file name,
    in lower case. Rows are numbered archive by archive, in the order in which their keys first occur; members of a key
    need not be neighbours. The same key in two archives is two rows. Left out are folders, names without an extension or
    that begin with a dot, members whose field is not asked for, and keys that have none of the fields.

    `fetch` returns one array per field, in the order of `fields`, rows along axis 0. Fields with a decoder of their own
    give what that returns. Built in, by the last extension:

    | field | input |
    |---|---|
    | jpg, jpeg, png, webp, bmp | uint8 (height, width, 3) in RGB, resized to `image_size`, as ImageFolder does it |
    | cls, txt | int64 (), from a whole number in decimal digits |
    | npy | the array, never unpickled |

    Thread-safe: nothing changes after construction but the descriptors kept open, at most `max_open_files` of them (or one
    for each fetcher, if those are more). They are closed by `close()` and when the source is dropped. It may be pickled
    (with decoders that can) to processes that see the same files, and opens them again there. Fork-safe while no thread
    fetches. A decoder is called from many threads at once. With an image field, constructing it loads OpenCV and sets it
    to one thread of its own for the whole process.

    Attributes:
        fields: names of the fields, in the order of the inputs.
        paths: the archives.
        block_rows: rows `i * block_rows` to `(i + 1) * block_rows - 1` lie together; a shuffle may keep them so.
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        fields: Sequence[str] | Mapping[str, Decoder | None],
        *,
        image_size: Sequence[int] = (224, 224),
        max_pixels: int = 178_000_000,
        block_rows: int | None = None,
        max_open_files: int = 64,
        pad_ragged: Mapping[str, Any] | None = None,
    ) -> None:
        """Index the archives: all headers are read, the contents are passed over.

        Args:
            paths: one archive or several; their order is that of the rows.
            fields: `["jpg", "cls"]`, or with decoders from bytes to an array, `{"jpg": None, "json": decode}`.
            image_size: (height, width) of the pictures as they are delivered.
            max_pixels: a picture whose header announces more is refused undecoded.
            block_rows: by default the mean number of rows of an archive.
            max_open_files: descriptors that are kept open.
            pad_ragged: for fields whose rows have unequal length; see `Map`. Pictures are all of `image_size`.

        Raises:
            ConfigError: a parameter is wrong; a file is missing, compressed, no tar archive, truncated, damaged or empty;
                a row lacks a field or has one twice; a field is a link, a device or a sparse file; OpenCV is missing.
        """
        self.image_size = check_image_size("TarShards", image_size, max_pixels)
        self.max_pixels = max_pixels
        self._decoders = chosen_decoders("TarShards", "fields", fields)
        self._built_in: dict[str, Decoder | None] = {}  # None: an image, which is decoded in its place
        for name, decoder in self._decoders.items():
            if decoder is None:
                kind = name.rpartition(".")[2]
                if name != name.lower() or (kind not in IMAGES and kind not in BUILT_IN):
                    known = ", ".join(sorted(IMAGES | BUILT_IN.keys()))
                    raise ConfigError(
                        f"TarShards: fields: {name!r} has no built-in decoder; wanted one of {known}, in lower case, or "
                        f"a decoder from bytes to an array: {{{name!r}: decode}}"
                    )
                self._built_in[name] = BUILT_IN.get(kind)
        self._pads = checked_pads("TarShards", pad_ragged)
        for name in self._pads:
            if self._built_in.get(name, decode_into) is None:
                raise ConfigError(f"TarShards: pad_ragged: {name!r} is a picture, of image_size; wanted fields of a decoder's")
        if None in self._built_in.values():
            load_opencv()  # not installed: said here, not by the first fetch
        files = list_files("TarShards", paths)
        self.fields = tuple(self._decoders)
        self.paths = tuple(file.path for file in files)
        self._files = OpenFiles(files, check_whole("TarShards: max_open_files", max_open_files, 1))
        shards = [_index(file, self.fields) for file in files]
        # Compact: Python objects for each of a hundred million rows would fill the memory.
        self._ends = np.cumsum([len(shard.places) for shard in shards])
        self._places = np.concatenate([shard.places for shard in shards])
        self._keys = b"".join(shard.keys for shard in shards)
        self._key_ends = np.cumsum(np.concatenate([shard.key_sizes for shard in shards]))
        mean = max(1, round(len(self) / len(files)))
        self.block_rows = mean if block_rows is None else check_whole("TarShards: block_rows", block_rows, 1)

    def __len__(self) -> int:
        return len(self._places)

    def file_of(self, row: int) -> str:
        """Return "path:key" of a row; bytes that are not UTF-8 become lone surrogates. Raises IndexError: no such row."""
        if not 0 <= row < len(self):
            raise IndexError(f"row: got {row}; wanted 0..{len(self) - 1}")
        key = self._keys[int(self._key_ends[row - 1]) if row else 0 : int(self._key_ends[row])]
        return f"{self.paths[int(np.searchsorted(self._ends, row, side='right'))]}:{key.decode('utf-8', 'surrogateescape')}"

    def close(self) -> None:
        """Close the descriptors kept open. A later `fetch` opens files again."""
        self._files.close()

    def fetch(self, rows: NDArray[np.int64], request: FetchRequest) -> list[NDArray[Any]]:
        """Read and decode these rows.

        Args:
            rows: int64 (n,), row numbers, at least one.
            request: of it only `out` is used: memory to write into, one array of n rows per field.

        Returns:
            One array per field, (n, ...), in the order of `rows`; those of `request.out` where it was given.

        Raises:
            BadRows: names every row of the request that cannot be read or decoded, whatever a decoder raised.
            IndexError: a row number is outside 0..len - 1.
            SpecMismatch: rows of the request differ in dtype or shape, or are not what `request.out` is for.
        """
        numbers = check_rows(rows, len(self))
        columns = make_padded_columns("TarShards", self.fields, len(numbers), request.out, self._pads)
        for name, column in zip(self.fields, columns, strict=True):
            if name in self._built_in and self._built_in[name] is None:
                pictures = column.allocate(numbers[0], np.dtype(np.uint8), (*self.image_size, 3))
                if not pictures.flags.carray:  # OpenCV would quietly make an array of its own
                    raise SpecMismatch(f"TarShards: {name!r}: request.out is not C-contiguous and writeable; wanted it so")
        failures = Failures()
        shards = np.searchsorted(self._ends, rows, side="right").tolist()
        places = self._places[rows].tolist()
        for at, row in enumerate(numbers):
            for name, column, (offset, size) in zip(self.fields, columns, places[at], strict=True):
                decoder = self._decoders[name]
                try:
                    encoded = self._files.read(shards[at], offset, size)
                except (OSError, ValueError) as error:  # the rows after it are still tried: one report names all bad rows
                    what = f"cannot be read: {error.strerror or error}" if isinstance(error, OSError) else str(error)
                    failures.add(row, what, error)
                    break
                try:
                    if decoder is not None:
                        column.put(at, row, decoder(encoded))
                    elif (convert := self._built_in[name]) is not None:
                        column.put(at, row, convert(encoded))
                    else:
                        decode_into(column.filled()[at], encoded, self.max_pixels)
                except (SpecMismatch, MemoryError):  # not for lack of this row
                    raise
                except Exception as error:  # foreign code may raise anything
                    what = str(error) if decoder is None else f"cannot be decoded, {describe(error)}"
                    failures.add(row, f"field {name!r} {what}", error)
                    break
        failures.raise_any(self.file_of, "Write the archive again, with this row replaced or left out")
        return arrays_of(columns)


class _Shard(NamedTuple):
    """The index of one archive: int64 (rows, fields, 2) with offset and size, the keys one after the other, their sizes."""

    places: NDArray[np.int64]
    keys: bytes
    key_sizes: NDArray[np.int64]


def _index(file: DataFile, fields: Sequence[str]) -> _Shard:
    """Read the headers of one archive."""
    who = f"TarShards: {file.path!r}"
    wanted = {name: at for at, name in enumerate(fields)}
    samples: dict[str, list[int]] = {}
    found: set[str] = set()
    try:
        with open(file.path, "rb") as stream:
            start = stream.read(6)
            for magic, name in COMPRESSED.items():
                if start.startswith(magic):
                    raise ConfigError(
                        f"{who} is compressed ({name}); wanted an uncompressed .tar: rows are read where they lie"
                    )
            stream.seek(0)
            with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # else every header is kept
                    if member.size < 0:  # tarfile would go back with it, and round in a circle
                        raise tarfile.ReadError(f"the header at byte {member.offset} leads back")
                    _add(who, member, samples, wanted, found)
                end = archive.offset
            stream.seek(end)
            filling = stream.read(MAX_FILLING_BYTES + 1)
            if len(filling) < tarfile.BLOCKSIZE or filling[: tarfile.BLOCKSIZE].strip(b"\0"):
                raise tarfile.ReadError(f"no member and no end mark at byte {end} of {file.size}, truncated or damaged")
            if len(filling) > MAX_FILLING_BYTES or filling.strip(b"\0"):
                raise tarfile.ReadError(
                    f"more data follow the end mark at byte {end}; archives are joined by tar --concatenate, not by cat"
                )
    except ConfigError:
        raise
    except Exception as error:  # tarfile raises nearly anything for a damaged header
        raise ConfigError(f"{who} cannot be read as a tar archive: {error}; wanted a whole, uncompressed .tar") from error
    has = f"its fields are {sorted(found)}" if found else "it has no file with an extension"
    if not samples:
        raise ConfigError(f"{who} holds no row; wanted members with the fields {list(fields)}; {has}")
    places = np.fromiter((number for sample in samples.values() for number in sample), np.int64)
    places = places.reshape(len(samples), len(fields), 2)
    lacking = (places[:, :, 0] < 0).any(axis=1)
    if lacking.any():
        row = int(lacking.argmax())
        lacks = [name for at, name in enumerate(fields) if places[row, at, 0] < 0]
        raise ConfigError(
            f"{who}: {list(samples)[row]!r} has no {lacks}, and {int(lacking.sum())} of {len(samples)} rows lack a field; "
            f"wanted {list(fields)} in each; {has}"
        )
    keys = [key.encode("utf-8", "surrogateescape") for key in samples]
    return _Shard(places, b"".join(keys), np.fromiter(map(len, keys), np.int64, len(keys)))


def _add(
    who: str,
    member: tarfile.TarInfo,
    samples: dict[str, list[int]],
    wanted: Mapping[str, int],
    found: set[str],
) -> None:
    """Note where a member lies, if it is a field that is wanted."""
    folder, slash, name = member.name.rpartition("/")
    base, _, field = name.partition(".")
    if member.isdir() or not base or not field:
        return
    field = field.lower()
    found.add(field)
    at = wanted.get(field)
    if at is None:
        return
    if not member.isreg() or member.issparse():
        kinds = ((member.issparse(), "a sparse file"), (member.issym(), "a symbolic link"), (member.islnk(), "a hard link"))
        kind = next((text for holds, text in kinds if holds), "a device or a FIFO")
        raise ConfigError(f"{who}: {member.name!r} is {kind}; wanted a regular file (tar --dereference --hard-dereference)")
    sample = samples.setdefault(f"{folder}{slash}{base}", [-1] * (2 * len(wanted)))
    if sample[2 * at] >= 0:
        raise ConfigError(f"{who}: {member.name!r} occurs twice; wanted each field of a key once")
    sample[2 * at : 2 * at + 2] = member.offset_data, member.size


def _decode_number(encoded: bytes) -> np.int64:
    text = encoded.strip()
    if not WHOLE_NUMBER.fullmatch(text) or not -(2**63) <= int(text) < 2**63:
        raise ValueError(f"holds {text[:40]!r}; wanted a whole number of 64 bits, or a decoder for this field")
    return np.int64(int(text))


def _decode_npy(encoded: bytes) -> NDArray[Any]:
    try:
        array = np.load(io.BytesIO(encoded), allow_pickle=False)
    except (ValueError, EOFError, OSError, MemoryError) as error:  # the last: a header that announces too much
        raise ValueError(f"is no .npy array ({error}); wanted the whole file as np.save wrote it, without objects") from error
    if not isinstance(array, np.ndarray):
        raise ValueError("is an .npz archive; wanted a single array, as np.save writes it")
    return array


BUILT_IN: dict[str, Decoder] = {"cls": _decode_number, "txt": _decode_number, "npy": _decode_npy}
