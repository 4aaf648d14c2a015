"""The configuration: every fault at once, each with its place and its remedy."""

import subprocess
import sys
from pathlib import Path

import pytest

import input_workers as iw
from input_workers.config import KERAS_MODELS, Checkpoint, Metrics, load_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))

GOOD = """
seed = 7
[model]
name = "small_cnn"
image_size = [16, 24]
learning_rate = 1
[train]
folder = "digits:train"
batch_size = 8
epochs = 3
[test]
folder = "digits:test"
"""


@pytest.fixture
def load(tmp_path):
    def load_text(text):
        path = tmp_path / "job.toml"
        path.write_text(text)
        return load_config(path)

    return load_text


def faults(load, text):
    with pytest.raises(iw.ConfigError) as caught:
        load(text)
    return [line.partition("job.toml: ")[2] for line in str(caught.value).splitlines()]


def test_there_are_configurations_to_load():
    assert {path.name for path in CONFIGS} >= {"digits.toml", "image_folder.toml"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_configuration_that_comes_with_the_package_loads(path, tmp_path):
    copy = tmp_path / path.name
    copy.write_text(path.read_text())
    for part in ("train", "test"):  # where a configuration says that the user's images are
        (tmp_path / "images" / part).mkdir(parents=True)
    assert load_config(copy).train.epochs > 1


def test_values_and_defaults_are_read(load):
    config = load(GOOD)
    assert (config.seed, config.model.name, config.model.image_size) == (7, "small_cnn", [16, 24])
    assert config.model.learning_rate == 1.0
    assert (config.train.folder, config.train.batch_size, config.train.epochs) == ("digits:train", 8, 3)
    assert (config.test.batch_size, config.test.workers, config.test.feed) == (64, 2, "tensorflow")
    assert config.metrics == Metrics(port=0, host="127.0.0.1")
    assert config.checkpoint is None
    assert config.train.ordered is False
    assert config.train.on_error.policy() == iw.ErrorPolicy()


def test_workers_are_a_number_or_as_many_as_are_needed(load):
    assert load(GOOD.replace("epochs = 3", "epochs = 3\nworkers = 'auto'")).train.workers == "auto"
    assert load(GOOD.replace("epochs = 3", "epochs = 3\nworkers = 0")).train.workers == 0


def test_checkpoints_are_relative_to_the_file_and_need_not_be_there(load, tmp_path):
    assert load(GOOD + '[checkpoint]\nfolder = "a/b"\n').checkpoint == Checkpoint(folder=str(tmp_path / "a" / "b"))
    config = load(GOOD + '[checkpoint]\nfolder = "."\nevery_batches = 5\nevery_epochs = 2\nkeep = 1\n')
    checkpoint = config.checkpoint
    assert (checkpoint.folder, checkpoint.every_batches, checkpoint.every_epochs) == (str(tmp_path), 5, 2)
    assert checkpoint.keep == 1
    assert [*tmp_path.iterdir()] == [tmp_path / "job.toml"]


def test_what_becomes_of_errors_is_the_error_policy(load, tmp_path):
    config = load(
        GOOD.replace("[test]", "ordered = true\n[train.on_error]\nretries = 2\nbackoff_s = 1\nskip = true\n"
        'max_errors = 0.5\nquarantine = "bad.jsonl"\n[test]')
    )  # fmt: skip
    assert config.train.ordered is True
    quarantine = str(tmp_path / "bad.jsonl")
    assert config.train.on_error.policy() == iw.ErrorPolicy(2, 1.0, skip=True, max_errors=0.5, quarantine=quarantine)
    with_count = load(GOOD.replace("[test]", "[train.on_error]\nskip = true\nmax_errors = 1\n[test]"))
    assert type(with_count.train.on_error.policy().max_errors) is int


def test_folders_are_relative_to_the_file_and_may_begin_at_home(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a" / "b").mkdir(parents=True)
    config = load(GOOD.replace("digits:train", "a/b").replace("digits:test", "~/a"))
    assert (config.train.folder, config.test.folder) == (str(tmp_path / "a" / "b"), str(tmp_path / "a"))


def test_all_faults_are_named_at_once_each_with_its_path(load, tmp_path):
    text = """
    sed = 1
    [model]
    name = "MobilNetV2"
    image_size = [16]
    learning_rate = nan
    [train]
    folder = "digits:trian"
    batchsize = 8
    batch_size = -1
    workers = true
    epochs = "3"
    ordered = 1
    [train.on_error]
    retries = -1
    backoff_s = inf
    skip = "no"
    max_errors = 1.5
    quarantine = "nowhere/bad.jsonl"
    retry = 1
    [metrics]
    port = 65536
    [checkpoint]
    every_batches = 0
    every_epoch = 1
    keep = "3"
    """
    assert faults(load, text) == [
        "checkpoint.every_batches: got 0; wanted a whole number from 1 to 1000000",
        "checkpoint.every_epoch: is unknown; did you mean 'every_epochs'?",
        "checkpoint.folder: is missing; wanted a folder, which may not be there yet",
        "checkpoint.keep: got '3'; wanted a whole number from 1 to 1000000",
        "metrics.port: got 65536; wanted a port, from 0 (any that is free) to 65535",
        "model.image_size: got [16]; wanted [height, width], each from 1 to 8192 pixels",
        "model.learning_rate: got nan; wanted a number above 0, at most 10",
        "model.name: got 'MobilNetV2'; did you mean 'MobileNetV2'?",
        "sed: is unknown; did you mean 'seed'?",
        "test: is missing; wanted a section [test]",
        "train.batch_size: got -1; wanted a whole number from 1 to 1000000",
        "train.batchsize: is unknown; did you mean 'batch_size'?",
        "train.epochs: got '3'; wanted a whole number from 1 to 1000000",
        "train.folder: got 'digits:trian'; did you mean 'digits:train'?",
        "train.on_error.backoff_s: got inf; wanted seconds, from 0 to 3600",
        "train.on_error.max_errors: got 1.5; wanted a count of rows, or a share from 0.0 to 1.0 of those tried",
        f"train.on_error.quarantine: got 'nowhere/bad.jsonl'; {str(tmp_path / 'nowhere' / 'bad.jsonl')!r} cannot be a file; "
        "wanted the path of one in a folder that is there",
        "train.on_error.retries: got -1; wanted a whole number from 0 to 1000",
        "train.on_error.retry: is unknown; did you mean 'retries'?",
        "train.on_error.skip: got 'no'; wanted true or false",
        "train.ordered: got 1; wanted true or false",
        "train.workers: got True; wanted a whole number from 0 (in the trainer's own thread) to 4096, or 'auto'",
    ]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("seed = 7", "seed = 1.5", "seed: got 1.5; wanted a whole number"),
        ("epochs = 3", "workers = 'many'", "train.workers: got 'many'; wanted a whole number from 0"),
        ("epochs = 3", "workers = 4097", "train.workers: got 4097; wanted a whole number from 0"),
        ("seed = 7", "seed = -1", "seed: got -1; wanted a whole number"),
        ("[16, 24]", "[16, 0]", "model.image_size[1]: got 0; wanted [height, width]"),
        ("[16, 24]", "16", "model.image_size: got 16; wanted [height, width]"),
        ('"small_cnn"', '"zzz"', "model.name: got 'zzz'; wanted one of small_cnn, ConvNeXtBase"),
        ('"small_cnn"', "3", "model.name: got 3; wanted 'small_cnn' or"),
        ("learning_rate = 1", "learning_rate = 0", "model.learning_rate: got 0; wanted a number above 0"),
        ("epochs = 3", 'feed = "torch:cpu"', "train.feed: got 'torch:cpu'; wanted 'tensorflow', 'tensorflow:/GPU:0' or "),
        ("[test]", "[test]\nfeed = 3", "test.feed: got 3; wanted 'tensorflow', 'tensorflow:/GPU:0' or 'tensorflow:/CPU:0'"),
        ("digits:train", "nowhere", "train.folder: got 'nowhere'; there is no folder"),
        ("digits:train", "a\\u0000b", "train.folder: got 'a\\x00b'; there is no folder"),
        ("digits:test", "digits:tests", "test.folder: got 'digits:tests'; did you mean 'digits:test'?"),
        ("[test]", "[test.more]", "test.folder: is missing; wanted a folder"),
        ("[test]", "[[test]]", "test: got [{'folder': 'digits:test'}]; wanted a section [test]"),
        ("seed = 7", "metrics = 3", "metrics: got 3; wanted a section [metrics]"),
        ("seed = 7", "checkpoint = 3", "checkpoint: got 3; wanted a section [checkpoint]"),
        ("seed = 7", 'checkpoint.folder = "job.toml"', "checkpoint.folder: got 'job.toml'; '"),
        ("seed = 7", 'checkpoint.folder = ""', "checkpoint.folder: got ''; wanted a path"),
        ("epochs = 3", "on_error = true", "train.on_error: got True; wanted a section [train.on_error]"),
        ("epochs = 3", "on_error.max_errors = 3", "train.on_error.max_errors: got 3; it says what may be skipped; wanted skip"),
        ("epochs = 3", "on_error = {skip = true, max_errors = true}", "train.on_error.max_errors: got True; wanted a count"),
        ("epochs = 3", "on_error.quarantine = 'x'", "train.on_error.quarantine: got 'x'; it says what may be skipped; wanted"),
        ("seed = 7", f'seed = "{"x" * 1000}"', f"seed: got '{'x' * 199}...; wanted a whole number"),
    ],
)
def test_each_fault_says_what_was_wanted(load, old, new, fault):
    assert any(line.startswith(fault) for line in faults(load, GOOD.replace(old, new)))


def test_what_is_no_toml_is_an_error_with_its_line(load, tmp_path):
    with pytest.raises(iw.ConfigError, match=r"job.toml: is no TOML: .*line 2"):
        load("seed = 1\n[model\n")
    (tmp_path / "latin").write_bytes(b"# \xe9")
    with pytest.raises(iw.ConfigError, match="is no TOML"):
        load_config(tmp_path / "latin")


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(iw.ConfigError, match=r"missing.toml: cannot be read: No such file"):
        load_config(tmp_path / "missing.toml")
    with pytest.raises(iw.ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_importing_the_package_does_not_load_pydantic():
    code = "import sys, input_workers; print({'pydantic', 'rich', 'cv2', 'tensorflow'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "set()", result.stderr


@pytest.mark.tensorflow
def test_the_models_that_may_be_named_are_those_of_keras():
    keras = pytest.importorskip("keras")
    found = {name for name in dir(keras.applications) if name[0].isupper() and callable(getattr(keras.applications, name))}
    assert set(KERAS_MODELS) == found
