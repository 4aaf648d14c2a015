"""The live page for everybody: in the dark, by keyboard, by ear, on a phone; and pictures of it for those who look."""

import dataclasses
import itertools
import os
import pathlib

import pytest
from gates import Gate, await_true, register
from metrics.http_client import source
from metrics.shown import broken, finished

import input_workers as iw

# What text is against what is behind it, by the rules of WCAG 2.
CONTRAST = """
    const channel = value => (value /= 255) <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
    const parse = colour => colour.match(/[\\d.]+/g).map(Number);
    const contrast = (one, other) => {
        const [low, high] = [luminance(one), luminance(other)].sort((a, b) => a - b);
        return (high + .05) / (low + .05);
    };
    const behind = node => {
        for (let each = node; each; each = each.parentElement) {
            const colour = parse(getComputedStyle(each).backgroundColor);
            if (colour.length === 3) return colour;
        }
    };
"""
TEXTS = f"""{CONTRAST}
    const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {{
        const node = walker.currentNode.parentElement;
        if (!walker.currentNode.data.trim() || !node.checkVisibility() || node.matches("script, style, .skip")) continue;
        found.push([contrast(parse(getComputedStyle(node).color), behind(node)), walker.currentNode.data.trim()]);
    }}
    return found;"""
SIGNS = f"""{CONTRAST}
    const probe = document.body.appendChild(document.createElement("p"));
    const told = ["--busy", "--starved", "--blocked", "--good", "--bad"].map(name => {{
        probe.style.color = `var(${{name}})`;
        return [contrast(parse(getComputedStyle(probe).color), behind(document.querySelector(".card"))), name];
    }});
    probe.remove();
    return told;"""


@pytest.fixture
def several(coordinator):
    """A server of sources that fare well and badly."""
    finished("done", coordinator)
    broken(coordinator, OSError("s3://bücket/<shard> 07.tar: connection reset\nby peer"))
    source(coordinator, "new")
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        yield server


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read_by_day_and_by_night_and_when_the_trainer_is_gone(page, several, scheme):
    page.complains = True
    page.looks(scheme)
    page.open(several)
    background = page.js("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (min(background) > 200) == (scheme == "light")
    page.js("document.querySelectorAll('details').forEach(each => each.open = true)")
    texts = page.js(TEXTS)
    assert len(texts) > 100
    assert [text for text in texts if text[0] < 4.5] == []
    assert [sign for sign in page.js(SIGNS) if sign[0] < 3.0] == []
    several.close()
    await_true(lambda: page.text("#gone") != "", "nobody answers")
    assert [text for text in page.js(TEXTS) if text[0] < 4.5] == []


def test_everything_that_can_be_used_is_reached_by_keyboard_and_seen_to_be(page, several):
    from selenium.webdriver.common.keys import Keys

    page.open(several)
    wanted = page.js("""return [...document.querySelectorAll("a, button, input, summary, [tabindex='0']")]
        .filter(node => node.checkVisibility()).map(node => node.textContent.trim())""")
    reached = []
    for _ in wanted:
        page.press(Keys.TAB)
        text, style, width, left = page.js("""
            const node = document.activeElement, style = getComputedStyle(node);
            const width = parseFloat(style.outlineWidth), left = node.getBoundingClientRect().left;
            return [node.textContent.trim(), style.outlineStyle, width, left]""")
        assert style != "none", text
        assert width >= 2, text
        assert left >= 0, text
        reached.append(text)
    assert reached == wanted
    assert reached[:4] == ["Skip to the sources", "done", "train", "new"]
    page.js("document.querySelector('section[data-state=failed] details').querySelector('summary').focus()")
    page.press(Keys.ENTER)
    page.await_polls(2)  # what a reader has opened or closed stays so
    assert page.js("return document.activeElement.parentElement.open") is False


def test_a_link_of_the_overview_leads_to_its_source(page, several):
    page.open(several)
    for link, section in page.js("""
            return [...document.querySelectorAll("nav a")].map(link =>
                [link.textContent, document.querySelector(link.getAttribute("href")).querySelector("h2").textContent])"""):
        assert link == section


def test_what_is_drawn_and_tabulated_has_a_name_for_those_who_listen(page, several):
    page.open(several)
    nodes = [node for node in page.cdp("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
    named = {}
    for node in nodes:
        named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("image", "table", "heading", "navigation", "region", "link"):
        assert named.get(role), role
        assert all(named[role]), (role, named[role])
    assert len(named["image"]) == 6  # of the two sources that were started
    assert {"Rows per second, up to five minutes", "Trainer waits, up to five minutes"} <= {
        name.split(":")[0] for name in named["image"]
    }
    assert {"Sources", "Devices and their trainers", "Workers of train", "Ledger: where the rows went"} <= set(named["table"])
    assert sorted(named["region"]) == ["done", "new", "train"]
    assert {"main", "banner", "status"} <= set(named)
    assert named["heading"][0] == "input-workers"
    scopes = page.js("return [...document.querySelectorAll('th')].every(cell => ['row', 'col'].includes(cell.scope))")
    assert scopes is True
    live = page.js("return [...document.querySelectorAll('[role=status], [aria-live], [role=alert]')].map(node => node.id)")
    assert live[0] == "now"
    assert page.js("return document.querySelector('main [role=status], main [aria-live]')") is None


def test_what_is_announced_changes_with_the_verdict_and_not_with_numbers(page, coordinator):
    gate, verdict, rows = Gate(), "fetch", itertools.count()
    register(coordinator, gate)
    coordinator.start()
    stats = coordinator["train"].stats()
    coordinator["train"]._core.stats = lambda: dataclasses.replace(
        stats, rows_delivered=next(rows), verdict=verdict, verdict_text=f"trainer waits {next(rows)} % of its time"
    )
    with iw.serve_metrics(0, coordinator=coordinator) as server:
        page.open(server)
        page.js("""
            window.said = [];
            const all = {subtree: true, childList: true, characterData: true, attributes: true};
            for (const live of document.querySelectorAll("[role=status]"))
                new MutationObserver(() => said.push(live.textContent)).observe(live, all);""")
        before = page.text(".verdict"), page.rows("Ledger")
        page.await_polls(3)
        assert page.text(".verdict") != before[0]
        assert page.rows("Ledger") != before[1]
        assert page.js("return said") == []
        verdict = "trainer"
        await_true(lambda: page.texts("#now li") == ["Input is ahead of the trainer: train"], "the verdict has changed")
        assert page.js("return said") != []
    del coordinator["train"]._core.stats
    gate.open()


def test_it_is_drawn_for_those_who_look(page, several, tmp_path):
    folder = pathlib.Path(os.environ.get("STATUS_PAGE_PICTURES") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.open(several)
    for name, scheme, width in (("light", "light", 1180), ("dark", "dark", 1180), ("phone", "light", 360)):
        page.looks(scheme, width)
        page.await_polls(1)
        page.picture(folder / f"live-page-{name}.png")
        assert (folder / f"live-page-{name}.png").stat().st_size > 10_000
    page.looks(width=1180)
    page.js("document.querySelector('[data-state=failed].source').scrollIntoView()")
    page.driver.save_screenshot(str(folder / "live-page-failing.png"))
