"""What a network is made of, and where its output begins."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import vae_dist
from tests.helpers import Outcome, resident
from vae_dist.config import DataConfig, ModelConfig
from vae_dist.data.images import Resident
from vae_dist.model import build_model

PIXELS = torch.randint(0, 256, (5000, 1, 3, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
PIXELS[:, 0, 0, 0], PIXELS[:, 0, 0, 1] = 0, 255


def test_activations_stand_between_the_layers_and_change_no_initial_weight() -> None:
    relu, tanh = (build_model(ModelConfig(hidden=(7, 5), activation=name), (1, 3, 4), 0) for name in ("relu", "tanh"))
    for model, kind in ((relu, nn.ReLU), (tanh, nn.Tanh)):
        for network in (model.encoder, model.decoder):
            assert [type(m) for m in network.children() if isinstance(m, (nn.ReLU, nn.Tanh))] == [kind, kind]
    assert all(torch.equal(a, b) for a, b in zip(relu.parameters(), tanh.parameters(), strict=True))


def test_the_output_bias_starts_at_the_log_odds_of_the_mean_image() -> None:
    model = build_model(ModelConfig(hidden=(7,), output_bias="data"), (1, 3, 4), 0, Resident(PIXELS))
    plain = build_model(ModelConfig(hidden=(7,)), (1, 3, 4), 0)
    bias = model.decoder.get_parameter("2.bias")
    mean = (PIXELS.double().mean(0) / 255).flatten().clamp(0.001, 0.999)
    torch.testing.assert_close(bias.double(), torch.log(mean / (1 - mean)), rtol=1e-6, atol=1e-6)
    assert bias.requires_grad
    others = {name: tensor for name, tensor in plain.state_dict().items() if name != "decoder.2.bias"}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in others.items())
    shuffled = PIXELS[torch.randperm(5000)]
    again = build_model(ModelConfig(hidden=(7,), output_bias="data"), (1, 3, 4), 0, Resident(shuffled))
    assert torch.equal(again.decoder.get_parameter("2.bias"), bias), "to the last bit, in any order"


def test_a_run_starts_there_and_its_weights_hold_it(
    quick: list[object], small_root: Path, command: Callable[..., Outcome], tmp_path: Path
) -> None:
    still = ["--optimizer.kind", "sgd", "--optimizer.lr", 1e-30, "--trainer.epochs", 1]
    assert command("train", *quick, *still, "--model.output_bias", "data", "--output", tmp_path).status == 0
    pixels = resident(DataConfig(root=str(small_root)), train=True).pixels
    mean = (pixels.double().mean(0) / 255).flatten().clamp(0.001, 0.999)
    bias = load_file(tmp_path / "model.safetensors")["decoder.2.bias"]
    torch.testing.assert_close(bias.double().sigmoid(), mean, rtol=1e-5, atol=0)
    assert vae_dist.load(tmp_path).sample(1).shape == (1, 1, 28, 28)
