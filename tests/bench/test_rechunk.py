"""The benchmarks run, count every row and say when a target is missed; their figures are for people to read."""

import collections
import time

import numpy as np
import pytest

import input_workers as iw
from input_workers.bench import bare, chunks, measure, rechunk, workloads

ROW = (3,)


def test_a_ratio_is_the_median_of_ratios_within_a_round():
    rates = {"ours": [1.0, 20.0, 3.0], "limit": [2.0, 20.0, 30.0]}
    assert measure.median_ratio(rates, "ours", "limit") == 0.5


def test_sides_take_turns():
    order = []
    sides = {name: lambda name=name: order.append(name) or 1.0 for name in ("a", "b")}
    assert measure.compare(sides, rounds=2) == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert order == ["a", "b", "a", "b"]


@pytest.mark.parametrize(
    ("value", "target", "at_most", "met"),
    [
        (0.6, 0.6, False, True),
        (0.5, 0.6, False, False),
        (0.5, 0.6, True, True),
        (0.7, 0.6, True, False),
        (1, None, False, True),
    ],
)
def test_a_target_is_met_or_not(value, target, at_most, met):
    assert measure.Result("x", value, target, "", "", at_most).met is met


def test_what_could_not_be_measured_is_not_met_and_says_so():
    result = measure.Result("x", None, 0.6, "", "pip install something")
    assert not result.met
    assert "not measured" in measure.table([result])


def test_a_missed_target_is_marked():
    assert measure.table([measure.Result("x", 0.1, 0.6, "", "")]).startswith("NO")
    assert measure.table([measure.Result("x", 0.7, 0.6, "", "")]).startswith("ok")


def test_a_part_that_does_not_exist_is_an_error_that_lists_the_parts(capsys):
    with pytest.raises(iw.ConfigError, match="unknown part 'nosuch'; the parts are small, decode"):
        measure.report({"small": list, "decode": list}, "nosuch")
    assert not capsys.readouterr().out


def test_processor_time_counts_work_and_no_waiting():
    watch = measure.Stopwatch()
    with watch.running():
        time.sleep(0.1)
    assert watch.seconds >= 0.1
    assert watch.processor_seconds < 0.05
    assert measure.Drained(1000, 2.0, 0.5).rate == 500
    assert measure.Drained(1000, 2.0, 0.5).processor_us == 500


def test_chunks_are_handed_over_without_a_reference_left_behind():
    made = chunks.make_chunks([2, 3], (4,))
    assert isinstance(made, collections.deque)
    fetch = chunks.hand_over(made)
    assert [len(fetch(0, 1)[1]) for _ in range(2)] == [2, 3]
    assert not made
    with pytest.raises(iw.EndOfData):
        fetch(0, 1)


def test_the_chunks_of_a_data_set_are_slices_of_it():
    data_set = chunks.DataSet([1, 64, 3], rows=100)
    sliced = list(data_set.chunks())
    assert [len(label) for _, label in sliced] == [1, 64, 3]
    assert all(np.shares_memory(data, data_set.data) for data, _ in sliced)
    assert data_set.rows == 68


def test_each_fetcher_has_a_buffer_of_its_own(monkeypatch):
    fetched = {}

    def read(fetch, rows, workers):
        fetched.update({worker: [fetch(worker, 1)[0] for _ in range(2)] for worker in range(workers)})

    monkeypatch.setattr(chunks, "drain_all", read)
    chunks.read_buffers([1, 5, 2, 3])
    assert np.shares_memory(*fetched[0])
    assert not np.shares_memory(fetched[0][0], fetched[1][0])


@pytest.mark.parametrize(
    "read",
    [
        lambda: chunks.read_handed_over([1, 64, 128]),
        lambda: chunks.read_resident(chunks.DataSet([1, 64, 128], rows=200), workers=3),
        lambda: chunks.read_buffers([1, 64, 128]),
    ],
    ids=["handed over", "resident", "buffers"],
)
def test_every_row_is_read(read):
    assert read().rows == 193


@pytest.mark.parametrize("ordered", [True, False])
def test_every_row_of_every_epoch_is_read(ordered):
    assert chunks.read_in_order(chunks.DataSet([1], rows=100), ordered, epochs=2).rows == 200


def test_two_bare_threads_copy_every_row_once(monkeypatch):
    copied = []
    monkeypatch.setattr(bare, "_copy", lambda made, slots: copied.extend(len(label) for _, label in made) or 1)
    assert bare.copy_in_threads(list(chunks.make_chunks([1, 5, 200, 3], ROW)), ROW, 2) > 0
    assert sorted(copied) == [1, 3, 5, 200]


def test_a_bare_copy_counts_its_rows():
    slots = bare._make_slots(ROW)
    assert bare._copy(chunks.make_chunks([1, 5, 200, 3] * 20, ROW), slots) == 209 * 20
    assert all((data == 1).all() and (label == 1).all() for data, label in slots)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_fails_is_no_figure():
    with pytest.raises(RuntimeError, match="1 of 2 threads have failed"):
        bare._run_threads([lambda: 1, lambda: 1 // 0])


@pytest.mark.parametrize("read", [bare.decode_pictures, bare.assemble_pictures])
def test_bare_threads_decode_every_picture(read, tmp_path, monkeypatch):
    pytest.importorskip("cv2")
    decoded = []
    monkeypatch.setattr(bare, "_decoder", lambda size: lambda path, out: decoded.append((path, out.shape)))
    paths = [str(number) for number in range(130)]
    assert read(paths, (4, 5)) > 0
    assert sorted(decoded) == sorted((path, (4, 5, 3)) for path in paths)


def test_pictures_are_written_and_decoded(tmp_path):
    pytest.importorskip("cv2")
    paths = workloads.write_pictures(str(tmp_path), 20)
    assert bare.decode_pictures(paths, (8, 8)) > 0
    assert workloads.read_pictures(str(tmp_path), 16).rows == 20


def rechunk_tiny(sizes, read=None, **options):
    return rechunk.rechunk(
        "tiny",
        lambda: chunks.make_chunks(sizes, ROW),
        read or (lambda: measure.drain_all(chunks.hand_over(chunks.make_chunks(sizes, ROW)), sum(sizes), 2)),
        0.0,
        ROW,
        **options,
    )


def test_the_lines_of_a_rechunk_have_a_note_with_the_rate():
    (result,) = rechunk_tiny([1, 5, 200, 3] * 20)
    assert result.value > 0
    assert "rows/s" in result.note


def test_beside_torchdata_there_is_processor_time_whose_target_is_torchdatas():
    of_copy, of_peer, used = rechunk_tiny([1, 5, 200, 3] * 20, peer_target=2.0)
    assert of_copy.value > 0
    assert (of_peer.target, used.at_most) == (2.0, True)
    assert used.value > 0
    assert used.target > 0


def test_without_torchdata_its_lines_are_not_measured(monkeypatch):
    monkeypatch.setattr(rechunk.importlib.util, "find_spec", lambda name: None)
    _, of_peer, used = rechunk_tiny([10], peer_target=2.0)
    assert of_peer.value is None
    assert used.value > 0
    assert used.target is None


def test_a_benchmark_that_loses_rows_fails(monkeypatch):
    monkeypatch.setattr(measure, "drain", lambda *args, **options: measure.Drained(1, 1.0, 1.0))
    with pytest.raises(RuntimeError, match="1 of 10 rows"):
        rechunk_tiny([10])


def test_copying_is_measured_for_one_to_four_fetchers_of_one_and_two_threads(monkeypatch):
    monkeypatch.setattr(rechunk, "LARGE_ROWS", 8)
    names = [result.name for result in rechunk.copying()]
    assert len(names) == 8
    assert sum("of one bare thread" in name for name in names) == 4
    assert any("4 fetchers, of two bare threads" in name for name in names)


def test_large_arrays_and_waits_and_many_sources_are_counted(monkeypatch):
    monkeypatch.setattr(workloads, "PICTURES", (2, 4, 4, 3))
    assert workloads.make_large_arrays(iw.Threads(), batches=30) > 0
    assert 0 < workloads.wait_in_fetchers(calls=3, workers=2) <= 1.1
    cost = workloads.run_many_sources(3, 0.3)
    assert cost.processor_us > 0
    assert cost.start_s > 0
