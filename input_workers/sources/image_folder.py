"""A folder of images in, pictures and labels by row number out: one sub-folder for each class.

`cat/1.jpg`, `cat/old/2.png` and `dog/3.webp` become rows 0, 1 and 2 with labels 0, 0 and 1 of the classes cat and dog.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from input_workers.contracts import ArraySpec
from input_workers.errors import BadRows, ConfigError, SpecMismatch
from input_workers.sources.image_decode import check_image_size, decode_into, load_opencv

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from input_workers.contracts import FetchRequest

__all__ = ["ImageFolder"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# No link is followed unseen, and opening a FIFO does not wait for somebody to write to it.
OPEN_FLAGS = os.O_RDONLY
for _flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
    OPEN_FLAGS |= getattr(os, _flag, 0)
# A file is read whole: larger than 16-bit RGBA without compression, beside 16 MiB of metadata, it is refused unread.
MAX_BYTES_PER_PIXEL = 8
MAX_METADATA_BYTES = 16 * 1024 * 1024
FILE_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFLNK: "a symbolic link"}


class ImageFolder:
    """A Source over JPEG, PNG, WebP and BMP files, `path/class/**/file`: an image and the number of its class.

    `fetch` returns `[image, label]`: image uint8 (rows, height, width, 3) in RGB, label int64 (rows,).

    Rows are numbered class by class, within a class by relative path; both are sorted by code point, so the same tree
    has the same rows on every machine. Files with another extension, files outside a class folder and names that begin
    with a dot are left out. Everything with an image's extension is a row, whatever it holds: a row that is no readable
    image is an error of its fetch, never passed over. A class folder may be empty and keeps its number.

    The picture is resized to `image_size` without regard to its proportions, after it was turned as its EXIF tells.
    A JPEG that is at least twice as large in both directions is decoded at reduced size, which is several times faster
    and differs from the full decode by a few grey levels.

    A symbolic link to a file is followed where it leads to a file inside `path`. Only regular files are read, so no
    FIFO or device can make a fetch hang. The folder is listed once, at construction.

    Thread-safe: nothing changes after construction. Fork-safe, and it may be pickled to other processes, which must see
    the same folder. Constructing it loads OpenCV and sets it to one thread of its own for the whole process.

    Attributes:
        path: the folder, resolved.
        class_names: names of the classes; a label is an index of this list.
        files: relative path of each row, with "/" between folders.
        labels: int64 (rows,), the class of each row; not to be changed.
    """

    def __init__(
        self, path: str | os.PathLike[str], image_size: Sequence[int] = (224, 224), *, max_pixels: int = 178_000_000
    ) -> None:
        """List the folder.

        Args:
            path: the folder that holds one folder for each class.
            image_size: (height, width) of the pictures as they are delivered.
            max_pixels: a picture whose header announces more is refused undecoded. The default, 0.5 GB when decoded, is
                where Pillow stops too.

        Raises:
            ConfigError: a parameter is wrong; no such folder, no class or no image in it; OpenCV is not installed.
        """
        self.image_size = check_image_size("ImageFolder", image_size, max_pixels)
        try:
            self.path = os.path.realpath(os.fsdecode(path))
            is_folder = os.path.isdir(self.path)
        except (TypeError, ValueError):
            is_folder = False
        if not is_folder:
            raise ConfigError(f"ImageFolder: path: got {path!r}; wanted an existing folder with one folder per class")
        load_opencv()  # not installed: said here, not by the first fetch
        self.max_pixels = max_pixels
        self.class_names, self.files, labels = _list_classes(self.path)
        self.labels: NDArray[np.int64] = labels

    @property
    def specs(self) -> tuple[ArraySpec, ArraySpec]:
        """What a row looks like: image uint8 (height, width, 3), label int64 ()."""
        return ArraySpec((*self.image_size, 3), np.uint8), ArraySpec((), np.int64)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.files)

    def file_of(self, row: int) -> str:
        """Return the path of a row's file. Raises IndexError: no such row."""
        if not 0 <= row < len(self.files):
            raise IndexError(f"row: got {row}; wanted 0..{len(self.files) - 1}")
        return os.path.join(self.path, self.files[row])

    def fetch(self, rows: NDArray[np.int64], request: FetchRequest) -> list[NDArray[Any]]:
        """Read, decode and resize the pictures of `rows`.

        Args:
            rows: int64 (n,), row numbers.
            request: of it only `out` is used: memory to write into, image and label of n rows each.

        Returns:
            `[image, label]`, uint8 (n, height, width, 3) in RGB and int64 (n,), in the order of `rows`; `request.out`
            itself where it was given.

        Raises:
            BadRows: names every row of the request whose file cannot be read or is no whole picture.
            IndexError: a row number is outside 0..len - 1.
            SpecMismatch: `request.out` has not these shapes and dtypes, or its image is not C-contiguous and writeable.
        """
        count = len(rows)
        if count and not 0 <= int(rows.min()) <= int(rows.max()) < len(self.files):
            raise IndexError(f"rows: got {int(rows.min())}..{int(rows.max())}; wanted 0..{len(self.files) - 1}")
        if request.out is None:
            out: list[NDArray[Any]] = [np.empty((count, *self.image_size, 3), np.uint8), np.empty(count, np.int64)]
        else:
            out = request.out
            self._check_out(out, count)
        images, labels = out
        np.take(self.labels, rows, out=labels, mode="clip")  # "raise" would go through a buffer; the rows are checked
        root, files, max_pixels = f"{self.path}/", self.files, self.max_pixels
        max_bytes = max_pixels * MAX_BYTES_PER_PIXEL + MAX_METADATA_BYTES
        failures: list[tuple[int, Exception]] = []
        for at, row in enumerate(rows.tolist()):
            try:
                decode_into(images[at], _read_file(root + files[row], self.path, max_bytes), max_pixels)
            except (OSError, ValueError) as error:  # the rows after it are still tried: one report names all bad rows
                failures.append((row, error))
        if failures:
            raise self._bad_rows(failures) from failures[0][1]
        return out

    def _check_out(self, out: Sequence[NDArray[Any]], count: int) -> None:
        # OpenCV writes into memory that fits exactly; for any other it would quietly make an array of its own.
        wanted = [((count, *self.image_size, 3), np.dtype(np.uint8)), ((count,), np.dtype(np.int64))]
        got = [(array.shape, array.dtype) for array in out]
        if got != wanted or not out[0].flags.carray:
            raise SpecMismatch(f"ImageFolder: request.out: got {got}; wanted {wanted}, the image C-contiguous and writeable")

    def _bad_rows(self, failures: Sequence[tuple[int, Exception]]) -> BadRows:
        row, error = failures[0]
        if isinstance(error, OSError):
            what = f"cannot be read: {error.strerror or error}; wanted a readable image file"
        else:
            what = str(error)
        more = f" ({len(failures) - 1} more rows of this request are bad too)" if len(failures) > 1 else ""
        return BadRows(
            [row for row, _ in failures],
            # repr: a file name may hold bytes that no log can encode
            f"row {row}: {self.file_of(row)!r} {what}{more}. Replace or remove the file",
        )


def _list_classes(root: str) -> tuple[list[str], list[str], NDArray[np.int64]]:
    """Return (class names, relative paths of all rows, their labels)."""
    class_names: list[str] = []
    files: list[str] = []
    counts: list[int] = []
    try:
        with os.scandir(root) as entries:
            class_names.extend(entry.name for entry in entries if _is_folder(entry))
        class_names.sort()
        for name in class_names:
            found = _list_files(root, name)
            files.extend(found)
            counts.append(len(found))
    except OSError as error:
        raise ConfigError(f"ImageFolder: path: {root!r} cannot be listed: {error}; wanted folders that can") from error
    if not class_names:
        raise ConfigError(
            f"ImageFolder: path: {root!r} has no sub-folder; wanted one for each class, as in cat/1.jpg and dog/2.jpg"
        )
    if not files:
        raise ConfigError(
            f"ImageFolder: path: the {len(class_names)} class folders of {root!r} hold no image; wanted files that end "
            "in " + ", ".join(EXTENSIONS)
        )
    labels = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    labels.flags.writeable = False
    return class_names, files, labels


def _list_files(root: str, class_name: str) -> list[str]:
    found: list[str] = []
    folders = [class_name]
    while folders:
        folder = folders.pop()
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                if entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith("."):
                    found.append(f"{folder}/{entry.name}")
                elif _is_folder(entry):
                    folders.append(f"{folder}/{entry.name}")
    found.sort()
    return found


def _is_folder(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith("."):
        return False
    if entry.is_symlink() and entry.is_dir():  # it may lead outside, or round in a circle
        raise ConfigError(f"ImageFolder: {entry.path!r} is a symbolic link to a folder; wanted the folder itself in its place")
    return entry.is_dir(follow_symlinks=False)


def _read_file(path: str, root: str, max_bytes: int) -> bytes:
    """Return the bytes of a regular file inside `root`, which has no links in it. Never waits for anybody.

    Raises:
        OSError: it cannot be opened or read.
        ValueError: it is no regular file, lies outside `root`, is too large, or shrank meanwhile.
    """
    try:
        descriptor = os.open(path, OPEN_FLAGS)
    except OSError:
        if not os.path.islink(path):
            raise
        target = os.path.realpath(path, strict=True)
        if os.path.commonpath([target, root]) != root:
            raise ValueError(f"is a symbolic link to {target!r}, outside the folder; wanted a file inside") from None
        descriptor = os.open(target, OPEN_FLAGS)
    try:
        status = os.fstat(descriptor)
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            kind = FILE_KINDS.get(stat.S_IFMT(status.st_mode), "a device")
            raise ValueError(f"is {kind}; wanted a regular file")
        if size > max_bytes:
            raise ValueError(f"has {size} bytes; wanted at most {max_bytes}, which max_pixels allows")
        content = os.read(descriptor, size)
        while len(content) < size:  # a file system may hand over less at once
            more = os.read(descriptor, size - len(content))
            if not more:
                raise ValueError(f"shrank from {size} to {len(content)} bytes while it was read; wanted a file at rest")
            content += more
    finally:
        os.close(descriptor)
    return content
