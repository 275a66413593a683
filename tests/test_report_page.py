"""The report in a real browser, opened from the disk: it draws, it answers, and it is sound in both schemes and widths."""

import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image
from playwright.sync_api import Browser, Locator, Page

from tests.browser import NARROW, WIDE, opened
from tests.helpers import launch

pytestmark = pytest.mark.slow

NAME = "<script>alert(1)<i> %{y}"  # of a run

_CENTRE = "node => { const box = node.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2] }"


@pytest.fixture(scope="module")
def report(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the report of a run of three epochs."""
    return written(tmp_path_factory.mktemp("report") / "report.html", trained)


@pytest.fixture(scope="module")
def comparison(trained: Path, small_root: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of the report of three runs, one of another model, and one with a name that would be markup."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(trained, folder / NAME, ignore=shutil.ignore_patterns("wandb"))
    options = ["--data.root", small_root, "--trainer.epochs", 2, "--model.latent_dim", 3, "--tracking.wandb", "disabled"]
    done = launch("vae_dist.train", *options, "--output", folder / "narrow")
    assert done.returncode == 0, done.stderr
    return written(folder / "comparison.html", trained, folder / NAME, folder / "narrow")


def written(file: Path, *runs: Path) -> str:
    done = launch("vae_dist.report", *runs, "--out", file)
    assert done.returncode == 0, done.stderr
    return file.as_uri()


@pytest.fixture
def page(report: str, browser: Browser) -> Any:
    """The report, wide and light, with all its figures drawn."""
    with opened(browser, report) as page:
        wait(page)
        yield page


def wait(page: Page) -> None:
    """Until the script has drawn all figures."""
    page.wait_for_selector("html[data-drawn]", state="attached")


def figure(page: Page, title: str) -> Locator:
    return page.locator(f".plot[aria-label='{title}']")


def of(page: Page, title: str, what: str) -> Any:
    """Something of a figure as Plotly has it, such as `layout.xaxis.range`."""
    return figure(page, title).evaluate(f"place => place._fullLayout && place.{what}")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("kind", ["report", "comparison"])
def test_all_is_drawn_within_the_window(
    kind: str, width: int, scheme: Literal["light", "dark"], browser: Browser, request: pytest.FixtureRequest
) -> None:
    with opened(browser, request.getfixturevalue(kind), width, scheme) as page:
        wait(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 0)").count(False) == 0
        for plot in page.locator(".plot").all():
            box, drawn = plot.bounding_box(), plot.locator(".main-svg").first.bounding_box()
            assert box is not None
            assert drawn is not None
            assert drawn["width"] == pytest.approx(box["width"], abs=1), "a figure has the width of its place"
            assert plot.locator(".js-line, .point, .heatmaplayer image").count() > 0
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(scheme: Literal["light", "dark"], report: str, browser: Browser) -> None:
    """By WCAG 2: 4.5 for text, and 3 for lines and points of figures."""
    with opened(browser, report, WIDE, scheme) as page:
        wait(page)
        behind = page.evaluate("getComputedStyle(document.body).backgroundColor")
        texts = "[...document.querySelectorAll('p, td, th, dt, dd, a, h1, h2, h3, figcaption, label, .badge')]"
        for colour in page.evaluate(f"[...new Set({texts}.map(text => getComputedStyle(text).color))]"):
            assert contrast(colour, behind) >= 4.5, colour
        ticks = page.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill")
        assert contrast(ticks, behind) >= 4.5
        lines = "[...document.querySelectorAll('.scatterlayer .js-line')]"
        for colour in page.evaluate(f"[...new Set({lines}.map(line => getComputedStyle(line).stroke))]"):
            assert contrast(colour, behind) >= 3, colour


def contrast(one: str, other: str) -> float:
    """Of two colours such as `rgb(1, 2, 3)`."""
    shades = sorted((luminance(one), luminance(other)), reverse=True)
    return (shades[0] + 0.05) / (shades[1] + 0.05)


def luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_slider_shows_the_epochs_and_is_moved_by_keys(page: Page) -> None:
    slides = page.locator(".slides", has_text="Samples")
    seen = slides.locator("img:not([hidden])")
    last = seen.get_attribute("data-words") or ""
    assert slides.locator("output").text_content() == last
    assert last.startswith("epoch 3, test loss ")
    slider = slides.locator("input[type=range]")
    slider.focus()
    page.keyboard.press("Home")
    assert seen.count() == 1
    assert seen.get_attribute("data-epoch") == "1"
    page.keyboard.press("ArrowRight")
    assert (slides.locator("output").text_content() or "").startswith("epoch 2, test loss ")
    assert slider.get_attribute("aria-valuetext") == "epoch 2"
    assert seen.evaluate("image => image.naturalWidth") == 238
    assert page.locator(".slides", has_text="Reconstructions").locator("img:not([hidden])").get_attribute("data-epoch") == "3"


def test_pointing_at_a_curve_tells_its_figures(page: Page) -> None:
    page.mouse.move(*centre(figure(page, "Loss").locator(".scatterlayer .trace").last.locator("path.point").nth(1)))
    told = page.locator(".hoverlayer .hovertext")
    told.first.wait_for()
    assert any("test" in words for words in told.all_text_contents())


def centre(place: Locator) -> tuple[float, float]:
    place.scroll_into_view_if_needed()
    x, y = place.evaluate(_CENTRE)
    return x, y


def test_dragging_zooms_and_a_double_click_brings_all_back(page: Page) -> None:
    plot = figure(page, "Loss").locator(".nsewdrag")
    before = of(page, "Loss", "layout.xaxis.range")
    x, y = centre(plot)
    page.mouse.move(x - 100, y - 60)
    page.mouse.down()
    page.mouse.move(x + 100, y + 60, steps=5)
    page.mouse.up()
    low, high = of(page, "Loss", "layout.xaxis.range")
    assert before[0] < low < high < before[1]
    page.mouse.dblclick(x, y)
    page.wait_for_function(
        "([name, low]) => document.querySelector(`.plot[aria-label='${name}']`).layout.xaxis.range[0] === low",
        arg=["Loss", before[0]],
    )


def test_the_x_axis_of_the_curves_can_be_epochs_or_minutes(page: Page) -> None:
    assert of(page, "Loss", "data[2].x") == [1000, 2000, 3000]
    page.get_by_label("epochs", exact=True).check()
    for title in ("Loss", "KL term (kld)", "Images per second"):
        assert of(page, title, "layout.xaxis.title.text") == "epochs"
    assert of(page, "Loss", "data[2].x") == [1, 2, 3]
    page.get_by_label("minutes of training and evaluation").check()
    minutes = of(page, "Loss", "data[2].x")
    assert 0 < minutes[0] < minutes[2] < 1
    assert of(page, "Latent map (PCA)", "layout.xaxis.title.text").startswith("axis 1"), "no curve, and left alone"


def test_pointing_at_the_latent_map_shows_the_image(page: Page) -> None:
    canvas = page.locator("canvas.thumbnail")
    assert canvas.evaluate("canvas => getComputedStyle(canvas).visibility") == "hidden"
    page.mouse.move(*centre(figure(page, "Latent map (PCA)").locator("path.point").first))
    page.wait_for_selector("canvas.thumbnail.seen")
    pixels = canvas.evaluate("canvas => [...canvas.getContext('2d').getImageData(0, 0, 28, 28).data]")
    assert 20 < sum(byte > 128 for byte in pixels[::4]) < 400, "a digit, white on black"
    assert "image" in "".join(page.locator(".hovertext").all_text_contents())


def test_a_figure_is_saved_as_a_picture(page: Page, tmp_path: Path) -> None:
    figure(page, "Loss").hover()
    with page.expect_download() as download:
        figure(page, "Loss").locator("[data-title^='Download plot']").click()
    assert download.value.suggested_filename == "Loss.png"
    download.value.save_as(tmp_path / "Loss.png")
    with Image.open(tmp_path / "Loss.png") as picture:
        assert picture.size == (2 * 1140, 2 * 400)
        assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255), "not transparent: it may lie on any page"
        assert len(picture.convert("L").getcolors() or []) > 50


def test_a_swipe_on_a_figure_scrolls_the_page(report: str, browser: Browser) -> None:
    with browser.new_context(viewport={"width": NARROW, "height": 800}, has_touch=True, is_mobile=True) as context:
        page = context.new_page()
        page.goto(report)
        wait(page)
        x, y = centre(figure(page, "Loss").locator(".nsewdrag"))
        before, finger = page.evaluate("scrollY"), context.new_cdp_session(page)
        for moment in range(12):
            kind, places = ("touchMove" if moment else "touchStart"), [{"x": x, "y": y - 15 * moment}]
            finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": places})
        finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        page.wait_for_function("before => scrollY > before + 50", arg=before)


def test_coming_back_shows_what_the_controls_say(report: str, browser: Browser) -> None:
    with opened(browser, report) as page:
        wait(page)
        page.locator(".slider input").first.fill("0")
        page.get_by_label("epochs", exact=True).check()
        page.get_by_label("all fields").check()
        page.goto("about:blank")
        page.go_back()
        wait(page)
        assert page.locator(".slider input").first.input_value() == "2"
        assert (page.locator(".slides output").first.text_content() or "").startswith("epoch 3")
        assert page.locator("input[name=axis]:checked").get_attribute("value") == "images"
        assert of(page, "Loss", "layout.xaxis.title.text") == "images seen"


def test_figures_that_are_not_drawn_yet_or_cannot_be_are_said_to_be_so(report: str, browser: Browser) -> None:
    with opened(browser, report) as page:
        page.add_init_script("window.Response = class { text() { return new Promise(() => {}) } }")
        page.reload()
        assert "drawn" in figure(page, "Loss").evaluate("place => getComputedStyle(place, '::before').content")
        page.add_init_script("delete window.DecompressionStream")
        page.reload()
        page.wait_for_selector(".plot.missing")
        words = page.locator(".plot").all_text_contents()
        assert all("cannot draw the figure (DecompressionStream is not defined)" in told for told in words)


def test_figures_follow_the_scheme_while_the_page_is_open(page: Page) -> None:
    tick = "getComputedStyle(document.querySelector('.xtick text')).fill"
    light = page.evaluate(tick)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"() => {tick} !== '{light}'")
    assert contrast(page.evaluate(tick), page.evaluate("getComputedStyle(document.body).backgroundColor")) > 4.5


def test_a_print_is_dark_on_white_and_has_every_field(report: str, browser: Browser) -> None:
    with opened(browser, report, WIDE, "dark") as page:
        wait(page)
        page.emulate_media(media="print", color_scheme="dark")
        page.wait_for_function("() => getComputedStyle(document.querySelector('.xtick text')).fill === 'rgb(0, 0, 0)'")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.locator("tr.usual").first.is_visible()
        assert not page.locator("nav").is_visible()
        for width in (690, 900):  # of an A4 sheet's middle, and of a larger one's
            page.evaluate("width => { document.body.style.width = `${width}px`; document.body.style.margin = 0 }", width)
            for plot in page.locator(".plot").all():
                place, drawn = plot.bounding_box(), plot.locator(".main-svg").first.bounding_box()
                assert drawn == place, "a figure fits its place"
                assert place is not None
                assert place["x"] + place["width"] <= width + 1
            cut = "tables => tables.filter(table => table.scrollWidth > table.clientWidth).length"
            assert page.locator(".scroll").evaluate_all(cut) == 0
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_fields_that_are_as_usual_are_shown_when_asked_for(page: Page) -> None:
    assert not page.locator("tr.usual").first.is_visible()
    page.get_by_label("all fields").check()
    assert page.locator("tr.usual").first.is_visible()


def test_every_control_is_reached_by_the_keyboard_and_seen_to_be(page: Page) -> None:
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.type ?? document.activeElement.tagName"))
        if page.evaluate("document.activeElement !== document.body"):
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert {"range", "radio", "checkbox"} <= {*reached}
    assert "button" not in reached, "of which the figures have sixty"
    roles = page.locator(".plot").evaluate_all("plots => plots.map(plot => [plot.role, plot.ariaLabel.length > 0])")
    assert roles == [["group", True]] * len(roles)


def test_three_runs_have_a_colour_each_and_one_slider(comparison: str, browser: Browser) -> None:
    with opened(browser, comparison) as page:
        wait(page)
        names = figure(page, "Loss").locator(".legendtext").all_text_contents()
        assert names == ["trained", NAME.replace("%{", "%\N{WORD JOINER}{"), "narrow"]
        colours = {trace["name"]: trace["line"]["color"] for trace in of(page, "Loss", "data")}
        assert len(set(colours.values())) == 3
        slides = page.locator(".slides", has_text="Samples")
        assert slides.locator("input[type=range]").count() == 1
        slides.locator("input[type=range]").focus()
        page.keyboard.press("Home")
        assert [word.split(",")[0] for word in slides.locator("output").all_text_contents()] == ["epoch 1"] * 3
        page.keyboard.press("End")
        shown = [word.split(",")[0] for word in slides.locator("output").all_text_contents()]
        assert shown == ["epoch 3", "epoch 3", "epoch 2"], "the shorter run's last picture"


def test_nothing_is_lost_without_scripts_but_figures_and_sliders(report: str, browser: Browser) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(report)
        assert page.locator(".slides", has_text="Samples").locator("img:visible").count() == 1
        assert "nats per image" in page.locator("header").inner_text()
        assert page.locator(".plot:visible").count() == 0, "of empty boxes"
