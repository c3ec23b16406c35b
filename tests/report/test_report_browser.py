"""The report in a real browser, without a network: seen, scrolled, driven by the keyboard, in light and dark."""

import importlib.util
import itertools
import shutil

import pytest

from hici.report.page import Part, Table, render_page

pytestmark = pytest.mark.browser

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
          "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
_WIDTHS = (360, 768, 1280)

# WCAG 2's contrast of every text against the nearest background that is painted behind it
_CONTRASTS = """() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour.length === 3 || colour[3] > 0.99) return colour;
    }
    return [255, 0, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !element.getClientRects().length) continue;
    const text = light(parse(getComputedStyle(element).color)), back = light(behind(element));
    const ratio = (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
    found.push([ratio, element.tagName, walker.currentNode.textContent.trim().slice(0, 30)]);
  }
  return found;
}"""

_IMAGES = """() => [...document.images].map((i) => ({
  natural: i.naturalWidth * i.naturalHeight, width: i.getBoundingClientRect().width, alt: i.alt,
  ratio: i.getBoundingClientRect().width / i.getBoundingClientRect().height / (i.naturalWidth / i.naturalHeight),
  shown: i.currentSrc.length, inside: i.getBoundingClientRect().right <= innerWidth && i.checkVisibility() }))"""


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.skip(f"no Chromium (none of {', '.join(_NAMES)}); install it: apt-get install chromium")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no playwright; pip install 'hici[dev]'")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=_FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, report):
    """Open the report: (page, what went wrong, addresses that were asked for)."""
    contexts = []

    def opened(width=1280, height=900, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page, problems, asked = context.new_page(), [], []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((report[0] / "index.html").as_uri())
        page.wait_for_load_state("networkidle")
        return page, problems, asked

    yield opened
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", _WIDTHS)
def test_every_figure_is_seen_and_the_page_never_scrolls_sideways(open_page, width):
    page, problems, asked = open_page(width)
    assert problems == []
    assert [url for url in asked if not url.startswith("data:")] == [page.url]
    images = page.evaluate(_IMAGES)
    assert len(images) >= 14
    for image in images:
        assert image["natural"] > 0
        assert image["inside"], image
        assert image["width"] > 0.8 * min(width, 640) - 60
        assert image["ratio"] == pytest.approx(1, abs=0.02)
        assert len(image["alt"]) > 60
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = page.evaluate("""() => [...document.querySelectorAll('main *, header *, nav *')]
        .filter((e) => !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth + 1)
        .map((e) => e.outerHTML.slice(0, 80))""")
    assert cut == []
    assert problems == []


@pytest.mark.parametrize("width", _WIDTHS)
@pytest.mark.parametrize("text_columns", [1, None])
def test_long_names_fold_inside_of_their_cells(browser, width, text_columns):
    long = "a-run-with-a-long-name-of-its-own-and-a-date: hici, past against another-run-with-a-long-name: hici, past"
    table = Table("caption", ["", long, long.replace(" ", "_")], [["a", "b", "c"]], text_columns)
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    page.set_content(render_page("title", "lead", [Part("Part", [table])], {}, "made"))
    cells = page.evaluate("() => [...document.querySelectorAll('th, td')].map((e) => e.scrollWidth - e.clientWidth)")
    assert len(cells) == 6
    assert max(cells) <= 0
    context.close()


def test_a_phone_gets_pictures_that_are_made_for_it(open_page):
    ratios = {}
    for width in (360, 1280):
        page, _, _ = open_page(width)
        ratios[width] = page.evaluate("() => [...document.images].map((i) => i.naturalWidth / i.naturalHeight)")
    assert all(phone < desk for phone, desk in zip(ratios[360], ratios[1280], strict=True))


def test_by_keyboard(open_page):
    page, _, _ = open_page()
    focused = "() => document.activeElement"
    page.keyboard.press("Tab")
    skip = page.evaluate(f"({focused})().textContent")
    assert skip == "Skip to the content"
    box = page.evaluate(f"({focused})().getBoundingClientRect().top")
    assert box >= 0  # on the page while it has the focus
    page.keyboard.press("Enter")
    assert page.evaluate(f"({focused})().id") == "content"
    page.reload()
    page.keyboard.press("Tab")
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.append(
            page.evaluate("""() => { const e = document.activeElement, s = getComputedStyle(e);
            return [e.tagName, e.className, e.textContent.trim().slice(0, 40), s.outlineStyle, s.outlineWidth]; }""")
        )
    links = [text for tag, _, text, _, _ in seen if tag == "A"]
    assert links == page.evaluate("() => [...document.querySelectorAll('nav a')].map((a) => a.textContent)")
    assert sum(name == "scroll" for _, name, _, _, _ in seen) >= 3
    assert sum(tag == "SUMMARY" for tag, _, _, _, _ in seen) >= 10
    assert all((style, size) == ("solid", "3px") for _, _, _, style, size in seen), seen


def test_details_open_by_enter_and_wide_tables_scroll_by_keys(open_page):
    page, _, _ = open_page(360)
    summary = page.locator("summary").first
    summary.focus()
    assert not page.locator("details").first.evaluate("(e) => e.open")
    page.keyboard.press("Enter")
    assert page.locator("details").first.evaluate("(e) => e.open")
    region = page.locator("details .scroll").first
    page.keyboard.press("Tab")
    assert region.evaluate("(e) => e === document.activeElement")
    assert region.evaluate("(e) => e.scrollWidth > e.clientWidth")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.activeElement.scrollLeft > 20")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(open_page, scheme):
    page, _, _ = open_page(color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (back == "rgb(21, 23, 26)") == (scheme == "dark")
    assert page.evaluate("getComputedStyle(document.querySelector('.card')).backgroundColor") == "rgb(255, 255, 255)"
    found = page.evaluate(_CONTRASTS)
    assert len(found) > 500
    assert min(found)[0] >= 4.5, min(found)


def test_on_paper(open_page):
    page, _, _ = open_page(color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert min(page.evaluate(_CONTRASTS))[0] >= 4.5
    # twenty columns have no room on paper: a paragraph a row, with the columns' names
    cell = page.locator("#provenance table.wide td").nth(1)
    assert cell.evaluate("(e) => getComputedStyle(e).display") == "inline"
    assert cell.evaluate("(e) => getComputedStyle(e, '::before').content") not in ("none", "normal")
    assert cell.get_attribute("data-column") == "task"
    assert all(image["natural"] > 0 for image in page.evaluate(_IMAGES))


def test_headings_go_down_one_level_at_a_time(open_page):
    page, _, _ = open_page()
    levels = page.evaluate("() => [...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
