"""The schedule is a function of the step; the optimizer's state goes by parameter name."""

import pytest
import torch

from vae_dist.config import InputError, ModelConfig, OptimizerConfig
from vae_dist.model import VAE, build_model
from vae_dist.optimizer import build_optimizer, learning_rate, load_optimizer_tensors, optimizer_tensors, set_learning_rate


def test_schedules() -> None:
    def rates(**options: object) -> list[float]:
        config = OptimizerConfig(lr=1.0, **options)  # type: ignore[arg-type]
        return [round(learning_rate(config, step, 4, 2), 4) for step in range(8)]

    assert rates() == [1.0] * 8
    assert rates(warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rates(schedule="linear") == [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert rates(schedule="linear", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(schedule="cosine")[::2] == [1.0, 0.8536, 0.5, 0.1464]


def test_the_iwae_schedule_takes_3280_epochs_whatever_the_runs_length() -> None:
    """lr * 10^(-i/7) for 3^i epochs, i = 0 to 7; then it stays."""
    config = OptimizerConfig(lr=1.0, schedule="iwae")
    expected = [10 ** (-i / 7) for i in range(8) for _ in range(3**i)]
    assert len(expected) == 3280
    steps_per_epoch = 3
    for epochs in (1, 3280):
        found = [learning_rate(config, step, steps_per_epoch, epochs) for step in range(steps_per_epoch * 3280)]
        assert found == pytest.approx([rate for rate in expected for _ in range(steps_per_epoch)])
    assert learning_rate(config, 10**6, steps_per_epoch, 10**6) == pytest.approx(0.1)
    warmed = OptimizerConfig(lr=1.0, schedule="iwae", warmup_steps=2)
    assert [learning_rate(warmed, step, 1, 4) for step in range(3)] == pytest.approx([0.5, 1.0, 10 ** (-1 / 7)])


def model() -> VAE:
    return build_model(ModelConfig(hidden=(5,), latent_dim=2), (1, 2, 3), seed=0)


def step(vae: VAE, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in vae.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_a_restored_optimizer_goes_on_as_the_first_would(kind: str) -> None:
    config = OptimizerConfig(kind=kind)  # type: ignore[arg-type]
    first = model()
    optimizer = build_optimizer(config, first)
    step(first, optimizer, 1)
    second = model()
    second.load_state_dict(first.state_dict())
    restored = build_optimizer(config, second)
    tensors = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, first).items()}
    load_optimizer_tensors(restored, second, dict(reversed(tensors.items())))
    step(first, optimizer, 2)
    step(second, restored, 2)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_adamw_is_the_published_update_and_spares_biases() -> None:
    """Loshchilov & Hutter 2019, algorithm 2, by hand in float64; tensors of one dimension as with Adam alone."""
    config = OptimizerConfig(kind="adamw", lr=0.01, betas=(0.8, 0.95), eps=1e-4, weight_decay=0.5)
    vae = model()
    optimizer = build_optimizer(config, vae)
    by_hand = {name: parameter.detach().double() for name, parameter in vae.named_parameters()}
    first, second = ({name: torch.zeros_like(weight) for name, weight in by_hand.items()} for _ in range(2))
    for t in range(1, 6):
        rate = 0.01 / t
        set_learning_rate(optimizer, rate)
        step(vae, optimizer, t)
        for name, parameter in vae.named_parameters():
            assert parameter.grad is not None
            gradient = parameter.grad.double()
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            move = first[name] / (1 - 0.8**t) / ((second[name] / (1 - 0.95**t)).sqrt() + 1e-4)
            decay = 0.5 if name.endswith(".weight") else 0.0
            by_hand[name] = by_hand[name] - rate * move - rate * decay * by_hand[name]
    assert {name.split(".")[-1] for name in by_hand} == {"weight", "bias"}
    for name, parameter in vae.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), by_hand[name], rtol=1e-5, atol=1e-7)


def test_only_tensors_of_two_or_more_dimensions_decay() -> None:
    """Kernels of convolutions do; a norm's scale does not, nor does a learned scalar."""
    network = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.GroupNorm(2, 4))
    network.scalar = torch.nn.Parameter(torch.ones(()))
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizer = build_optimizer(OptimizerConfig(kind="adamw", lr=0.1, weight_decay=0.5), network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if name == "0.weight" else 1.0))


def test_state_that_does_not_fit_is_refused() -> None:
    vae = model()
    optimizer = build_optimizer(OptimizerConfig(), vae)
    step(vae, optimizer, 1)
    tensors = optimizer_tensors(optimizer, vae)
    with pytest.raises(InputError, match=r"of decoder\.0\.bias is missing"):
        load_optimizer_tensors(optimizer, vae, {key: t for key, t in tensors.items() if "decoder.0.bias" not in key})
    wrong = tensors | {"optimizer.decoder.0.bias.exp_avg": torch.zeros(99)}
    with pytest.raises(InputError, match=r"exp_avg of decoder\.0\.bias is missing, or not float32 of shape"):
        load_optimizer_tensors(optimizer, vae, wrong)


def test_a_model_is_a_function_of_its_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    a, b, c = (build_model(ModelConfig(), (1, 4, 4), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(a.encoder.get_parameter("1.weight"), b.encoder.get_parameter("1.weight"))
    assert not torch.equal(a.encoder.get_parameter("1.weight"), c.encoder.get_parameter("1.weight"))


def test_the_default_model_has_the_seeds_size() -> None:
    assert sum(p.numel() for p in build_model(ModelConfig(), (1, 28, 28), 0).parameters()) == 652_824
