"""ONNX files of encoder and decoder, run by ONNX Runtime."""

from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

import vae_dist
from tests.helpers import Outcome, refused
from tests.own_program import build
from vae_dist.config import InputError, ModelConfig
from vae_dist.export import to_onnx
from vae_dist.model import VAE, build_model


def run(file: Path, **inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(file)
    assert [value.name for value in session.get_inputs()] == list(inputs)
    return [torch.from_numpy(array) for array in session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})]


def test_the_command_writes_what_computes_the_same(trained: Path, command: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = command("export", trained, "--out", tmp_path)
    assert outcome.status == 0, outcome.err
    model, images, latents = vae_dist.load(trained), torch.rand(7, 1, 28, 28), torch.randn(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "encoder.onnx", images=images), list(model.encode(images)))
        torch.testing.assert_close(run(tmp_path / "decoder.onnx", latents=latents), [model.decode(latents)])
    assert outcome.out.count("from the model itself") == 2
    for file in tmp_path.iterdir():
        assert b"vae_dist/" not in file.read_bytes(), "no place of this machine"


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        build_model(ModelConfig(kind="conv", channels=2, likelihood="gaussian", latent_dim=3), (3, 30, 28), seed=0),
        build_model(
            ModelConfig(kind="resnet", channels=4, attention=7, likelihood="discretized_logistic", mixtures=2, latent_dim=3),
            (1, 28, 28),
            seed=0,
        ),
        build(),
    ],
    ids=["conv", "resnet", "own"],
)
def test_every_kind_of_network_can_be_exported(model: VAE, tmp_path: Path) -> None:
    differences = to_onnx(model.eval(), tmp_path)
    assert {file.name for file in differences} == {"encoder.onnx", "decoder.onnx"}
    latents = torch.randn(4, 3)
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "decoder.onnx", latents=latents)[0], model.decode(latents))


@pytest.mark.slow
def test_files_that_would_compute_something_else_are_not_written(tmp_path: Path) -> None:
    class Unsteady(VAE):
        """Gives something else once it has been traced."""

        calls = 0

        def decode(self, latents: Tensor) -> Tensor:
            self.calls += 1
            return super().decode(latents) + self.calls

    made, spoilt = build(), build()
    next(spoilt.encoder.parameters()).data.fill_(torch.nan)
    for model in (Unsteady(made.encoder, made.decoder, 3, (1, 28, 28)).eval(), spoilt):
        with pytest.raises(InputError, match="other figures"):
            to_onnx(model, tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_without_the_extra_it_says_what_to_install(
    trained: Path, command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vae_dist.export.find_spec", lambda _: None)
    refused(command("export", trained), "pip install '.[onnx]'")
