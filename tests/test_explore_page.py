"""The page to play with a model, in a real browser: every control changes what is painted, and the numbers are the model's."""

import base64
import io
import json
import re
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, Request, expect
from torch import Tensor

import vae_dist
from tests.browser import NARROW, WIDE, opened
from tests.helpers import explored
from vae_dist.config import Config, DataConfig, ModelConfig
from vae_dist.data import glyphs
from vae_dist.model import VAE, build_model
from vae_dist.run import RunFolder

pytestmark = pytest.mark.slow

ADDRESS = re.compile(r"http://\S+")
MINUS = "\N{MINUS SIGN}"
SEVEN = [(0.25, 0.25), (0.72, 0.25), (0.4, 0.8)]


@pytest.fixture(scope="module")
def address(trained: Path) -> Iterator[str]:
    with explored(trained) as lines:
        yield ADDRESS.findall(lines[-1])[0]


@pytest.fixture(scope="module")
def model(trained: Path) -> VAE:
    return vae_dist.load(trained)


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    with opened(browser, address) as page:
        settled(page)
        yield page
        settled(page)


def settled(page: Page) -> None:
    """Waits until the page has had no answer for a while: it has no more to ask."""
    answers = 0
    while answers != (answers := page.evaluate("() => performance.getEntriesByType('resource').length")):
        page.wait_for_timeout(300)


def elsewhere(line: str) -> str:
    """The address of a page as other machines reach it: this machine's own, with the port that was printed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        try:
            way.connect(("192.0.2.1", 9))  # sends nothing
        except OSError as error:
            pytest.skip(f"needs an address of this machine besides loopback: {error}")
        address = way.getsockname()[0]
    port = ADDRESS.findall(line)[0].rpartition(":")[2]
    return f"http://{address}:{port}"


def painted(page: Page, canvas: str) -> Tensor:
    """What a canvas shows: uint8 (height, width, 3)."""
    address = page.locator(canvas).evaluate("canvas => canvas.toDataURL()")
    picture = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    return torch.from_numpy(np.array(picture.convert("RGB")))


def grey(page: Page, canvas: str) -> Tensor:
    """What a canvas of greys shows: uint8 (height, width)."""
    levels = painted(page, canvas)
    assert torch.equal(levels.amin(-1), levels.amax(-1))
    return levels[..., 0]


def shows(page: Page, canvas: str, expected: Tensor) -> None:
    """Waits until a canvas shows an image in [0, 1], (1, 1, height, width), to the grey level, or one beside it.

    Sums of the server's process may be in another order.
    """
    levels, end = expected[0, 0].mul(255).round(), time.monotonic() + 5
    while (grey(page, canvas) - levels).abs().max() > 1:
        assert time.monotonic() < end, f"{canvas} never showed it"
        page.wait_for_timeout(20)


@torch.no_grad()
def decoded(model: VAE, latents: Tensor) -> Tensor:
    return model.decode(latents)


def stroke(page: Page, points: list[tuple[float, float]]) -> None:
    """Draws a line through points of the pad, as shares of its sides."""
    box = page.locator("#pad").bounding_box()
    assert box is not None
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=8)
    page.mouse.up()


def values(page: Page) -> Tensor:
    """The latents that the sliders stand for, as they are written: (1, 20), to two digits."""
    more = page.locator("#more")
    if more.is_visible():
        more.click()
    rows = page.locator("#sliders li").all_inner_texts()
    found = {int(row.split()[0][1:]): float(row.split()[1].replace(MINUS, "-")) for row in rows}
    return torch.tensor([[found[dimension] for dimension in range(20)]])


# Sliders


def test_at_first_the_middle_of_the_prior_is_shown(page: Page, model: VAE) -> None:
    shows(page, "#picture", decoded(model, torch.zeros(1, 20)))
    assert page.locator("#sliders li").count() == 12
    expect(page.locator("#more")).to_have_text("Show the other 8")


def test_a_slider_changes_its_latent_alone(page: Page, model: VAE) -> None:
    slider = page.locator("#sliders input").first
    dimension = int((slider.get_attribute("id") or "")[1:])
    slider.fill("2.5")
    latents = torch.zeros(1, 20)
    latents[0, dimension] = 2.5
    shows(page, "#picture", decoded(model, latents))
    slider.press("ArrowRight")  # without a mouse, too
    latents[0, dimension] = 2.55
    shows(page, "#picture", decoded(model, latents))
    assert torch.equal(values(page), latents)
    slider.dblclick(position={"x": 10, "y": 10})
    shows(page, "#picture", decoded(model, torch.zeros(1, 20)))
    assert torch.equal(values(page), torch.zeros(1, 20))
    slider.fill("-1")
    page.locator("#reset").click()
    shows(page, "#picture", decoded(model, torch.zeros(1, 20)))


def test_a_seed_draws_from_the_prior(page: Page, model: VAE) -> None:
    page.locator("#seed").fill("7")
    page.locator("#seed").press("Enter")
    shows(page, "#picture", model.sample(1, seed=7))
    page.locator("#random").click()
    shows(page, "#picture", model.sample(1, seed=int(page.locator("#seed").input_value())))


def test_of_many_changes_only_the_newest_is_asked(page: Page, model: VAE) -> None:
    asked: list[Request] = []
    page.on("request", lambda request: asked.append(request))
    slider = page.locator("#sliders input").first
    dimension = int((slider.get_attribute("id") or "")[1:])
    slider.evaluate("""slider => {
        for (let i = 0; i <= 40; i++) {
            slider.value = i / 20;
            slider.dispatchEvent(new Event("input"));
        }
    }""")
    latents = torch.zeros(1, 20)
    latents[0, dimension] = 2.0
    shows(page, "#picture", decoded(model, latents))
    settled(page)
    assert [json.loads(request.post_data or "")["latents"][dimension] for request in asked] == [0, 2]


# The pad


def test_a_drawing_is_reconstructed_and_the_sliders_follow(page: Page, model: VAE) -> None:
    expect(page.locator("#hint")).to_have_text("Draw here")
    stroke(page, SEVEN)
    expect(page.locator("#hint")).to_be_hidden()
    drawing = grey(page, "#pad").view(1, 1, 28, 28) / 255
    assert 0.03 < drawing.mean() < 0.2
    with torch.no_grad():
        mean = model.encode(drawing).mean
    shows(page, "#picture", decoded(model, mean))
    assert (values(page) - mean).abs().max() < 0.006
    expect(page.locator("#figures")).to_have_text(
        re.compile(r"Negative ELBO [\d.]+ nats, not a log-likelihood \(bce [\d.]+ \+ kld [\d.]+\), from one latent")
    )
    bars = page.locator("#sliders li .own")
    assert max(bar.bounding_box()["width"] for bar in bars.all()) > 20  # type: ignore[index]
    page.locator("#sliders input").first.press("ArrowRight")
    expect(page.locator("#figures")).to_be_empty()  # they were the drawing's


def test_strokes_are_undone_cleared_and_inverted(page: Page) -> None:
    empty = torch.zeros(28, 28, dtype=torch.uint8)
    expect(page.locator("#undo")).to_be_disabled()
    stroke(page, SEVEN)
    seven = grey(page, "#pad")
    stroke(page, [(0.2, 0.5), (0.8, 0.5)])
    assert not torch.equal(grey(page, "#pad"), seven)
    page.locator("#undo").click()
    assert torch.equal(grey(page, "#pad"), seven)
    page.locator("#invert").click()
    assert torch.equal(grey(page, "#pad"), 255 - seven)
    page.locator("#clear").click()
    assert torch.equal(grey(page, "#pad"), empty)
    for _ in range(3):
        page.locator("#undo").click()
    assert torch.equal(grey(page, "#pad"), empty)
    expect(page.locator("#undo")).to_be_disabled()


def test_the_brush_has_a_width_and_a_shade(page: Page) -> None:
    stroke(page, [(0.5, 0.5), (0.5, 0.5)])
    dot = grey(page, "#pad")
    page.locator("#clear").click()
    page.locator("#brush").fill("7")
    page.locator("#shade").fill("100")
    stroke(page, [(0.5, 0.5), (0.5, 0.5)])
    wide = grey(page, "#pad")
    assert dot.max() == 255
    assert wide.max() == 100
    assert (wide > 0).sum() > 3 * (dot > 0).sum() > 0


def test_a_finger_draws_and_does_not_scroll(browser: Browser, address: str) -> None:
    with browser.new_context(viewport={"width": NARROW, "height": 800}, has_touch=True, is_mobile=True) as context:
        page = context.new_page()
        page.goto(address)
        settled(page)
        box = page.locator("#pad").bounding_box()
        assert box is not None
        x, y = box["x"] + 30, box["y"] + 30
        session = context.new_cdp_session(page)
        for kind, points in (
            ("touchStart", [{"x": x, "y": y}]),
            ("touchMove", [{"x": x, "y": y + 40}]),
            ("touchMove", [{"x": x, "y": y + 90}]),
            ("touchEnd", []),
        ):
            session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        expect(page.locator("#figures")).to_contain_text("Negative ELBO")
        assert grey(page, "#pad").float().mean() > 3
        assert page.evaluate("() => scrollY") == 0


def test_a_picture_file_and_a_test_image_come_onto_the_pad(page: Page, tmp_path: Path) -> None:
    figures = page.locator("#figures")
    Image.new("RGB", (100, 80), (255, 0, 0)).save(tmp_path / "red.png")
    page.locator("#file").set_input_files(tmp_path / "red.png")
    expect(figures).to_contain_text("red.png. Negative ELBO")
    assert grey(page, "#pad").unique().tolist() == [76]
    page.locator("#borrow").click()
    expect(figures).to_contain_text("Test image")
    told = re.match(r"Test image (\d+), class (\d)\. Negative ELBO", figures.inner_text())
    assert told, figures.inner_text()
    images, labels = glyphs.draw(1000, 1300)
    assert torch.equal(grey(page, "#pad"), images[int(told[1]), 0])
    assert labels[int(told[1])] == int(told[2])
    stroke(page, SEVEN)
    expect(figures).to_have_text(re.compile("^Negative ELBO"))  # of that image no more


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_may_be_dropped_or_pasted(page: Page, way: str) -> None:
    content = io.BytesIO()
    Image.new("L", (50, 50), 120).save(content, "png")
    stayed = page.evaluate(
        """([way, content]) => {
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([Uint8Array.from(content)], "grey.png", { type: "image/png" }));
            const how = { bubbles: true, cancelable: true };
            const pasted = new ClipboardEvent(way, { ...how, clipboardData: dataTransfer });
            const dragged = (kind) => new DragEvent(kind, { ...how, dataTransfer });
            const events = way === "paste" ? [pasted] : [dragged("dragover"), dragged("drop")];
            return events.map((event) => !document.querySelector("#pad").dispatchEvent(event));
        }""",
        [way, list(content.getvalue())],
    )
    expect(page.locator("#figures")).to_contain_text("grey.png. Negative ELBO")
    assert grey(page, "#pad").unique().tolist() == [120]
    assert stayed == ([True, True] if way == "drop" else [False])  # or the browser would leave the page for the file


def test_a_screen_reader_hears_the_figures_when_the_stroke_is_drawn_and_no_value_of_every_change(page: Page) -> None:
    live = page.locator("output, [aria-live], [role=status], [role=alert]")
    assert live.evaluate_all("elements => elements.map((element) => element.id)") == ["trouble", "figures"]
    figures, box = page.locator("#figures"), page.locator("#pad").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 50, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 90, box["y"] + 90, steps=4)
    expect(figures).to_contain_text("Negative ELBO")
    expect(figures).to_have_attribute("aria-busy", "true")
    page.mouse.up()
    expect(figures).to_have_attribute("aria-busy", "false")


def test_a_bad_picture_file_is_refused_in_words(browser: Browser, address: str, tmp_path: Path) -> None:
    (tmp_path / "letter.png").write_text("Dear reader")
    (tmp_path / "large.png").write_bytes(bytes(20_000_001))
    page = browser.new_page()  # where the browser's own line on the status 422 is no fault
    page.goto(address)
    settled(page)
    trouble = page.locator("#trouble")
    page.locator("#file").set_input_files(tmp_path / "letter.png")
    expect(trouble).to_contain_text("no picture that can be read")
    expect(trouble).to_contain_text("as JPEG, PNG or WebP")
    page.locator("#file").set_input_files(tmp_path / "large.png")
    expect(trouble).to_have_text("large.png has more than 20 MB")
    stroke(page, SEVEN)
    expect(trouble).to_be_hidden()
    page.close()


def test_a_number_that_there_is_not_is_refused_in_words_and_the_former_one_holds(page: Page) -> None:
    trouble, seed, first = page.locator("#trouble"), page.locator("#seed"), page.locator("#first")
    for field, number, told in (
        (seed, "-3", "Seed: it must be a whole number in 0 … 999,999,999"),
        (seed, "1.5", "Seed: it must be"),
        (seed, "", "Seed: it must be"),
        (first, "300", "First: it must be a whole number in 0 … 299"),
        (first, "", "First: it must be"),
    ):
        field.fill("7")
        field.press("Enter")
        expect(trouble).to_be_hidden()
        field.fill(number)
        field.press("Enter")
        expect(trouble).to_contain_text(told)
        expect(field).to_have_value("7")
    page.locator("#share").press("ArrowRight")  # and the way between goes on from there
    expect(trouble).to_be_hidden()


def test_drawing_works_at_another_address_than_loopback(browser: Browser, trained: Path) -> None:
    """There the browser has fewer features: to it, only this very machine's page is a secure one."""
    with explored(trained, "--host", "0.0.0.0") as lines, opened(browser, elsewhere(lines[-1])) as page:
        assert page.evaluate("() => isSecureContext") is False
        settled(page)
        stroke(page, SEVEN)
        expect(page.locator("#figures")).to_contain_text("Negative ELBO")
        assert grey(page, "#pad").float().mean() > 8
        settled(page)


# Between two test images


def test_the_way_between_two_test_images(page: Page, model: VAE) -> None:
    images, labels = glyphs.draw(1000, 1300)
    digits = images / 255
    page.locator("#second").fill("42")
    page.locator("#second").press("Enter")
    shows(page, "#first-image", digits[:1])
    shows(page, "#second-image", digits[42:43])
    expect(page.locator("#first-class")).to_have_text(f", class {labels[0]}")
    expect(page.locator("#second-class")).to_have_text(f", class {labels[42]}")
    with torch.no_grad():
        start, end = model.encode(digits[[0, 42]]).mean.split(1)
    for share in (0.5, 0.0, 0.25, 1.0):
        page.locator("#share").fill(str(share))
        shows(page, "#middle", decoded(model, torch.lerp(start, end, share)))
        expect(page.locator("#place")).to_have_text(f", {100 * share:.0f} %")
    for step in (0, 3, 10):
        shows(page, f"#strip canvas >> nth={step}", decoded(model, torch.lerp(start, end, step / 10)))
    page.locator("#first-other").click()
    shows(page, "#first-image", digits[int(page.locator("#first").input_value())][None])


# Models of other kinds


def saved(folder: Path, data: str, shape: tuple[int, int, int], **options: Any) -> Path:
    """A run's folder with final weights, though nobody trained them."""
    config = Config(data=DataConfig(name=data), model=ModelConfig(**options))  # type: ignore[arg-type]
    folder.mkdir()
    RunFolder(folder).save_model(config, build_model(config.model, shape, seed=0))
    return folder


def test_a_model_of_colour_images_has_a_pad_with_colours(browser: Browser, tmp_path: Path) -> None:
    run = saved(tmp_path / "run", "glyphs64", (3, 64, 64), kind="conv", channels=8, latent_dim=2)
    with explored(run) as lines, opened(browser, ADDRESS.findall(lines[-1])[0]) as page:
        settled(page)
        expect(page.locator("#shade")).to_be_hidden()
        expect(page.locator("#sliders li")).to_have_count(2)
        expect(page.locator("#more")).to_be_hidden()
        page.locator("#colour").fill("#ff8000")
        stroke(page, SEVEN)
        expect(page.locator("#figures")).to_contain_text("Negative ELBO")
        assert (painted(page, "#pad") == torch.tensor([255, 128, 0])).all(-1).sum() > 50
        page.locator("#borrow").click()
        settled(page)
        assert len(painted(page, "#pad").view(-1, 3).unique(dim=0)) > 100


def test_of_many_latents_the_first_are_shown_and_the_others_on_demand(browser: Browser, tmp_path: Path) -> None:
    run = saved(tmp_path / "run", "glyphs", (1, 28, 28), hidden=(30,), latent_dim=512)
    with explored(run) as lines, opened(browser, ADDRESS.findall(lines[-1])[0]) as page:
        settled(page)
        expect(page.locator("#sliders li")).to_have_count(12)
        page.get_by_role("button", name="Show the other 500").click()
        expect(page.locator("#sliders li")).to_have_count(512)
        page.locator("#random").click()
        last = page.locator("#sliders li").nth(511).locator(".value")
        expect(last).not_to_have_text("0.00")


def test_without_test_images_the_page_says_so(browser: Browser, tmp_path: Path) -> None:
    run = saved(tmp_path / "run", "packed", (1, 8, 8), hidden=(30,), latent_dim=3)
    with explored(run, "--data.root", tmp_path / "nowhere") as lines, opened(browser, ADDRESS.findall(lines[-1])[0]) as page:
        expect(page.locator("#no-images")).to_contain_text("There are no test images:")
        expect(page.locator("#order")).to_contain_text("In the model's own order")
        expect(page.locator("#way")).to_be_hidden()
        expect(page.locator("#borrow")).to_be_hidden()
        assert page.locator("#sliders label").all_inner_texts() == ["z0", "z1", "z2"]
        stroke(page, SEVEN)
        expect(page.locator("#figures")).to_contain_text("Negative ELBO")


def test_where_the_server_has_ended_the_page_says_so(browser: Browser, trained: Path) -> None:
    """At once, wherever the page is scrolled to; and nothing moves under a pen that draws."""
    page = browser.new_page(viewport={"width": NARROW, "height": 800})
    with explored(trained) as lines:
        page.goto(ADDRESS.findall(lines[-1])[0])
        settled(page)
    trouble, before = page.locator("#trouble"), page.locator("#pad").bounding_box()
    stroke(page, SEVEN)
    expect(trouble).to_contain_text("the server does not answer")
    assert page.locator("#pad").bounding_box() == before
    page.locator("#share").press("ArrowRight")
    assert page.evaluate("() => scrollY") > 500
    expect(trouble).to_be_in_viewport(ratio=1)
    page.close()


def test_where_another_model_is_served_by_now_the_page_says_so_and_shows_none_of_it(
    browser: Browser, trained: Path, tmp_path: Path
) -> None:
    page = browser.new_page()
    with explored(saved(tmp_path / "run", "glyphs", (1, 28, 28), hidden=(30,), latent_dim=20)) as lines:
        address = ADDRESS.findall(lines[-1])[0]
        page.goto(address)
        settled(page)
        page.locator("#seed").press("ArrowUp")
        settled(page)
    before = (values(page), painted(page, "#picture"), painted(page, "#middle"))
    with explored(trained, "--port", address.rpartition(":")[2]):
        for change in (page.locator("#random").click, lambda: page.locator("#share").press("ArrowRight")):
            change()
            expect(page.locator("#trouble")).to_have_text("another model is served here now: reload the page")
        after = (values(page), painted(page, "#picture"), painted(page, "#middle"))
        assert all(map(torch.equal, before, after))
        page.reload()
        settled(page)
        expect(page.locator("#facts")).to_contain_text(str(trained))
        expect(page.locator("#trouble")).to_be_hidden()
    page.close()


# How it looks, and how fast it is


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_wide_and_narrow_light_and_dark(
    browser: Browser, address: str, width: int, scheme: Literal["light", "dark"]
) -> None:
    with opened(browser, address, width, scheme) as page:
        settled(page)
        stroke(page, SEVEN)
        assert page.evaluate("() => document.documentElement.scrollWidth") == width
        ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        levels = [int(level) for level in re.findall(r"\d+", ground)]
        assert min(levels) > 200 if scheme == "light" else max(levels) < 60
        for canvas in ("#pad", "#picture", "#first-image", "#middle", "#second-image", "#strip canvas >> nth=10"):
            assert grey(page, canvas).float().std() > 5
            assert page.locator(canvas).evaluate("canvas => getComputedStyle(canvas).imageRendering") == "pixelated"
        settled(page)


def test_every_control_has_a_name(page: Page) -> None:
    page.locator("#more").click()
    controls = page.locator("button, input:not([hidden])").all()
    assert len(controls) > 30
    for control in controls:
        label = control.evaluate("control => control.labels?.[0]?.textContent || control.ariaLabel || control.textContent")
        assert label.strip(), control.get_attribute("id")


def test_a_change_is_painted_soon(browser: Browser, address: str) -> None:
    """It tells the time; how loaded the machine is, a test cannot know."""
    page = browser.new_page()  # without the route through this process that `opened` lays
    page.goto(address)
    settled(page)
    page.evaluate("""() => {
        const latency = document.querySelector("#latency");
        window.times = [];
        new MutationObserver(() => times.push(parseFloat(latency.textContent))).observe(latency, { childList: true });
    }""")
    box = page.locator("#sliders input").first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 20, box["y"] + 10)
    page.mouse.down()
    for step in range(40):
        page.mouse.move(box["x"] + 20 + 4 * step, box["y"] + 10)
        page.wait_for_timeout(25)
    page.mouse.up()
    page.wait_for_timeout(200)
    times = page.evaluate("() => times")
    print(f"a slider: {statistics.median(times):.0f} ms from input to picture, {max(times):.0f} at most, of {len(times)}")
    assert len(times) > 10
    assert statistics.median(times) < 500
    page.close()
