"""The verdict: of pipelines whose bottleneck is known, it names that one, and what it advises would help."""

import collections
from dataclasses import replace

import pytest
from metrics.pipeline_simulator import Pipeline, Simulator, random_pipeline

from input_workers.metrics.snapshot import StageShares, WindowStats
from input_workers.metrics.verdict import HELD, VERDICTS, Setting, judge, workers_wanted
from input_workers.metrics.windows import Counters, Marks, window_of

WARM, END = 20.0, 80.0  # simulated seconds


def window(**changes):
    """A window of a fetch-bound source, but for the changes."""
    usual = WindowStats(
        seconds=10.0,
        trainer_wait=0.31,
        fetchers=StageShares(0.97, 0.03, 0.0),
        fetchers_alive=4.0,
        fetcher_cores=0.2,
        enqueuer=StageShares(0.1, 0.9, 0.0),
        feed=0.02,
        device_queue_depth=0.0,
        rows_per_second=100.0,
        batches=100,
        batches_not_ready=0,
    )
    return replace(usual, **changes)


def simulated(pipeline, seed=0):
    simulator = Simulator(pipeline, seed)
    simulator.run_until(WARM)
    begin = simulator.read()
    simulator.run_until(END)
    return window_of(begin, simulator.read())


def setting(pipeline):
    return Setting(workers=pipeline.fetchers, cores=16)


def test_random_pipelines_are_attributed_to_the_stage_that_is_slowest():
    wrong, seen = [], collections.Counter()
    for seed in range(100):
        pipeline = random_pipeline(seed)
        measured = simulated(pipeline, seed)
        word, text = judge(measured, setting(pipeline))
        seen[pipeline.bottleneck] += 1
        if word != pipeline.bottleneck:
            wrong.append((seed, word, pipeline, measured))
        elif word == "fetch":
            assert ("GIL" in text) == pipeline.turns, (pipeline, text)
            if not pipeline.turns:
                assert ("of that copying rows into batches" in text) == (pipeline.copying_part > 0.3), (pipeline, text)
    assert len(wrong) <= 1, wrong  # the seeds are fixed, and none is wrong
    assert min(seen[stage] for stage in ("fetch", "enqueue", "feed", "trainer")) >= 10, seen


@pytest.mark.parametrize("workers", [1, 2, 4, 7])
@pytest.mark.parametrize("missing", [1.3, 1.9, 3.2])
def test_the_number_of_workers_that_is_advised_would_do_and_few_less_would_not(workers, missing):
    pipeline = Pipeline(fetchers=workers, fetch_s=0.02 * workers * missing, train_s=0.02)
    measured = simulated(pipeline)
    word, text = judge(measured, setting(pipeline))
    wanted = workers_wanted(measured, workers)
    assert word == "fetch"
    assert f"({workers} -> {wanted} would do)" in text
    assert simulated(replace(pipeline, fetchers=wanted)).trainer_wait < 0.05
    assert wanted - 1 <= workers * missing  # one less would not, but for a share of one


def test_the_sentence_says_how_long_the_trainer_waits_and_what_to_do():
    word, text = judge(window(), Setting(workers=4, cores=8, slowest_part="decode"))
    assert word == "fetch"
    assert text == (
        "trainer waits 31 % of its time; fetchers are busy 97 %: add workers (4 -> 6 would do) or make fetch faster; "
        "slowest part: decode"
    )


def test_a_trainer_that_only_waits_gets_no_number_out_of_nothing():
    assert workers_wanted(window(trainer_wait=1.0), 4) is None
    assert "more than 8 times as many" in judge(window(trainer_wait=1.0), Setting(workers=4, cores=8)).text


def test_threads_that_use_one_core_together_are_said_to_hold_the_interpreter_lock():
    one_core = window(fetcher_cores=1.0)
    assert "fetchers='process'" in judge(one_core, Setting(workers=4, cores=8)).text
    assert "GIL" not in judge(one_core, Setting(fetchers="process", workers=4, cores=8)).text
    assert "GIL" not in judge(one_core, Setting(workers=4, cores=1)).text  # there they could not do otherwise
    assert "GIL" not in judge(replace(one_core, fetchers_alive=1.0), Setting(workers=1, cores=8)).text
    assert "GIL" not in judge(replace(one_core, fetcher_cores=3.5), Setting(workers=4, cores=8)).text
    # Both at once cannot be, unless whoever is to hand a batch over does not get to run.
    late = window(fetcher_cores=0.6, trainer_wait=0.9, enqueuer=StageShares(0.1, 0.3, 0.6))
    assert judge(late, Setting(workers=4, cores=8)).word == "fetch"
    assert "GIL" in judge(late, Setting(workers=4, cores=8)).text
    assert "GIL" not in judge(late, Setting(workers=4, cores=8, devices=2)).text


@pytest.mark.parametrize("fetchers", ["thread", "process"])
def test_fetchers_that_use_all_cores_are_not_told_to_become_more(fetchers):
    text = judge(window(fetcher_cores=3.8), Setting(fetchers=fetchers, workers=4, cores=4)).text
    assert "3.8 of 4 cores" in text
    assert "add workers" not in text


def test_processes_that_use_all_cores_are_not_told_to_become_more():
    text = judge(window(fetcher_cores=1.45, fetchers_alive=2.0), Setting(fetchers="process", workers=2, cores=1.5)).text
    assert "1.4 of 1.5 cores" in text


@pytest.mark.parametrize(
    ("held_by", "says"),
    [
        ("", "workers are being added (now 4)"),
        ("max_workers", "raise max_workers (now 4)"),
        ("bytes", "max_buffered_bytes: raise it"),
        ("cores", "4 workers have all the cores"),
        ("gain", "more than 4 workers do not fetch more"),
        ("start", "more than 4 workers could not be started"),
        ("end", "the first have no more data"),
    ],
)
def test_where_the_number_follows_by_itself_nobody_is_told_to_change_it(held_by, says):
    text = judge(window(), Setting(workers=4, cores=8, held_by=held_by)).text
    assert says in text
    assert "add workers" not in text
    assert set(HELD) | {""} >= {held_by}


@pytest.mark.parametrize("fetchers", ["thread", "process"])
def test_fetchers_that_copy_for_a_large_part_of_their_time_are_told_how_to_copy_less(fetchers):
    word, text = judge(window(copying=0.485), Setting(fetchers=fetchers, workers=4, cores=8, slowest_part="decode"))
    keeps = ", in arrays that fetch does not keep" if fetchers == "thread" else ""
    assert word == "fetch"
    assert text == (
        "trainer waits 31 % of its time; fetchers are busy 97 %, 50 % of that copying rows into batches: return exactly one "
        f"batch a call{keeps}, or at least more rows; or add workers (4 -> 6 would do), which copy in parallel; slowest part: "
        "decode"
    )


def test_copying_is_named_from_a_quarter_of_the_busy_time_on():
    for busy in (0.97, 0.6, 0.3):
        shares = StageShares(busy, 0.0, 1.0 - busy)
        assert "copying" in judge(window(fetchers=shares, copying=0.26 * busy), Setting(workers=4, cores=8)).text
        assert "copying" not in judge(window(fetchers=shares, copying=0.24 * busy), Setting(workers=4, cores=8)).text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"is_stream": True}, "fetch exactly one batch a request and write it into request.out, or at least more rows"),
        ({"is_stream": True, "fetchers": "process"}, "return exactly one batch a call, or at least more rows"),
        ({"rebatch": False}, "return arrays that fetch does not keep"),
        ({"rebatch": False, "is_stream": True}, "write into request.out"),
        ({"keeps_chunks": False}, "return more rows a call"),
        ({"keeps_chunks": False, "is_stream": True}, "return more rows a call"),
    ],
)
def test_how_to_copy_less_is_what_would_help_this_source(changes, says):
    text = judge(window(copying=0.9), Setting(workers=4, cores=8, **changes)).text
    assert f"copying rows into batches: {says}" in text


def test_chunks_of_a_batch_or_more_are_not_told_to_become_larger():
    large = window(copying=0.9, batches_per_call=1.0)
    text = judge(large, Setting(workers=4, cores=8)).text
    assert "return exactly one batch a call, in arrays that fetch does not keep; or add workers" in text
    assert "return fewer bytes" in judge(large, Setting(workers=4, cores=8, keeps_chunks=False)).text
    late = replace(
        large, fetchers=StageShares(0.5, 0.0, 0.5), copying=0.5, trainer_wait=0.95, enqueuer=StageShares(0.2, 0.8, 0.0)
    )
    assert judge(late, Setting(workers=2, cores=2)).text.endswith("use a larger batch_size")
    late = replace(late, batches_per_call=16.0)
    assert judge(late, Setting(workers=2, cores=2)).text.endswith("use a larger batch_size, or smaller chunks")


def test_the_rows_of_a_call_are_told_in_batches():
    found = window_of(Counters(0.0), Counters(10.0, rows_fetched=600, calls=12, rows_delivered=500, batches=20))
    assert found.batches_per_call == 2.0


def test_workers_that_mostly_copy_are_not_told_to_become_more_than_the_cores():
    assert "add workers (2 -> 3 would do)" in judge(window(copying=0.6), Setting(workers=2, cores=4)).text
    assert "add workers" not in judge(window(copying=0.6), Setting(workers=4, cores=4)).text
    assert "add workers" in judge(window(copying=0.4), Setting(workers=4, cores=4)).text
    held = judge(window(copying=0.6), Setting(workers=4, cores=8, held_by="gain")).text
    assert "fetch does not keep, or at least more rows; more than 4 workers do not fetch more" in held


def test_copying_that_uses_one_core_is_not_taken_for_the_interpreter_lock():
    copies = window(copying=0.25, fetcher_cores=1.1)
    assert "GIL" not in judge(copies, Setting(workers=4, cores=8)).text
    assert "GIL" in judge(replace(copies, copying=0.1), Setting(workers=4, cores=8)).text


def test_many_tiny_batches_are_the_enqueuers_and_a_larger_batch_size_is_advised():
    tiny = window(trainer_wait=0.9, fetchers=StageShares(0.2, 0.0, 0.8), enqueuer=StageShares(0.4, 0.5, 0.1))
    assert judge(tiny, Setting(workers=2, cores=2)) == (
        "enqueue",
        "trainer waits 90 % of its time; the enqueuer is busy 40 % with laying out and sending batches, while fetchers are "
        "blocked 80 %: use a larger batch_size",
    )
    assert judge(tiny, Setting(devices=2)).text.endswith(": use a larger batch_size, or fewer devices")
    assert judge(tiny, Setting(rebatch=False)).text.endswith(": return larger chunks, each of which is a batch")
    assert judge(replace(tiny, feed=0.3), Setting()).word == "feed"


def test_threads_that_all_wait_at_the_same_time_wait_for_each_other():
    late = window(trainer_wait=0.95, fetchers=StageShares(0.35, 0.0, 0.65), copying=0.3, enqueuer=StageShares(0.15, 0.8, 0.05))
    word, text = judge(late, Setting(workers=2, cores=2))
    assert word == "enqueue"
    assert "fetchers are blocked 65 %, and the enqueuer is busy only 15 %: they wait for each other" in text
    assert judge(late, Setting(workers=2, cores=2, has_turns=True)).word == "fetch"  # one fetcher's call holds up the others
    # Where calls of the fetch function run most of the time, it is they that keep the others from running.
    calls = replace(late, copying=0.02, fetcher_cores=0.8)
    assert "fetch holds the GIL" in judge(calls, Setting(workers=4, cores=2)).text
    assert judge(calls, Setting(fetchers="process", workers=4, cores=2)).word == "enqueue"


def test_fetchers_without_data_are_not_told_to_become_more():
    text = judge(window(fetchers=StageShares(0.2, 0.8, 0.0)), Setting(workers=4, cores=8)).text
    assert "have no data 80 % of their time" in text
    assert "add workers" not in text


def test_copies_that_come_late_are_the_feeds_whatever_else_is():
    late = window(trainer_wait=0.0, batches_not_ready=11)
    assert judge(late, Setting()).word == "feed"
    assert judge(replace(late, batches_not_ready=10), Setting()).word == "trainer"


def test_a_slow_device_that_holds_up_another_is_the_trainers():
    word, text = judge(window(trainer_wait=0.4, enqueuer=StageShares(0.1, 0.0, 0.9)), Setting(devices=2))
    assert word == "trainer"
    assert "slowest of several devices" in text


def test_in_the_trainers_own_thread_workers_are_advised():
    inline = window(trainer_wait=0.8, enqueuer=StageShares(0.1, 0.9, 0.0))
    assert judge(inline, Setting(fetchers="inline", workers=0)) == (
        "fetch",
        "trainer waits 80 % of its time; fetch runs in the trainer's own thread: use num_workers=1 or more",
    )
    assert judge(replace(inline, enqueuer=StageShares(0.7, 0.3, 0.0)), Setting(fetchers="inline")).word == "enqueue"


def test_before_the_first_batch_and_after_a_stop_the_words_say_so():
    assert judge(window(batches=0), Setting(state="starting")).word == "starting"
    word, text = judge(window(), Setting(state="stopped", workers=4, cores=8))
    assert word == "stopped"
    assert "fetch): trainer waits 31 %" in text
    assert judge(window(batches=0), Setting(state="stopped")).text == "stopped; too few batches to say who waited"
    assert judge(window(), Setting()).word in VERDICTS


def test_a_window_begins_where_its_name_says_between_two_readings():
    marks = Marks(Counters(0.0))
    for second in range(1, 101):
        if marks.is_due(float(second)):
            marks.add(Counters(float(second), trainer_wait=max(0, second - 95), batches=second, rows_delivered=second**2))
    windows = marks.windows(Counters(100.5, trainer_wait=5.5, batches=100, rows_delivered=10_000))
    ten, sixty, run = (window_of(*windows[name]) for name in ("10s", "60s", "run"))
    assert (ten.seconds, sixty.seconds, run.seconds) == (10.0, 60.0, 99.5)  # of the run: from its first batch
    assert ten.trainer_wait == pytest.approx(0.55)
    assert sixty.trainer_wait == pytest.approx(5.5 / 60)
    assert ten.rows_per_second == pytest.approx((10_000 - (90**2 + 91**2) / 2) / 10)


def test_a_window_over_a_gap_without_readings_is_no_longer_than_its_name_says():
    marks = Marks(Counters(0.0))
    marks.add(Counters(1.0, batches=1))
    found = window_of(*marks.windows(Counters(101.0, trainer_wait=50.0, batches=1))["10s"])
    assert found.seconds == 10.0
    assert found.trainer_wait == pytest.approx(0.5)


def test_the_windows_of_a_run_that_has_ended_stand_still():
    marks = Marks(Counters(0.0))
    marks.add(Counters(1.0, batches=1))
    marks.last = Counters(3.0, trainer_wait=1.0, batches=9)
    marks.add(Counters(5.0, trainer_wait=3.0, batches=9))
    found = {name: window_of(*pair) for name, pair in marks.windows(Counters(500.0, trainer_wait=400.0, batches=9)).items()}
    assert {name: each.seconds for name, each in found.items()} == {"10s": 2.0, "60s": 2.0, "run": 2.0}
    assert found["run"].trainer_wait == 0.5


def test_a_run_that_ended_before_its_first_batch_was_noted_does_not_begin_afterwards():
    marks = Marks(Counters(0.0))
    marks.last = Counters(3.0, batches=2)
    marks.add(Counters(5.0, batches=4))
    assert not marks.has_begun
    assert window_of(*marks.windows(Counters(9.0, batches=4))["run"]).seconds == 3.0
