"""Both pages in headless Chromium: they colour, tell and filter, stay quick, and let no text of a run do anything."""

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pages_data import HOSTILE, WORDS, record, source, write_run

from trace_rl.launch.pages.report import write_report
from trace_rl.launch.pages.view import Source, view_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)"),
]
LONG_TASKS = """
window.longTasks = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.longTasks.push([entry.startTime, entry.duration]);
}).observe({ type: "longtask", buffered: true });
"""


@dataclass
class Opened:
    """A page with all that it complained of and asked for."""

    page: Any
    opened_s: float
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def check_quiet(self) -> None:
        assert self.complaints == []
        assert len(self.requests) == 1 and self.requests[0].startswith("file:")

    def background(self, token: int) -> str:
        return str(self.token(token).evaluate("node => getComputedStyle(node).backgroundColor"))

    def token(self, number: int) -> Any:
        return self.page.locator(".pane").first.locator(".t").nth(number)

    def choose(self, metric: str) -> None:
        self.page.locator(f'[data-metric="{metric}"]').click()

    def figures(self) -> dict[str, str]:
        """What the card tells."""
        rows = self.page.locator("#detail tr").all()
        return {row.locator("th").inner_text(): row.locator("td").inner_text() for row in rows}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    contexts = []

    def opened(file: Path, ready: str, **settings: Any) -> Opened:
        context = browser.new_context(viewport={"width": 1440, "height": 900}, **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.add_init_script(LONG_TASKS)
        found = Opened(page, 0.0)
        page.on("console", lambda message: found.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: found.complaints.append(str(error)))
        page.on("request", lambda request: found.requests.append(request.url))
        page.on("dialog", lambda dialog: found.complaints.append(f"dialog: {dialog.message}"))
        started = time.monotonic()
        page.goto(file.as_uri())
        page.wait_for_selector(ready)
        found.opened_s = time.monotonic() - started
        return found

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture
def open_view(open_page: Callable[..., Opened], tmp_path: Path) -> Callable[..., Opened]:
    def opened(*sources: Source, **settings: Any) -> Opened:
        file = tmp_path / "view.html"
        file.write_text(view_page(sources), encoding="utf-8")
        return open_page(file, ".t", **settings)

    return opened


def small(run: str = "demo", step: int = 0, seed: int = 0) -> Source:
    return source([record(sample, 200, len(WORDS), seed) for sample in range(4)], run=run, step=step)


def test_colours_follow_the_chosen_figure_by_button_and_by_key(open_view: Callable[..., Opened]) -> None:
    view = open_view(small())
    seen = {}
    for number, metric in enumerate(
        ("route", "kl", "advantage", "entropy", "student", "teacher", "mismatch", "version"), start=1
    ):
        view.choose(metric)
        seen[metric] = [view.background(token) for token in range(30)]
        view.page.keyboard.press("1" if number > 1 else "2")
        view.page.keyboard.press(str(number))
        assert [view.background(token) for token in range(30)] == seen[metric]
        assert view.page.locator('[aria-checked="true"]').get_attribute("data-metric") == metric
    assert len(set(map(tuple, seen.values()))) == 8
    # tokens 0 to 7 take a route, those behind them none: no colour there
    assert len(set(seen["route"][:8])) == 1 and seen["route"][8] == "rgba(0, 0, 0, 0)" != seen["route"][0]
    assert seen["kl"][8] == "rgba(0, 0, 0, 0)" and len(set(seen["kl"][:8])) > 1
    view.check_quiet()


def test_the_legend_tells_the_scale(open_view: Callable[..., Opened]) -> None:
    view = open_view(small())
    legend = view.page.locator("#legend")
    assert "key_spans" in legend.inner_text() and "error_spans" in legend.inner_text()
    view.choose("student")
    assert legend.locator(".swatches i").count() == 9
    assert legend.inner_text().split("\n")[0] == "≤ 0.01"
    view.choose("version")
    assert legend.locator(".item").all_inner_texts() == ["3", "4"]


def test_hovering_tells_figures_and_candidates(open_view: Callable[..., Opened]) -> None:
    given = record(0, 200, len(WORDS))
    view = open_view(source([given]))
    view.token(3).hover()
    found = view.figures()
    (route,) = given.routes
    assert found["KL"] == f"{route.divergence[3]:.3g} nats"
    assert found["route"].startswith("key_spans (λ 0.5, weight 0.0417)")
    assert found["span"] == "key · arith, tokens 1-8, importance 1"
    assert found["version"] == "3"
    assert view.page.locator("#detail .candidate").count() == 10
    assert "token 4 of 200" in view.page.locator("#detail").inner_text()
    view.token(12).hover()
    assert "KL" not in view.figures() and view.page.locator("#detail .candidate").count() == 0
    view.page.locator("h1").hover()
    assert view.page.locator("#detail").is_hidden()
    view.check_quiet()


def test_keys_move_from_token_to_token(open_view: Callable[..., Opened]) -> None:
    view = open_view(small())
    view.page.locator(".scroller").focus()
    view.page.keyboard.press("ArrowRight")
    assert "token 1 of 200" in view.page.locator("#detail").inner_text()
    for _ in range(8):
        view.page.keyboard.press("n")  # the eight routed ones, and then the next stretch
    assert "token 81 of 200" in view.page.locator("#detail").inner_text()
    view.page.keyboard.press("p")
    assert "token 8 of 200" in view.page.locator("#detail").inner_text()
    active = view.page.locator(".scroller").get_attribute("aria-activedescendant")
    assert view.page.locator(f"#{active}").get_attribute("class").endswith("cursor")
    view.page.keyboard.press("j")
    assert view.page.locator(".t.cursor").count() == 1
    view.page.keyboard.press("Escape")
    assert view.page.locator("#detail").is_hidden()
    view.check_quiet()


def test_filters_leave_what_they_name(open_view: Callable[..., Opened]) -> None:
    view = open_view(small())
    headings = view.page.locator(".rollout > b")
    assert "4 of 4 rollouts, mean reward 0.5" in view.page.locator(".pane-head").inner_text()
    view.page.locator("#reward").select_option("wrong")
    assert "2 of 4 rollouts" in view.page.locator(".pane-head").inner_text()
    assert headings.first.inner_text() == "#1"
    view.page.locator("#type").select_option("key · arith")
    assert "0 of 4 rollouts" in view.page.locator(".pane-head").inner_text()
    assert view.page.locator(".empty").is_visible()
    view.page.locator("#reward").select_option("any")
    assert headings.first.inner_text() == "#0"
    assert " off" not in view.token(0).get_attribute("class") and " off" in view.token(9).get_attribute("class")
    view.page.locator("#type").select_option("any")
    view.page.locator("#route").select_option("error_spans")
    assert headings.first.inner_text() == "#1"
    view.check_quiet()


def test_two_runs_lie_side_by_side_and_share_the_prompt(open_view: Callable[..., Opened]) -> None:
    view = open_view(small("first"), small("second", seed=5))
    panes = view.page.locator(".pane")
    assert panes.count() == 2
    chosen = [pane.locator("select").first.evaluate("node => node.value") for pane in panes.all()]
    assert chosen == ["first · step 0", "second · step 0"]
    view.page.locator("h1").click()
    view.page.keyboard.press("c")
    assert panes.count() == 1
    view.check_quiet()


def test_what_was_not_recorded_cannot_be_chosen(open_view: Callable[..., Opened]) -> None:
    bare = record(0, 20, len(WORDS), policy_logprobs=[], policy_entropy=[], routes=[])
    view = open_view(source([bare]))
    disabled = view.page.locator("#metrics button:disabled")
    assert [button.get_attribute("data-metric") for button in disabled.all()] == [
        "kl",
        "entropy",
        "teacher",
        "mismatch",
    ]
    assert "logging.token_figures=measured" in disabled.first.get_attribute("title")
    view.page.keyboard.press("2")
    assert view.page.locator('[aria-checked="true"]').get_attribute("data-metric") == "route"
    view.check_quiet()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_systems_theme_and_the_button(open_view: Callable[..., Opened], scheme: Any) -> None:
    view = open_view(small(), color_scheme=scheme)
    ground = "getComputedStyle(document.body).backgroundColor"
    before = view.page.evaluate(ground)
    assert (before == "rgb(20, 22, 27)") == (scheme == "dark")
    view.page.locator("#theme").click()
    assert (view.page.evaluate(ground) == "rgb(20, 22, 27)") == (scheme == "light")
    view.page.keyboard.press("t")
    assert view.page.evaluate(ground) == before
    view.check_quiet()


def test_hostile_text_is_shown_and_does_nothing(open_view: Callable[..., Opened]) -> None:
    everywhere = {name: "".join(HOSTILE[:4]) for name in ("prompt_id", "question", "answer", "feedback", "reflection")}
    spans = [{"start": 0, "end": 2, "class": "key", "type": HOSTILE[0], "importance": 1.0}]
    hostile = record(0, 3 * len(HOSTILE), len(HOSTILE), **everywhere, spans=spans, finish_reason=HOSTILE[1])
    view = open_view(source([hostile], HOSTILE, run=HOSTILE[1]))
    for token in range(10):
        view.token(token).hover()
    for metric in ("kl", "version", "route"):
        view.choose(metric)
    shown = view.page.locator(".scroller").inner_text()
    assert "<script>window.hacked = 1</script>" in shown
    assert "[U+202E]right to left[U+202C]" in shown and "nul␀byte" in shown and "\u202e" not in shown
    assert HOSTILE[0] in view.page.locator(".question").inner_text()
    assert view.page.evaluate("window.hacked === undefined")
    assert view.page.locator("img, a, iframe, object, embed, form").count() == 0
    assert view.page.locator("script").count() == 9  # the data and the page's own
    view.check_quiet()


def test_even_injected_markup_could_not_run(open_view: Callable[..., Opened]) -> None:
    view = open_view(small())
    view.page.evaluate(
        """() => {
          document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.hacked = 1'>");
          const script = document.createElement("script");
          script.textContent = "window.hacked = 2";
          document.body.append(script);
        }"""
    )
    view.page.wait_for_timeout(100)
    assert view.page.evaluate("window.hacked === undefined")
    assert any("Content Security Policy" in complaint for complaint in view.complaints)


SCROLL = """async ([frames, pixels]) => {
  const scroller = document.querySelector(".scroller");
  for (let frame = 0; frame < frames; frame++) {
    scroller.scrollTop += pixels;
    await new Promise(requestAnimationFrame);
  }
  return scroller.scrollTop;
}"""


def test_64_rollouts_of_4000_tokens_stay_usable(open_view: Callable[..., Opened]) -> None:
    view = open_view(source([record(sample, 4000, len(WORDS)) for sample in range(64)]))
    session = view.page.context.new_cdp_session(view.page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def work_ms(action: Callable[[], Any]) -> float:
        """Time that the main thread of the page was at work; other processes do not lengthen it."""

        def now() -> float:
            metrics = {item["name"]: item["value"] for item in session.send("Performance.getMetrics")["metrics"]}
            return float(metrics["TaskDuration"])

        before = now()
        action()
        return 1000 * (now() - before)

    assert view.opened_s < 2
    nodes = view.page.locator("*").count()
    reading = work_ms(lambda: view.page.evaluate(SCROLL, [60, 120])) / 60  # five lines a frame
    leaping = work_ms(lambda: view.page.evaluate(SCROLL, [60, 5000])) / 60  # all lines are new in every frame
    long_tasks = view.page.evaluate(
        "window.longTasks.filter(([start]) => start > 2000).map(([, duration]) => duration)"
    )
    switching = {
        metric: work_ms(lambda metric=metric: view.choose(metric)) for metric in ("kl", "entropy", "student", "version")
    }
    figures = {"opened s": view.opened_s, "nodes": nodes, "reading ms": reading, "leaping ms": leaping,
               "long tasks ms": long_tasks, "switching ms": switching}  # fmt: skip
    print(figures)
    assert view.page.evaluate("document.querySelector('.scroller').scrollTop") > 250_000
    assert max(nodes, view.page.locator("*").count()) < 3000
    assert reading < 16 and leaping < 50, figures
    assert max(switching.values()) < 400, figures
    view.check_quiet()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_draws_its_charts_without_network(
    open_page: Callable[..., Opened], tmp_path: Path, scheme: Any
) -> None:
    runs = [write_run(tmp_path / f"trace-s{seed}", seed) for seed in range(3)]
    runs.append(write_run(tmp_path / HOSTILE[2].replace("/", ""), 1, learning_rate=0.5))
    report = open_page(write_report(runs, [], tmp_path / "report.html"), ".plot .main-svg", color_scheme=scheme)
    sections = report.page.locator("section > h2").all_inner_texts()
    assert sections == ["Learning", "Health", "Time of a step by stage", "Annotation", "Settings that differ"]
    assert report.page.locator(".plot .main-svg").count() >= report.page.locator(".plot").count() == 9
    assert report.page.locator(".scatterlayer .trace").count() > 10
    strokes = "[...document.querySelectorAll('.js-line')].map((line) => line.style.stroke).join()"
    before = report.page.evaluate(strokes)
    report.page.locator("#theme").click()
    report.page.wait_for_timeout(500)
    assert report.page.evaluate(strokes) != before
    assert report.page.locator("main a").count() == 0
    report.page.locator(".plot").first.hover()
    report.check_quiet()
