"""The model of a ring, what it says of more GPUs, and measurements over gloo between real processes."""

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import communication, scaling
from benchmarks.namespaces import Link, linked, why_not
from benchmarks.ring import Ring, Timing, error, fit, read_measured
from tests.helpers import Outcome, refused
from vae_dist.config import InputError
from vae_dist.distributed import run_entry_point

SEED = ["--step-us", 60]  # 652,824 parameters, 128 images a GPU
CONVOLUTIONAL = ["--parameters", 50_000_000, "--images", 64, "--step-us", 5800, "--overlap", 0.68]

Predict = Callable[..., Outcome]


@pytest.fixture
def predict(capsys: pytest.CaptureFixture[str]) -> Predict:
    """Runs benchmarks.scaling in this process, as `python -m` would."""

    def run(*args: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_entry_point(lambda: scaling.main([str(arg) for arg in args]))
        code = end.value.code
        return Outcome(code if isinstance(code, int) else 0, *capsys.readouterr())

    return run


def exact(ring: Ring, processes: int, size: int, slower: float = 1.0) -> Timing:
    seconds = ring.seconds(processes, size) * slower
    return Timing(processes, size, seconds, seconds, seconds, calls=1)


def plan(network: str = "nvlink", overlap: float = 0.0, fixed: float = 0.0) -> scaling.Plan:
    """The seed model: 60 µs for 128 images, `fixed` of them with any batch."""
    return scaling.Plan(scaling.Model(652_824, 128, fixed, (60e-6 - fixed) / 128), scaling.NETWORKS[network], overlap)


def efficiency(outcome: Outcome, gpus: int) -> float:
    """As it was printed for the same images on each GPU."""
    assert outcome.status == 0, outcome.err
    row = next(line for line in outcome.out.splitlines() if line[:6].strip() == str(gpus))
    return float(row.split()[3])


@pytest.mark.parametrize("ring", [Ring(2e-6, 370e9), Ring(200e-6, 1.5e9), Ring(10e-3, 12e6), Ring(0.0, 1e9)])
def test_the_fit_finds_the_ring_that_made_the_times(ring: Ring) -> None:
    timings = [exact(ring, processes, size) for processes in (2, 4) for size in communication.SIZES]
    found = fit(timings)
    assert found.latency == pytest.approx(ring.latency, rel=1e-6, abs=1e-12)
    assert found.bandwidth == pytest.approx(ring.bandwidth, rel=1e-6)


def test_the_fit_weighs_relative_errors_and_tells_them() -> None:
    ring = Ring(200e-6, 1.5e9)
    timings = [exact(ring, 2, size, slower) for size, slower in zip(communication.SIZES, [1.1, 0.9] * 4, strict=False)]
    found = fit(timings)
    assert found.latency == pytest.approx(ring.latency, rel=0.1)
    assert found.bandwidth == pytest.approx(ring.bandwidth, rel=0.1)
    assert max(abs(error(found, timing)) for timing in timings) < 0.2


def test_no_term_of_a_fit_is_negative() -> None:
    falling = [Timing(2, 4000, 2e-3, 2e-3, 2e-3, 1), Timing(2, 4_000_000, 1e-3, 1e-3, 1e-3, 1)]
    steep = [Timing(2, 4000, 1e-6, 1e-6, 1e-6, 1), Timing(2, 4_000_000, 1.0, 1.0, 1.0, 1)]
    assert fit(falling).latency > 0
    assert fit(falling).bandwidth > 0
    assert fit(steep).latency == 0
    with pytest.raises(InputError, match="single size"):
        fit(falling[:1] * 3)


@pytest.mark.parametrize("network", scaling.NETWORKS)
@pytest.mark.parametrize("overlap", [0.0, 0.7, 1.0])
def test_one_gpu_never_waits_and_more_wait_longer(network: str, overlap: float) -> None:
    counts = [1, 2, 4, 8] if network == "nvlink" else [1, 2, 4, 8, 16, 64]
    weak = [plan(network, overlap).weak(count) for count in counts]
    strong = [plan(network, overlap).strong(count) for count in counts]
    assert weak[0] == strong[0] == 1
    assert weak == sorted(weak, reverse=True)
    assert strong == sorted(strong, reverse=True)
    assert all(0 < few <= many <= 1 for few, many in zip(strong, weak, strict=True))


def test_nothing_hides_behind_a_backward_pass_that_is_shorter() -> None:
    slow = plan("ethernet-1g", overlap=1.0)
    assert slow.step(2, 128) == pytest.approx(60e-6 + slow.all_reduce(2) - scaling.BACKWARD * 60e-6)


@pytest.mark.parametrize(
    ("network", "gpus", "seconds"), [("nvlink", 8, 40e-6), ("infiniband", 16, 130e-6), ("ethernet-10g", 4, 3.6e-3)]
)
def test_the_seed_models_sum_takes_what_the_targets_say(network: str, gpus: int, seconds: float) -> None:
    assert plan(network).all_reduce(gpus) == pytest.approx(seconds, rel=0.02)


def test_efficiencies_are_what_the_targets_say(predict: Predict) -> None:
    assert efficiency(predict("--gpus", 8, "--network", "nvlink", *SEED), 8) == 0.6
    outcome = predict("--gpus", 64, "--network", "infiniband", *CONVOLUTIONAL)
    assert (efficiency(outcome, 8), efficiency(outcome, 64)) == (0.95, 0.91)


def test_a_model_that_is_too_small_is_told_what_would_help(predict: Predict) -> None:
    outcome = predict("--gpus", 8, *SEED, "--fixed-us", 52)
    assert "too small for 8 GPUs: they compute 60% of the time" in outcome.out
    assert "or 2 GPUs (84%)" in outcome.out
    found = re.search(r"([\d,]+) images on each GPU \(", outcome.out)
    assert found is not None
    images = int(found[1].replace(",", ""))
    step = 52 + 8 * images / 128
    larger = predict("--gpus", 8, "--images", images, "--step-us", step, "--fixed-us", 52)
    assert "too small" not in larger.out
    assert "ok: 8 GPUs compute 80% of the time" in larger.out
    assert "too small" in predict("--gpus", 8, "--images", images - 1, "--step-us", step - 8 / 128, "--fixed-us", 52).out
    assert "too small" not in predict("--gpus", 2, *SEED).out


@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("fixed", [0.0, 50e-6])
def test_the_images_that_would_help_are_the_fewest(overlap: float, fixed: float) -> None:
    poor = plan("ethernet-10g", overlap, fixed)
    images = poor.images_for(4, 0.8)

    def reached(images: int) -> float:
        return poor.step(1, images) / poor.step(4, images)

    assert reached(images) >= 0.8 > reached(images - 1)


def test_a_step_is_told_by_its_arithmetic_as_well(predict: Predict) -> None:
    by_flop = predict("--gpus", 8, "--mflop-per-image", 3.28, "--tflops", 52.48, "--fixed-us", 52)
    assert by_flop.out == predict("--gpus", 8, *SEED, "--fixed-us", 52).out  # 8 µs for 128 images


def test_a_measured_network_is_known_by_its_name(predict: Predict, tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"networks": {"office": {"latency_us": 2, "gbytes_per_s": 370}}}))
    measured = predict("--gpus", 8, "--network", "office", "--measured", file, *SEED)
    assert measured.out == predict("--gpus", 8, "--latency-us", 2, "--gbytes-per-s", 370, *SEED).out
    assert efficiency(measured, 8) == 0.6
    refused(predict("--network", "offce", "--measured", file, *SEED), "--network offce", "perhaps office?")
    refused(predict("--network", "office", "--measured", tmp_path / "nothing.json", *SEED), "nothing.json")
    for damaged in (
        "[]",
        "{",
        '{"networks": {"office": {}}}',
        '{"networks": {"office": {"latency_us": 1, "gbytes_per_s": 0}}}',
    ):
        file.write_text(damaged)
        refused(predict("--network", "office", "--measured", file, *SEED), "measured.json")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "--step-us"),
        (["--step-us", -1], "--step-us -1"),
        (["--step-us", "nan"], "--step-us nan"),
        (["--step-us", 60, "--tflops", 50], "either --step-us, or both --mflop-per-image and --tflops"),
        (["--tflops", 50], "either --step-us"),
        ([*SEED, "--gpus", 0], "--gpus 0"),
        ([*SEED, "--gpus", "many"], "--gpus"),
        ([*SEED, "--gpus", 16], "ends at 8 GPUs"),
        ([*SEED, "--images", 0], "--images 0"),
        ([*SEED, "--parameters", -5], "--parameters -5"),
        ([*SEED, "--fixed-us", 60], "--fixed-us 60"),
        ([*SEED, "--overlap", 1.1], "--overlap 1.1"),
        ([*SEED, "--efficiency", 1], "--efficiency 1"),
        ([*SEED, "--latency-us", 1], "both --latency-us and --gbytes-per-s"),
        ([*SEED, "--latency-us", 1, "--gbytes-per-s", 0], "--gbytes-per-s 0"),
    ],
)
def test_bad_options_are_refused(options: list[object], told: str, predict: Predict) -> None:
    refused(predict(*options), told)


def test_two_processes_are_measured_over_loopback(tmp_path: Path) -> None:
    small, large = 4096, 2**20
    network = communication.on_loopback([small, large], budget=0.1, counts=[2])
    assert [timing[:2] for timing in network.timings] == [(2, small), (2, large)]
    for timing in network.timings:
        assert 0 < timing.lowest <= timing.seconds <= timing.highest < 5
        assert timing.calls >= 3
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"networks": {"here": communication.as_json(network)}}))
    assert read_measured(file)["here"] == pytest.approx(network.ring)
    assert "1.05 MB" in "\n".join(communication.table("loopback", network))


def test_what_is_far_from_the_fit_is_said() -> None:
    ring = Ring(1e-4, 1e9)
    timings = [exact(ring, 2, 4096), exact(ring, 2, 2**20), exact(ring, 4096, 2**20, slower=3.0)]
    told = communication.misfits(communication.Network("nothing", ring, timings))
    assert len(told) == 1
    assert told[0].startswith("4096 processes (they share")
    assert "3.0 times what is fitted" in told[0]


def test_a_process_that_fails_ends_the_measurement() -> None:
    with pytest.raises(SystemExit, match="process 1 ended with 3"):
        communication.measure([[], ["sh", "-c", "exit 3"]], "lo", [4096], 0.1)


@pytest.fixture
def namespaces() -> Iterator[None]:
    """Needs network namespaces, and that none of this process is left."""
    if problem := why_not():
        pytest.skip(problem)
    yield
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert f"vae-dist-{os.getpid()}" not in left


@pytest.mark.usefixtures("namespaces")
def test_two_namespaces_with_a_delay_are_measured() -> None:
    network = communication.between_namespaces(Link(delay_ms=5, mbit_per_s=1000), [4096, 2**18], budget=0.3)
    assert network.slowed_by in ("tc netem", "our own switch")
    assert all(timing.lowest > 2 * 0.005 for timing in network.timings)  # two steps of a ring, each after the other


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize("link", [Link(), Link(delay_ms=1, mbit_per_s=100)])
def test_namespaces_are_removed_on_ctrl_c(link: Link) -> None:
    with pytest.raises(KeyboardInterrupt), linked(link):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "told"), [(["--budget", "0"], "--budget 0"), (["--networks", "lopback"], "--networks lopback")]
)
def test_bad_options_of_the_measurement_are_refused(options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run_entry_point(lambda: communication.main(options))
    assert isinstance(end.value.code, int)
    refused(Outcome(end.value.code, *capsys.readouterr()), told)
