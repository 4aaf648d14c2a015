"""A TOML file in, checked settings of a training job out, or every fault of it at once.

Imports pydantic: loaded when a configuration is read.
"""

from __future__ import annotations

import difflib
import os
import tomllib
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError, ValidationInfo

from input_workers.errors import ConfigError
from input_workers.policy import ErrorPolicy

__all__ = [
    "DIGITS",
    "KERAS_MODELS",
    "SMALL_CNN",
    "Checkpoint",
    "Config",
    "Metrics",
    "Model",
    "OnError",
    "TestSource",
    "TrainSource",
    "load_config",
]

SMALL_CNN = "small_cnn"
# The image models of keras.applications. Listed, so that a configuration is checked without loading Keras.
KERAS_MODELS = (
    "ConvNeXtBase", "ConvNeXtLarge", "ConvNeXtSmall", "ConvNeXtTiny", "ConvNeXtXLarge", "DenseNet121", "DenseNet169",
    "DenseNet201", "EfficientNetB0", "EfficientNetB1", "EfficientNetB2", "EfficientNetB3", "EfficientNetB4",
    "EfficientNetB5", "EfficientNetB6", "EfficientNetB7", "EfficientNetV2B0", "EfficientNetV2B1", "EfficientNetV2B2",
    "EfficientNetV2B3", "EfficientNetV2L", "EfficientNetV2M", "EfficientNetV2S", "InceptionResNetV2", "InceptionV3",
    "MobileNet", "MobileNetV2", "MobileNetV3Large", "MobileNetV3Small", "NASNetLarge", "NASNetMobile", "ResNet101",
    "ResNet101V2", "ResNet152", "ResNet152V2", "ResNet50", "ResNet50V2", "VGG16", "VGG19", "Xception",
)  # fmt: skip
# Not folders of the user's: the handwritten digits that scikit-learn carries, written out as files.
DIGITS = {"digits:train": "train", "digits:test": "test"}


def _model_name(name: str) -> str:
    if name not in (SMALL_CNN, *KERAS_MODELS):
        raise ValueError(_nearest(name, (SMALL_CNN, *KERAS_MODELS)))
    return name


def _folder(folder: str, info: ValidationInfo) -> str:
    """Return an absolute path; a relative one begins at the configuration's folder."""
    if folder in DIGITS:
        return folder
    if folder.startswith("digits:"):
        raise ValueError(_nearest(folder, DIGITS))
    path = os.path.join(info.context or "", os.path.expanduser(folder))
    if "\0" in path or not os.path.isdir(path):
        raise ValueError(f"there is no folder {path!r}; wanted one with a folder of images for each class")
    return os.path.abspath(path)


def _new_path(path: str, info: ValidationInfo) -> str:
    if not path or "\0" in path:
        raise ValueError("wanted a path")
    return os.path.abspath(os.path.join(info.context or "", os.path.expanduser(path)))


def _new_folder(folder: str, info: ValidationInfo) -> str:
    """Return an absolute path, of a folder or of nothing yet."""
    path = _new_path(folder, info)
    if os.path.exists(path) and not os.path.isdir(path):
        raise ValueError(f"{path!r} is no folder; wanted one, or a name that is free")
    return path


def _workers(value: Any) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 4096:
        raise ValueError(f"wanted {WORKERS_WANTED}")
    return value


def _max_errors(value: Any, info: ValidationInfo) -> int | float:
    if isinstance(value, bool) or not (
        (isinstance(value, int) and value >= 0) or (isinstance(value, float) and 0.0 <= value <= 1.0)
    ):
        raise ValueError("wanted a count of rows, or a share from 0.0 to 1.0 of those tried")
    _only_with_skip(info)
    return value


def _quarantine(value: str | None, info: ValidationInfo) -> str | None:
    if value is None:
        return None
    path = _new_path(value, info)
    if not os.path.isdir(os.path.dirname(path)) or os.path.isdir(path):
        raise ValueError(f"{path!r} cannot be a file; wanted the path of one in a folder that is there")
    _only_with_skip(info)
    return path


def _only_with_skip(info: ValidationInfo) -> None:
    if not info.data.get("skip", True):  # a wrong `skip` is a fault of its own
        raise ValueError("it says what may be skipped; wanted skip = true with it")


# The description of a field says what is wanted in it; messages quote it.
COUNT_WANTED = "a whole number from 1 to 1000000"
FEED_WANTED = "'tensorflow', 'tensorflow:/GPU:0' or 'tensorflow:/CPU:0': the models are Keras's, on TensorFlow"
_Count = Annotated[int, Field(ge=1, le=1_000_000, description=COUNT_WANTED)]
WORKERS_WANTED = "a whole number from 0 (in the trainer's own thread) to 4096, or 'auto'"
_Workers = Annotated[int | Literal["auto"], PlainValidator(_workers), Field(description=WORKERS_WANTED)]
_Folder = Annotated[
    str,
    AfterValidator(_folder),
    Field(description="a folder with a folder of images for each class, or 'digits:train' or 'digits:test'"),
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Model(_Section):
    """[model]: what is trained.

    Attributes:
        name: "small_cnn", or a model of keras.applications, which starts from random weights.
        image_size: (height, width) that pictures are resized to, in pixels.
        learning_rate: of Adam, at the start; it falls to zero over the training.
    """

    name: Annotated[str, AfterValidator(_model_name), Field(description="'small_cnn' or a model of keras.applications")]
    image_size: Annotated[
        list[Annotated[int, Field(ge=1, le=8192)]],
        Field(min_length=2, max_length=2, description="[height, width], each from 1 to 8192 pixels"),
    ]
    learning_rate: Annotated[float, Field(gt=0, le=10, description="a number above 0, at most 10")] = 0.001


class TestSource(_Section):
    """[test]: what is evaluated after every epoch.

    Attributes:
        folder: holds a folder of images for each class; "digits:test" is made at first use.
        batch_size: rows of a batch.
        workers: how many read and decode; "auto": as many as the training needs.
        fetchers: what they are: "thread" or "process". Decoding frees the interpreter lock, so threads are enough for it.
        feed: where batches go: by default TensorFlow's first GPU, or the host.
    """

    __test__ = False  # for pytest, which collects what is called Test

    folder: _Folder
    batch_size: _Count = 64
    workers: _Workers = 2
    fetchers: Annotated[Literal["thread", "process"], Field(description="'thread' or 'process'")] = "thread"
    feed: Annotated[str, Field(pattern=r"^tensorflow(:.+)?$", description=FEED_WANTED)] = "tensorflow"


class OnError(_Section):
    """[train.on_error]: as `iw.ErrorPolicy`, which says more.

    Attributes:
        retries: how often a failed read is tried again.
        backoff_s: wait before the first retry, in seconds, doubled for each.
        skip: skip rows that cannot be read, instead of ending the training.
        max_errors: how many may be skipped: a count, or a share such as 0.01; None: any number.
        quarantine: a file to which what was skipped is appended, a line of JSON each time.
    """

    retries: Annotated[int, Field(ge=0, le=1000, description="a whole number from 0 to 1000")] = 0
    backoff_s: Annotated[float, Field(ge=0, le=3600, description="seconds, from 0 to 3600")] = 0.1
    skip: Annotated[bool, Field(description="true or false")] = False
    max_errors: Annotated[int | float | None, PlainValidator(_max_errors), Field(description="a count or a share")] = None
    quarantine: Annotated[str | None, AfterValidator(_quarantine), Field(description="the path of a file")] = None

    def policy(self) -> ErrorPolicy:
        """Return it for the input service."""
        return ErrorPolicy(**self.model_dump())


class TrainSource(TestSource):
    """[train]: what is learnt from, in another order each epoch.

    Attributes:
        epochs: how often to go through it.
        ordered: the same batches, in the same order, at each run, whichever worker is faster.
        on_error: what becomes of rows that cannot be read.
    """

    epochs: _Count = 1
    ordered: Annotated[bool, Field(description="true or false")] = False
    on_error: Annotated[OnError, Field(description="a section [train.on_error]")] = OnError()


class Checkpoint(_Section):
    """[checkpoint]: where `--resume` goes on. Without this section nothing is saved.

    Attributes:
        folder: of the checkpoints of this training alone; made at the first one.
        every_epochs: after so many epochs, and after the last.
        every_batches: after so many training steps too; None: only at the ends of epochs.
        keep: how many are kept, the latest.
    """

    folder: Annotated[str, AfterValidator(_new_folder), Field(description="a folder, which may not be there yet")]
    every_epochs: _Count = 1
    every_batches: Annotated[_Count | None, Field(description=COUNT_WANTED)] = None
    keep: _Count = 3


class Metrics(_Section):
    """[metrics]: where Prometheus finds the numbers.

    Attributes:
        port: 0 takes a free one; the job prints which.
        host: the address to listen on.
    """

    port: Annotated[int, Field(ge=0, le=65535, description="a port, from 0 (any that is free) to 65535")] = 0
    host: Annotated[str, Field(min_length=1, description="an address of this machine, such as '127.0.0.1'")] = "127.0.0.1"


class Config(_Section):
    """A training job.

    Attributes:
        seed: of the shuffle and of the first weights.
    """

    seed: Annotated[int, Field(ge=0, le=2**32 - 1, description="a whole number from 0 to 4294967295")] = 0
    model: Annotated[Model, Field(description="a section [model]")]
    train: Annotated[TrainSource, Field(description="a section [train]")]
    test: Annotated[TestSource, Field(description="a section [test]")]
    metrics: Annotated[Metrics, Field(description="a section [metrics]")] = Metrics()
    checkpoint: Annotated[Checkpoint | None, Field(description="a section [checkpoint]")] = None


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read a configuration.

    Raises:
        ConfigError: it cannot be read, or is wrong: a line for each fault, with its path in the file.
    """
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}; wanted a TOML file") from error
    except ValueError as error:  # of UTF-8 or TOML
        raise ConfigError(f"{name}: is no TOML: {error}") from error
    try:
        return Config.model_validate(content, context=os.path.dirname(os.path.abspath(name)))
    except ValidationError as error:
        faults = sorted(_describe(fault) for fault in error.errors(include_url=False))
        raise ConfigError("\n".join(f"{name}: {fault}" for fault in faults)) from None


def _describe(fault: Mapping[str, Any]) -> str:
    """Return "train.batch_size: got -1; wanted a whole number of at least 1"."""
    location: tuple[str | int, ...] = fault["loc"]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).removeprefix(".")
    if fault["type"] == "extra_forbidden":
        return f"{path}: is unknown; {_nearest(str(location[-1]), _section(location[:-1]).model_fields)}"
    wanted = _wanted(location)
    if fault["type"] == "missing":
        return f"{path}: is missing; wanted {wanted}"
    got = repr(fault["input"])
    got = got if len(got) <= MAX_SHOWN_CHARS else f"{got[:MAX_SHOWN_CHARS]}..."
    if fault["type"] == "value_error":
        return f"{path}: got {got}; {fault['ctx']['error']}"
    return f"{path}: got {got}; wanted {wanted}"


MAX_SHOWN_CHARS = 200


def _section(location: tuple[str | int, ...]) -> type[BaseModel]:
    section: type[BaseModel] = Config
    for part in location:
        annotation = section.model_fields[str(part)].annotation
        choices = [annotation, *typing.get_args(annotation)]  # of `Checkpoint | None` too
        section = next(each for each in choices if isinstance(each, type) and issubclass(each, BaseModel))
    return section


def _wanted(location: tuple[str | int, ...]) -> str:
    *section, name = (part for part in location if isinstance(part, str))
    return str(_section(tuple(section)).model_fields[name].description)


def _nearest(got: str, known: Any) -> str:
    near = difflib.get_close_matches(got.lower(), [each.lower() for each in known], n=1)
    for each in known:
        if near and each.lower() == near[0]:
            return f"did you mean {each!r}?"
    return f"wanted one of {', '.join(known)}"
