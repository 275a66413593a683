"""The page to play with a model, asked without a browser: its answers are the model's own, and whatever is wrong is refused."""

import base64
import copy
import io
import json
import re
import shutil
import socket
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor

import vae_dist
from tests.helpers import Outcome, explored, reference_terms, refused
from tests.test_photos import png_of_size
from vae_dist.config import Config, DataConfig, InputError, ModelConfig
from vae_dist.data import glyphs, sources
from vae_dist.data.images import Resident
from vae_dist.explore.__main__ import listen
from vae_dist.explore.app import build_app
from vae_dist.explore.explorer import Explorer
from vae_dist.model import VAE, build_model
from vae_dist.noise import Stream, derive_key, normal
from vae_dist.run import load_model

Command = Callable[..., Outcome]
RAW = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """Those of the trained run: uint8 (300, 1, 28, 28)."""
    return glyphs.draw(1000, 1300)[0]


@pytest.fixture(scope="module")
def explorer(trained: Path, digits: Tensor) -> Explorer:
    return Explorer("trained", *load_model(trained), Resident(digits, torch.arange(300) % 10))


@pytest.fixture(scope="module")
def model(trained: Path) -> VAE:
    return vae_dist.load(trained)


def client_of(explorer: Explorer) -> TestClient:
    return TestClient(build_app(explorer, {"localhost"}), base_url="http://127.0.0.1:8000")


@pytest.fixture(scope="module")
def client(explorer: Explorer) -> TestClient:
    return client_of(explorer)


def untrained(shape: tuple[int, int, int], **options: Any) -> tuple[VAE, Config]:
    config = Config(model=ModelConfig(**options))
    return build_model(config.model, shape, seed=0).eval(), config


def drawn(answer: dict[str, Any], shape: tuple[int, ...]) -> Tensor:
    """The picture of an answer, uint8 (channels, height, width)."""
    channels, height, width = shape
    pixels = bytearray(base64.b64decode(answer["pixels"]))
    return torch.frombuffer(pixels, dtype=torch.uint8).view(height, width, channels).permute(2, 0, 1)


def grey_levels(images: Tensor) -> Tensor:
    return images.mul(255).round().to(torch.uint8)


def png(picture: Image.Image, **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, format=options.pop("format", "png"), **options)
    return content.getvalue()


# What it answers


def test_a_latent_becomes_the_picture_that_the_model_decodes(client: TestClient, model: VAE) -> None:
    latents = torch.randn(5, 20, generator=torch.Generator().manual_seed(0)) * 2
    with torch.no_grad():
        expected = grey_levels(model.decode(latents))
    for latent, picture in zip(latents, expected, strict=True):
        answer = client.post("/decode", json={"latents": latent.tolist()}).json()
        assert torch.equal(drawn(answer, (1, 28, 28)), picture)


def test_a_picture_is_encoded_and_reconstructed_as_the_model_does(
    client: TestClient, model: VAE, digits: Tensor, trained: Path
) -> None:
    pixels = digits[7]
    answer = client.post("/encode", content=pixels.numpy().tobytes(), headers=RAW).json()
    with torch.no_grad():
        mean, logvar = model.encode(pixels.unsqueeze(0) / 255)
        assert torch.equal(drawn(answer, (1, 28, 28)), grey_levels(model.decode(mean))[0])
    assert answer["latents"] == pytest.approx(mean[0].tolist(), abs=1e-6)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    assert answer["kl"] == pytest.approx(kl[0].tolist(), abs=1e-5)
    noise = normal(derive_key(0, Stream.EVALUATION), torch.tensor([0]), 20).double()
    bce, kld = reference_terms(trained, pixels.view(1, -1).double() / 255, noise)
    assert answer["bce"] == pytest.approx(bce.item(), rel=1e-5)
    assert answer["kld"] == pytest.approx(kld.item(), rel=1e-5)
    assert answer["loss"] == pytest.approx((bce + kld).item(), rel=1e-5)
    assert answer["note"] == ", not a log-likelihood"


def test_a_seed_draws_the_sample_that_it_draws_everywhere(client: TestClient, model: VAE) -> None:
    answer = client.get("/sample", params={"seed": 5}).json()
    assert torch.equal(drawn(answer, (1, 28, 28)), grey_levels(model.sample(1, seed=5))[0])
    again = client.post("/decode", json={"latents": answer["latents"]}).json()
    assert again["pixels"] == answer["pixels"]


def test_the_dimensions_come_in_the_order_of_what_they_tell_of_test_images(
    client: TestClient, model: VAE, digits: Tensor
) -> None:
    facts = client.get("/model").json()
    with torch.no_grad():
        mean, logvar = model.encode(digits / 255)
    kl = (0.5 * (mean**2 + logvar.exp() - 1 - logvar)).mean(0)
    assert facts["kl"] == pytest.approx(kl.tolist(), abs=1e-5)
    in_order = [facts["kl"][dimension] for dimension in facts["order"]]
    assert in_order == sorted(facts["kl"], reverse=True)
    assert sorted(facts["order"]) == list(range(20))
    assert (facts["shape"], facts["latent_dim"], facts["images"]) == ([1, 28, 28], 20, 300)


def test_a_test_image_comes_with_its_posterior_mean_and_its_class(client: TestClient, model: VAE, digits: Tensor) -> None:
    answer = client.get("/image", params={"number": 299}).json()
    assert torch.equal(drawn(answer, (1, 28, 28)), digits[299])
    assert answer["label"] == 9
    with torch.no_grad():
        assert answer["latents"] == pytest.approx(model.encode(digits[299:] / 255).mean[0].tolist(), abs=1e-6)


def test_colours_keep_their_places() -> None:
    model, config = untrained((3, 8, 6), hidden=(30,), latent_dim=2)
    pixels = torch.randint(256, (3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    client = client_of(Explorer("colour", model, config, Resident(pixels.unsqueeze(0))))
    image = client.get("/image", params={"number": 0}).json()
    assert torch.equal(drawn(image, (3, 8, 6)), pixels)
    assert image["label"] is None  # nor has such a set classes
    sent = pixels.permute(1, 2, 0).contiguous().numpy().tobytes()
    answer = client.post("/encode", content=sent, headers=RAW).json()
    with torch.no_grad():
        mean = model.encode(pixels.unsqueeze(0) / 255).mean
        assert torch.equal(drawn(answer, (3, 8, 6)), grey_levels(model.decode(mean))[0])
    assert answer["latents"] == pytest.approx(mean[0].tolist(), abs=1e-6)


def test_a_model_of_black_and_white_pixels_gets_such() -> None:
    model, config = untrained((1, 4, 4), hidden=(10,), latent_dim=2)
    client = client_of(Explorer("binary", model, Config(model=config.model, data=DataConfig(binarize="static")), None))
    grey, white = ([level] * 8 + [0] * 8 for level in (200, 255))
    answers = [client.post("/encode", content=bytes(pixels), headers=RAW).json() for pixels in (grey, white)]
    assert answers[0] == answers[1]
    assert "bits per dimension" in answers[0]["note"]


def test_without_test_images_the_rest_works(trained: Path) -> None:
    client = client_of(Explorer("trained", *load_model(trained), None, "the disk is not there"))
    facts = client.get("/model").json()
    assert (facts["order"], facts["kl"], facts["images"]) == (list(range(20)), None, 0)
    assert facts["problem"] == "the disk is not there"
    assert client.get("/image", params={"number": 0}).json() == {"detail": "the disk is not there"}
    assert client.post("/encode", content=bytes(784), headers=RAW).status_code == 200


def test_test_images_that_are_lost_are_told_in_words(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "set")
    images = sources.load(DataConfig(name="stream", root=str(tmp_path / "set")), train=False)
    client = client_of(Explorer("streamed", *untrained((1, 28, 28)), images))
    assert client.get("/image", params={"number": 0}).status_code == 200
    shutil.rmtree(tmp_path / "set")
    answer = client.get("/image", params={"number": len(images) - 1})
    assert answer.status_code == 503
    assert str(tmp_path / "set") in answer.json()["detail"]


def test_each_of_many_threads_gets_its_own_picture(client: TestClient, model: VAE) -> None:
    latents = torch.randn(60, 20, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = grey_levels(torch.cat([model.decode(latent) for latent in latents.split(1)]))
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda latent: client.post("/decode", json={"latents": latent.tolist()}).json(), latents))
    assert torch.equal(torch.stack([drawn(answer, (1, 28, 28)) for answer in answers]), expected)


# Picture files


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_uploaded_picture_has_the_models_size_and_colours(client: TestClient, kind: str) -> None:
    picture = Image.new("RGB", (90, 56), "white")
    picture.paste((200, 0, 0), (0, 0, 45, 56))  # the left half
    answer = client.post("/upload", content=png(picture, format=kind, quality=95)).json()
    image = drawn(answer, (1, 28, 28)).int()
    assert (image[0, :, :11] - 60).abs().max() <= 3  # 0.299 of that red
    assert image[0, :, 17:].min() >= 250


def test_an_uploaded_picture_fits_a_model_of_images_that_are_not_square() -> None:
    client = client_of(Explorer("narrow", *untrained((3, 4, 2), hidden=(5,), latent_dim=2), None))
    columns = np.repeat(np.arange(4, dtype=np.uint8) * 10, 3).reshape(1, 4, 3).repeat(4, 0)
    answer = client.post("/upload", content=png(Image.fromarray(columns))).json()
    assert drawn(answer, (3, 4, 2)).tolist() == [[[10, 20]] * 4] * 3


def test_a_photograph_with_a_preview_beside_it_is_no_film(client: TestClient) -> None:
    content = png(Image.new("RGB", (60, 60), "white"), format="mpo", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    answer = client.post("/upload", content=content)
    assert drawn(answer.json(), (1, 28, 28)).min() == 255


def film(kind: str) -> bytes:
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "green")]
    return png(frames[0], format=kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda: b"a letter", "cannot identify image file"),
        (lambda: png(Image.effect_noise((40, 40), 90))[:-400], "truncated"),
        (lambda: png_of_size(60_000, 60_000), "decompression bomb"),
        (lambda: png_of_size(9_500, 9_500), "9500 x 9500 pixels are more than"),
        (lambda: film("gif"), "cannot identify image file): save it anew, as JPEG, PNG or WebP"),
        (lambda: film("png"), "animated"),
        (lambda: film("webp"), "animated"),
        (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "save it anew, as JPEG, PNG or WebP"),
        (lambda: b"", "the picture file is empty"),
    ],
    ids=["text", "torn", "bomb", "large", "gif", "film.png", "film.webp", "svg", "empty"],
)
def test_an_upload_that_is_no_picture_is_refused(client: TestClient, content: Callable[[], bytes], told: str) -> None:
    answer = client.post("/upload", content=content())
    assert answer.status_code == 422
    assert told in answer.json()["detail"]
    assert "/tmp" not in answer.json()["detail"]


def test_what_is_too_long_is_refused_before_it_is_read(client: TestClient) -> None:
    answer = client.post("/upload", content=bytes(20_000_001))
    assert (answer.status_code, answer.json()["detail"]) == (413, "more than 20 MB")
    assert client.post("/upload", content=iter([b"of ", b"unknown length"])).status_code == 411


# What is refused


def latents(*values: object) -> str:
    return json.dumps({"latents": [*values, *[0] * (20 - len(values))]})


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (latents(float("nan")), "latents: they must be numbers in -1000 … 1000"),
        (latents(float("inf")), "latents: they must be"),
        (latents(1e39), "latents: they must be"),
        (latents("one"), "latents: they must be 20 numbers"),
        (latents(None), "latents: they must be 20 numbers"),
        ('{"latents": [1, 2]}', "latents: they must be 20 numbers"),
        (latents(*range(21)), "latents: they must be 20 numbers"),
        ('{"latents": 3}', "latents: they must be 20 numbers"),
        ("{}", "latents: they must be 20 numbers"),
        ("[]", "latents: they must be 20 numbers"),
        ("", "latents: they must be 20 numbers"),
        ("{", "latents: they must be 20 numbers"),
    ],
)
def test_latents_that_the_model_has_not_are_refused_in_words(client: TestClient, body: str, told: str) -> None:
    answer = client.post("/decode", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert told in answer.json()["detail"]


@pytest.mark.parametrize("length", [0, 783, 785])
def test_pixels_of_another_size_are_refused_in_words(client: TestClient, length: int) -> None:
    answer = client.post("/encode", content=bytes(length), headers=RAW)
    assert (answer.status_code, answer.json()) == (422, {"detail": "pixels: they must be 784 bytes"})


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/sample?seed=-1", "seed: it must be a whole number in 0 … 9223372036854775807"),
        ("/sample?seed=9223372036854775808", "seed: it must be a whole number in 0 …"),
        ("/sample?seed=1.5", "seed: it must be a whole number in 0 …"),
        ("/sample", "seed: it must be a whole number in 0 …"),
        ("/image?number=300", "there is no test image 300: they have the numbers 0 to 299"),
        ("/image?number=-1", "there is no test image -1"),
        ("/image?number=" + "9" * 40, "there is no test image 999"),
        ("/image?number=", "number: it must be a whole number, that of a test image"),
    ],
)
def test_numbers_that_there_are_not_are_refused_in_words(client: TestClient, path: str, told: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 422
    assert told in answer.json()["detail"]


def test_a_model_that_makes_no_numbers_says_so() -> None:
    model, config = untrained((1, 4, 4), hidden=(10,), latent_dim=2)
    for weights in model.parameters():
        weights.data.fill_(torch.nan)
    client = client_of(Explorer("broken", model, config, None))
    answers = [client.post("/decode", json={"latents": [0, 0]}), client.post("/encode", content=bytes(16), headers=RAW)]
    assert [answer.status_code for answer in answers] == [422, 422]
    assert answers[0].json()["detail"] == "the model makes no finite numbers of this"


def test_a_model_of_what_is_neither_grey_nor_colour_is_refused() -> None:
    with pytest.raises(InputError, match="pairs: its images have 2 channels"):
        Explorer("pairs", *untrained((2, 4, 4), hidden=(10,), latent_dim=2), None)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:8000", "192.0.2.7:80"])
def test_an_address_or_an_own_name_is_answered(client: TestClient, host: str) -> None:
    assert client.get("/model", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1.example.org:8000", "localhost.example.org", "[", ""])
def test_a_foreign_name_is_refused_even_if_it_leads_here(client: TestClient, host: str) -> None:
    """DNS rebinding: the browser takes the foreign page's name for this server's."""
    for path in ("/", "/model"):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == 400
        assert "is no name of this server: use its address, or start it with --host NAME" in answer.json()["detail"]


@pytest.mark.parametrize("origin", ["http://example.org", "null", "http://127.0.0.1:9000", "http://[", "http://localhost:8000"])
def test_what_a_foreign_page_sends_is_refused(client: TestClient, origin: str) -> None:
    answer = client.post("/upload", content=png(Image.new("L", (4, 4))), headers={"Origin": origin})
    assert answer.status_code == 403
    own = client.post("/upload", content=png(Image.new("L", (4, 4))), headers={"Origin": "http://127.0.0.1:8000"})
    assert own.status_code == 200


@pytest.mark.parametrize("path", ["/", "/page.js", "/model", "/image?number=300", "/nothing"])
def test_no_answer_is_taken_for_what_it_is_not(client: TestClient, path: str) -> None:
    for host, known in (("localhost", True), ("example.org", False)):
        answer = client.get(path, headers={"Host": host})
        assert (answer.status_code != 400) is known
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_another_model_has_another_mark(client: TestClient, model: VAE, trained: Path) -> None:
    """By which an open page knows that a run's server was followed by another's."""
    config = load_model(trained)[1]
    changed = copy.deepcopy(model)
    next(changed.parameters()).data[0, 0] += 1e-3
    runs = [("trained", model), ("trained", changed), ("other", model)]
    marks = [client_of(Explorer(name, each, config, None)).get("/model").headers["x-model"] for name, each in runs]
    assert marks[0] == client.get("/").headers["x-model"]
    assert len(set(marks)) == 3


def test_only_the_files_of_the_page_are_served(client: TestClient) -> None:
    page = client.get("/")
    names = re.findall(r'(?:src|href)="([^":]+)"', page.text)
    assert names == ["page.css", "page.js"]
    assert [client.get(f"/{name}").status_code for name in (*names, "live.js", "pad.js")] == [200] * 4
    for path in ("/app.py", "/docs", "/openapi.json", "/../app.py", "/%2e%2e/app.py"):
        assert client.get(path).status_code == 404


# The command


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(trained: Path, command: Command) -> None:
    with explored(trained) as lines:
        [line] = lines
        address = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert address, line
        with urllib.request.urlopen(f"{address[0]}/model") as answer:
            assert json.load(answer)["images"] == 300
        refused(command("explore", trained, "--port", address[1]), "Address already in use", "0 for any that is free")


def test_what_cannot_be_served_is_refused(trained: Path, command: Command, tmp_path: Path) -> None:
    refused(command("explore", tmp_path, "--port", 0), "no weights there")
    assert "--port 65536: must be in 0 … 65535" in command("explore", trained, "--port", 65536).err
    refused(command("explore", trained, "--host", "203.0.113.1", "--port", 0), "--host 203.0.113.1 --port 0")
    for host in ("", "a" * 70, "a..b"):
        refused(command("explore", trained, "--host", host, "--port", 0), f"--host {host}: no such host is known here")


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_all_addresses_are_those_of_both_versions() -> None:
    """The host name that is printed may lead to either."""
    with listen("::", 0) as listener:
        for address in ("127.0.0.1", "::1"):
            socket.create_connection((address, listener.getsockname()[1]), timeout=5).close()


def test_without_its_extra_it_says_what_to_install(trained: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused(command("explore", trained), "uvicorn", "pip install '.[explore]'")


@pytest.mark.slow
def test_another_address_than_loopback_is_warned_of(trained: Path, tmp_path: Path) -> None:
    """And that there are no test images, of which the page knows then. The name that is printed is one for other machines."""
    with explored(trained, "--host", "0.0.0.0", "--data.root", tmp_path) as lines:
        assert "warning: no test images: --data.name mnist" in lines[0]
        assert "warning: --host 0.0.0.0: whoever reaches this machine" in lines[1]
        printed = re.search(rf"http://{re.escape(socket.gethostname())}:(\d+) ", lines[2])
        assert printed, lines[2]
        for name in (socket.gethostname(), socket.getfqdn(), "192.0.2.7"):
            request = urllib.request.Request(f"http://127.0.0.1:{printed[1]}/model", headers={"Host": name})
            with urllib.request.urlopen(request) as answer:
                assert "train-images-idx3-ubyte is missing" in json.load(answer)["problem"]
