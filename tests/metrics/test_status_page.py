"""The live page, in a real browser: what stats() says is on it, whatever happens to the trainer."""

import dataclasses
import itertools
import math
import re
import time
import urllib.request

from gates import Gate, await_true, register
from metrics.http_client import get, source
from metrics.shown import broken, finished

import input_workers as iw
from input_workers.metrics import windows

NONE = "\N{EN DASH}"
NASTY = "<script>document.title = 'owned'</script> <b>\"it's\"</b> &amp; üñí 日本\n  second line"


def percent(share):
    return f"{math.floor(share * 100 + 0.5)} %"


def seconds(value):
    if value == 0:
        return "0 s"
    if value < 1e-3:
        return f"{math.floor(value * 1e6 + 0.5)} µs"
    return f"{value:,.1f} s" if value >= 1 else f"{value * 1e3:,.1f} ms"


def test_what_stats_says_is_on_the_page(page):
    coordinator = finished()
    stats = coordinator["train"].stats()
    run = stats.windows["run"]
    with iw.serve_metrics(0, coordinator=coordinator, rank=3) as server:
        page.open(server)
        assert page.text(".verdict") == stats.verdict_text
        assert page.text(".state") == "stopped"
        assert ", rank 3, " in page.text("[data-v=process]")
        ledger = dict(page.rows("Ledger"))
        assert ledger == {
            "fetched": f"{stats.rows_fetched}",
            "delivered": f"{stats.rows_delivered}",
            "in flight": f"{stats.rows_in_flight}",
            **{f"dropped: {why.replace('_', ' ')}": f"{rows}" for why, rows in stats.rows_dropped.items() if rows},
        }
        assert "dropped: skipped error" in ledger
        assert dict(page.rows("Failed calls")) == {name: f"{calls}" for name, calls in stats.fetch_errors.items()}
        assert [row[0] for row in page.rows("Devices")] == list(stats.devices)
        for shown, device in zip(page.rows("Devices"), stats.devices.values(), strict=True):
            assert shown[2:4] == [f"{device.rows_delivered}", f"{device.queue_depth}"]
            assert shown[4] == seconds(device.wait_seconds)
        parts = {"whole call": stats.fetch, **stats.fetch_parts}
        assert {row[0]: row[1] for row in page.rows("Fetch calls")} == {name: f"{each.count}" for name, each in parts.items()}
        assert {row[0]: row[3] for row in page.rows("Fetch calls")} == {
            name: percent(each.seconds / stats.fetch.seconds) for name, each in parts.items()
        }
        shares = {row[0]: row[1:] for row in page.rows("Where the time went, of the whole run")}
        for stage, told in (("Fetchers", run.fetchers), ("Enqueuer", run.enqueuer)):
            assert shares[stage] == [percent(told.busy), percent(told.starved), percent(told.blocked)]
        assert shares["Copying"] == [percent(run.copying), NONE, NONE]
        assert shares["Feed"] == [percent(run.feed), NONE, NONE]
        assert shares["Trainer"] == [percent(1 - run.trainer_wait), percent(run.trainer_wait), NONE]
        facts = dict(zip(page.texts(".facts dt"), page.texts(".facts dd"), strict=True))
        assert facts["Batches delivered"] == f"{stats.batches_delivered}"
        assert facts["Restarted"] == f"{stats.fetcher_restarts}"
        skipped = page.rows("What train skipped")
        assert [row[:2] for row in skipped] == [[str(*told.rows), told.error] for told in reversed(stats.quarantine)]


def test_shares_are_of_the_last_seconds_while_it_runs_and_of_the_run_afterwards(page):
    coordinator = finished()
    stats = coordinator["train"].stats()
    latest = dataclasses.replace(stats.windows["run"], trainer_wait=0.25, feed=0.75, copying=0.5)
    changed = dataclasses.replace(stats, windows={**stats.windows, "10s": latest})
    coordinator["train"]._core.stats = lambda: changed
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        page.open(server)
        rows = page.rows("Where the time went, of the whole run")
        assert rows[4][2] == percent(stats.windows["run"].trainer_wait) != "25 %"
        changed = dataclasses.replace(changed, verdict="fetch")
        page.await_polls(2)
        rows = page.rows("Where the time went, last 10 s")
        assert [rows[1][1], rows[3][1], rows[4][2]] == ["50 %", "75 %", "25 %"]
        assert page.texts("[data-v=now]")[2] == "25 %"


def test_workers_and_charts_of_a_source_that_runs(page, monkeypatch):
    monkeypatch.setattr(windows, "MARK_SECONDS", 0.0)
    monkeypatch.setattr(windows, "HISTORY_SECONDS", 0.0)  # a reading for each batch
    coordinator, gate = iw.GlobalCoordinator(), Gate()
    handle = register(coordinator, gate, num_workers=2)
    with coordinator, iw.serve_metrics(0, coordinator=coordinator) as server:
        for _ in range(5):
            gate.release(4)
            handle.next_batch()
        gate.await_calls(2)
        monkeypatch.undo()
        page.open(server)  # late: what has been is there
        assert [row[1] for row in page.rows("Workers of train")] == ["fetching", "fetching"]
        assert sum(int(row[3]) for row in page.rows("Workers of train")) == 20
        assert page.text("[data-v=working]") == "2 fetching"
        lines = page.js("return [...document.querySelectorAll('.line')].map(line => line.getAttribute('d').split('L').length)")
        assert all(points >= 3 for points in lines), lines
        rate, depth, wait = page.js("return [...document.querySelectorAll('main svg')].map(svg => svg.ariaLabel)")
        assert rate.startswith("Rows per second, up to five minutes: between ")
        assert "; now: " in rate
        assert depth.startswith("Batches ready on devices")
        assert wait.startswith("Trainer waits")
        gate.open()


def test_a_source_that_fails_turns_red_with_its_errors_text_and_nothing_of_it_is_markup(page, coordinator):
    source(coordinator, "<img src=x onerror=alert(1)>")
    broken(coordinator, OSError(NASTY))
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        page.open(server)
        state = coordinator["train"].condition()
        assert NASTY in state.reason
        assert page.text("[data-state=failed] .failure [data-v=reason]") == state.reason
        assert page.texts("main h2") == ["<img src=x onerror=alert(1)>", "train"]
        assert page.js("return document.querySelectorAll('script, img, main b i, main script').length") == 1
        assert page.driver.title == "1 failing: input-workers"
        assert page.texts("#now li")[0] == "Failed: train"
        assert page.text("section[data-state=failed] .state") == "failed"
        for selector, what in (
            ("section[data-state=failed]", "borderTopColor"),
            ("section[data-state=failed] .state", "color"),
        ):
            colour = page.js("return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, what)
            red, green, blue = map(int, re.findall(r"\d+", colour))
            assert red > 2 * max(green, blue), (selector, red, green, blue)
        assert page.js("return [...document.querySelectorAll('.failure')].map(box => box.hidden)") == [True, False]


def test_a_source_whose_numbers_cannot_be_read_says_so_and_hides_no_other(page):
    coordinator = source(source(iw.GlobalCoordinator(), "bad"), "good")
    coordinator["bad"]._core.stats = lambda: 1 / 0
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        page.open(server)
        assert page.texts(".failure [data-v=reason]") == ["its numbers cannot be read: ZeroDivisionError", ""]
        assert page.texts("#now li") == ["Cannot be read: bad", "Not started: good"]


def test_a_trainer_that_is_gone_is_told_with_the_last_numbers_and_its_return_too(page):
    page.complains = True
    coordinator = finished()
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        page.open(server)
        ledger, ink = page.rows("Ledger"), "return getComputedStyle(document.querySelector('.facts dd')).color"
        colour = page.js(ink)
        assert page.js("return document.querySelector('#gone').hidden")
    await_true(lambda: page.text("#gone").startswith("No answer since "), "the page says that nobody answers")
    assert page.js("return document.querySelector('#gone').offsetHeight") > 0
    assert page.rows("Ledger") == ledger
    assert page.js(ink) != colour
    assert page.js("return document.querySelector('#gone').closest('[role=status]') !== null")
    assert page.driver.title.startswith("No answer")
    with iw.serve_metrics(server.port, coordinator=coordinator) as server:
        await_true(lambda: page.js("return document.querySelector('#gone').hidden"), "it has come back")
        assert page.js(ink) == colour
        assert page.driver.title == "input-workers"


def test_nothing_in_the_document_changes_where_nothing_has_changed(page, coordinator):
    finished("done", coordinator)
    broken(coordinator, OSError("disk"))
    source(coordinator, "new")
    watch = """
        window.seen = []; window.shifts = 0;
        const tell = change => `${change.type} ${change.target.outerHTML ?? change.target.data}`;
        new MutationObserver(changes => seen.push(...changes.map(tell)))
            .observe(document, {subtree: true, childList: true, attributes: true, characterData: true});
        new PerformanceObserver(list => shifts += list.getEntries().length).observe({type: "layout-shift"});"""
    coordinator.stop()
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        page.open(server)
        page.js(watch)
        page.await_polls(4)
        assert page.js("return seen") == []
        assert page.js("return shifts") == 0
        source(coordinator, "one more")
        await_true(lambda: page.js("return seen.length") > 0, "what has changed is seen")


def test_it_asks_each_second_at_most_one_at_a_time_and_nobody_else(page):
    with iw.serve_metrics(0, coordinator=finished()) as server:
        page.open(server)
        page.await_polls(4)
        asked = page.asked()
        assert all(begun - ended >= 990 for (_, ended), (begun, _) in itertools.pairwise(asked)), asked
        requests = page.requests()
        assert len(requests) >= len(asked) + 1
        page.js("for (let time = 0; time < 20; time++) document.dispatchEvent(new Event('visibilitychange'))")
        page.await_polls(3)
        assert all(begun >= ended for (_, ended), (begun, _) in itertools.pairwise(page.asked())), page.asked()
        assert {url for url in requests if not url.startswith("data:")} == {f"{server.url}/", f"{server.url}/status.json"}
        assert page.console() == []


def test_the_policy_lets_it_do_nothing_else(page):
    page.complains = True
    with iw.serve_metrics(0, coordinator=finished()) as server:
        with urllib.request.urlopen(f"{server.url}/", timeout=10) as answer:
            policy = answer.headers["Content-Security-Policy"]
        assert "unsafe" not in policy
        assert policy.startswith("default-src 'none'; ")
        page.open(server)
        page.js("""
            window.refused = [];
            addEventListener("securitypolicyviolation", event => refused.push(event.effectiveDirective));
            new Image().src = "http://localhost:9/x.png";
            fetch("http://localhost:9/").catch(() => 0);
            const style = document.createElement("style");
            style.textContent = "a {}";
            document.head.append(style);""")
        await_true(lambda: {"img-src", "connect-src", "style-src-elem"} <= set(page.js("return refused")), "they were refused")
        assert page.js("try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name }") == "TypeError"
        assert get(server, "/status_page.html")[0] == 404


def test_a_tab_that_nobody_sees_does_not_ask(page):
    with iw.serve_metrics(0, coordinator=finished()) as server:
        page.open(server)
        window = page.cdp("Browser.getWindowForTarget")["windowId"]
        page.cdp("Browser.setWindowBounds", windowId=window, bounds={"windowState": "minimized"})
        try:
            await_true(lambda: page.js("return document.hidden"), "the tab is hidden")
            before = len(page.asked()) + 1  # one may have been under way
            time.sleep(3.5)  # nothing is to happen in it
            assert len(page.asked()) <= before
        finally:
            page.cdp("Browser.setWindowBounds", windowId=window, bounds={"windowState": "normal"})
        page.await_polls(2)


def test_many_sources_are_shown_and_the_page_stays_quick(page):
    coordinator = iw.GlobalCoordinator()
    for number in range(64):
        source(coordinator, f"source_{number}", 80)
    with coordinator, iw.serve_metrics(0, coordinator=coordinator) as server:
        for handle in coordinator:
            handle.next_batch()
        page.open(server)
        assert len(page.texts("main > section h2")) == len(page.texts("nav tbody tr")) == 64
        assert page.texts("#now li")[0].count(",") < 5
        page.js("""
            window.longest = 0; let last = performance.now();
            const tick = now => { longest = Math.max(longest, now - last); last = now; requestAnimationFrame(tick); };
            requestAnimationFrame(tick);""")
        page.await_polls(3)
        assert page.js("return longest") < 3000  # ms; a sixtieth of it beside nobody


def test_huge_numbers_and_endless_words_fit_a_phone(page, coordinator):
    broken(coordinator, OSError("x" * 400), "n" * 60)
    finished("train", coordinator)
    stats = coordinator["train"].stats()
    huge = 123_456_789_012
    devices = {
        name: dataclasses.replace(each, rows_delivered=huge, inputs_per_second=12345678.9, wait_seconds=1e7)
        for name, each in stats.devices.items()
    }
    changed = dataclasses.replace(
        stats, rows_fetched=huge, rows_delivered=huge, batches_delivered=huge, queue_bytes=huge, devices=devices,
        inputs_per_second=12345678.9, workers={0: iw.metrics.snapshot.WorkerStats("fetching", 99999.0, huge, huge, huge)},
    )  # fmt: skip
    coordinator["train"]._core.stats = lambda: changed
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        for width in (360, 600, 800, 1180):
            page.looks(width=width)
            page.open(server)
            page.js("document.querySelectorAll('details').forEach(each => each.open = true)")
            assert page.js("return document.documentElement.scrollWidth") <= width
            outside = page.js("""return [...document.querySelectorAll("body *")].filter(node => !node.matches(".skip"))
                .filter(node => node.getBoundingClientRect().right > innerWidth).map(node => node.outerHTML.slice(0, 80))""")
            assert outside == []
