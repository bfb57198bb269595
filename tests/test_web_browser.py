"""The app in a real browser: Debian's chromium, driven by Playwright.

With a folder in VISION_ATTN_SCREENSHOTS a picture of every tab is kept there, before and after its first example, in a
wide window and on a phone; some of them are in apps/screenshots.
"""

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from vision_attn.apps.web import TABS

pytest_plugins = "live_app"

FLAGS = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()  # fmt: skip
PATIENCE = 300_000  # ms without any step; a machine that is busy with other things is not an error
QUIET = 700  # ms without a request, after which nothing is going on
WIDTHS = {"wide": (1440, 1000), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        reason = "chromium is not there; install Debian's package, or run .ci/run as root"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


class Visit:
    """One page of the app, and what went wrong in it: messages of the console, failed and foreign requests."""

    def __init__(self, browser, live, width: str = "wide"):
        self.live, self.width = live, width
        size = dict(zip(("width", "height"), WIDTHS[width], strict=True))
        self.context = browser.new_context(viewport=size, has_touch=width == "phone")
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.problems, self.running, self.changed = [], set(), time.monotonic()
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        self.page.on("request", self._started)
        self.page.on("requestfinished", self._ended)
        self.page.on("requestfailed", self._ended)
        self.page.on("response", self._answered)
        self.open()

    def _said(self, message) -> None:
        if message.type in ("error", "warning"):
            self.problems.append(f"console {message.type}: {message.text} ({message.location.get('url')})")

    def _answered(self, response) -> None:
        if response.status >= 400:
            self.problems.append(f"HTTP {response.status}: {response.url}")

    def _started(self, request) -> None:
        if not request.url.startswith((self.live.url, "data:", "blob:")):
            self.problems.append(f"leaves the machine: {request.url}")
        if "/heartbeat/" not in request.url:
            self.running.add(request)
            self.changed = time.monotonic()

    def _ended(self, request) -> None:
        self.running.discard(request)
        self.changed = time.monotonic()

    def open(self) -> None:
        self.running.clear()
        self.page.goto(self.live.url)
        self.page.get_by_role("heading", name="vision-attn").first.wait_for()
        self.settle()

    def settle(self) -> None:
        """Wait until nothing is being asked of the server; patience starts anew with every step that a run has done.

        The stream of events of Gradio is open as long as something runs.
        """
        until, step = time.monotonic() + PATIENCE / 1000, None
        while self.running or time.monotonic() - self.changed < QUIET / 1000:
            if (now := self.step()) != step:
                until, step = time.monotonic() + PATIENCE / 1000, now
            busy = [each.url for each in self.running]
            assert time.monotonic() < until, f"{PATIENCE / 1000:.0f} s without a change: busy with {busy}, at {step}"
            self.page.wait_for_timeout(50)

    def forget_streams(self) -> None:
        """After a cancel Gradio may leave its stream of events open: the last word of the run goes to an older one."""
        self.running = {each for each in self.running if "/queue/data" not in each.url}

    def step(self) -> list[str]:
        """What is being drawn and how far it is, without the seconds."""
        return [bar.inner_text().split(",")[0] for bar in self.page.locator(".progress p:visible").all()]

    def tab(self, name: str):
        """Open a tab; returns its panel, the whole page where it is alone on it."""
        if not self.page.get_by_role("tab").count():
            return self.page.locator("main").first
        button = self.page.get_by_role("tab", name=TABS[name], exact=True)
        if not button.is_visible():  # tabs that a narrow window has no room for are in a menu
            self.page.locator(".overflow-menu > button").click()
            button = self.page.locator(".overflow-dropdown button", has_text=TABS[name])
        button.click()
        self.settle()
        return self.page.get_by_role("tabpanel").locator("visible=true").first

    def toasts(self) -> list[str]:
        return [each.inner_text() for each in self.page.locator(".toast-body").all()]

    def shot(self, name: str) -> None:
        folder = os.environ.get("VISION_ATTN_SCREENSHOTS")
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.page.evaluate("document.activeElement && document.activeElement.blur(); window.scrollTo(0, 0)")
            self.page.screenshot(path=Path(folder) / f"{name}-{self.width}.png", full_page=True)

    def check(self) -> None:
        """Nothing went wrong, and nothing is wider than the window."""
        assert not self.problems, self.problems
        assert not self.toasts()
        wide = self.page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert wide[0] <= wide[1], f"the page is {wide[0]} pixels wide in a window of {wide[1]}"


@pytest.fixture
def visit(browser, live):
    opened = []

    def go(width: str = "wide") -> Visit:
        opened.append(Visit(browser, live, width))
        return opened[-1]

    yield go
    for each in opened:
        each.context.close()


def primary(panel):
    return panel.locator("button.primary:visible").first


def examples(panel):
    """Rows of tables of examples, or their buttons where an example has one input."""
    return panel.locator(".table-wrap tbody tr.tr-body, .gallery > button.gallery-item")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tab", TABS)
def test_tab_opens(visit, tab, width):
    seen = visit(width)
    panel = seen.tab(tab)
    assert panel.inner_text().strip()
    if tab == "results":
        panel.get_by_alt_text("The numbers of the table, drawn").wait_for()  # before anything is chosen
    seen.shot(f"{tab}-before" if examples(panel).count() else tab)
    seen.check()
    nameless = panel.evaluate(
        """panel => [...panel.querySelectorAll('button, input:not([type=file]), textarea:not([disabled])')]
           .filter(e => e.checkVisibility({visibilityProperty: true, opacityProperty: true}))
           .filter(e => !(e.innerText.trim() || e.ariaLabel || e.title || e.labels?.length || e.placeholder
                          || e.querySelector('img[alt]:not([alt=""])')
                          || e.getAttribute('aria-labelledby')))
           .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert not nameless, nameless


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["first", "every"])
@pytest.mark.parametrize("tab", [tab for tab in TABS if tab != "results"])
def test_examples_fill_every_input_and_run(visit, tab, every):
    seen = visit()
    panel = seen.tab(tab)
    count = examples(panel).count()
    assert count
    for number in range(count if every else 1):
        if every:
            examples(panel).nth(number).click()
            seen.settle()
            primary(panel).click()
            seen.settle()
        else:
            run_first_example(seen, panel, tab)
        assert not seen.toasts(), f"example {number}: {seen.toasts()}"
        seen.check()
        if number == 0:
            seen.shot(tab)
    assert not seen.live.failures


def set_steps(panel, number: int) -> None:
    """Steps of the tab Generate, typed as a person does."""
    steps = panel.locator("input[type=number][aria-label*='Steps']").first
    if not steps.is_visible():
        panel.get_by_role("button", name="More").click()
    steps.fill(str(number))
    steps.press("Enter")


def run_first_example(seen, panel, tab: str) -> None:
    """Fill the inputs from it and press the button; videos that nobody looks at get a tenth of its steps."""
    examples(panel).first.click()
    seen.settle()
    if tab == "generate" and "VISION_ATTN_SCREENSHOTS" not in os.environ:
        set_steps(panel, 2)
    primary(panel).click()
    seen.settle()


def start_long(seen):
    """A run of the tab Generate that takes long enough to be stopped."""
    panel = seen.tab("generate")
    set_steps(panel, 100)
    primary(panel).click()
    seen.page.get_by_text(re.compile(r"step \d+ of 200")).first.wait_for()
    return panel


def test_cancel_stops_the_run_and_the_next_one_works(visit):
    seen = visit()
    before = set(seen.live.folder.rglob("run-*"))  # of runs that were not stopped
    panel = start_long(seen)
    seen.shot("generate-running")
    panel.get_by_role("button", name="Cancel").click()
    seen.page.get_by_text("Stopped; nothing was kept.").wait_for()
    seen.forget_streams()
    seen.settle()
    assert not panel.locator("video:visible").count()
    until = time.monotonic() + PATIENCE / 1000
    while set(seen.live.folder.rglob("run-*")) - before:  # the thread on the server ends before its next step
        assert time.monotonic() < until, "the run goes on without anybody who wants it"
        seen.page.wait_for_timeout(100)
    run_first_example(seen, panel, "generate")
    seen.page.get_by_text(re.compile("Done in")).wait_for()
    assert panel.locator("video:visible").count() >= 2  # sparse and dense
    seen.check()
    assert not seen.live.failures


def test_reload_while_running(visit):
    seen = visit()
    start_long(seen)
    seen.open()
    seen.problems.clear()  # the page that was left says that its connection ended
    panel = seen.tab("generate")
    run_first_example(seen, panel, "generate")
    assert panel.locator("img:visible, video:visible").count()
    seen.check()
    assert not seen.live.failures


def test_keyboard_alone(visit):
    """From the top of the page to a drawn pattern, and to every tab, without a mouse."""
    seen = visit()
    focused = "document.activeElement.innerText || ''"

    def to(text: str) -> None:
        for _ in range(80):
            seen.page.keyboard.press("Tab")
            if seen.page.evaluate(focused).strip() == text:
                return
        raise AssertionError(f"no way to {text!r} with the Tab key")

    for title in list(TABS.values())[1:]:
        seen.page.evaluate("document.activeElement.blur()")
        to(title)
        seen.page.keyboard.press("Enter")
        seen.settle()
        assert seen.page.get_by_role("tab", name=title, exact=True).get_attribute("aria-selected") == "true"
    seen.page.keyboard.press("Shift+Tab")
    seen.open()
    to("Video: radial attention")
    seen.page.keyboard.press("Enter")
    seen.settle()
    seen.page.evaluate("document.activeElement.blur()")
    to("Draw")
    seen.page.keyboard.press("Enter")
    seen.settle()
    assert seen.page.get_by_text("Query 4,6,8 sees").is_visible()
    seen.check()


def test_click_on_a_token(visit):
    seen = visit()
    panel = seen.tab("patterns")
    examples(panel).first.click()
    seen.settle()
    picture = panel.locator("img[alt*='blue is seen by the query']")
    box = picture.bounding_box()
    picture.click(
        position={"x": box["width"] / 2 - box["height"] / 2 + 5, "y": 5}
    )  # the corner of a square in the middle
    seen.settle()
    assert seen.page.get_by_text("Query 0,0 sees 49 of 256 keys").is_visible()
    seen.check()


@pytest.mark.parametrize("tab", TABS)
def test_results_fit_a_phone(visit, tab):
    seen = visit("phone")
    panel = seen.tab(tab)
    if examples(panel).count():
        run_first_example(seen, panel, tab)
    seen.shot(tab)
    seen.check()
