"""The benchmark: its medians and its words from made-up runs, its plot, and a small one from start to end."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import bench, watch
from benchmarks.plot import plot
from benchmarks.report import Case, Found, bound, epoch_floor, line, summary, with_shares

RUN = {"epoch_seconds": 2.0, "start_seconds": 4.0, "outside_epochs_seconds": 6.0, "peak_mib": 700.0, "communication_share": 0.0}
PROFILE = {
    "step_seconds": 0.004,
    "shares": {"gemm": 0.5, "optimizer": 0.2, "data": 0.1},
    "gemm_seconds": 0.001,
    "gemm_flops_per_second": 1e11,
    "optimizer_seconds": 0.0005,
    "moved_bytes_per_second": 3e10,
}


def found(case: Case, runs: list[dict[str, Any]], **changed: object) -> Found:
    of_case = with_shares(summary(case, 60_000, runs), PROFILE | changed) | {"floor": epoch_floor([PROFILE | changed], 469)}
    return of_case | {"bound": bound(of_case)}


def test_a_summary_has_medians_and_spreads() -> None:
    runs = [RUN | {"epoch_seconds": s, "start_seconds": 2 * s, "peak_mib": 100 * s} for s in (3.0, 1.0, 2.0)]
    of_case = summary(Case("tight", 400), 60_000, runs)
    assert (of_case["epoch_seconds"], of_case["epoch_seconds_spread"]) == (2.0, [1.0, 3.0])
    assert (of_case["start_seconds"], of_case["start_seconds_spread"]) == (4.0, [2.0, 6.0])
    assert (of_case["images_per_second"], of_case["peak_mib"]) == (30_000, 300)


def test_communication_is_unknown_or_a_median() -> None:
    case = Case("vae_dist", 400, processes=2)
    unknown = found(case, [RUN | {"communication_share": None}] * 3)
    assert unknown["communication_share"] is None
    assert unknown["shares"]["other"] == pytest.approx(0.2)
    known = found(case, [RUN | {"communication_share": share} for share in (0.1, 0.19, 0.3)])
    assert known["shares"]["communication"] == 0.19
    assert known["shares"]["other"] == pytest.approx(0.01)
    assert "  ? " in line(unknown)
    assert " 19% " in line(known)


def test_the_floor_is_the_lowest_of_cases_alike() -> None:
    slow = PROFILE | {"gemm_seconds": 0.004, "gemm_flops_per_second": 2.5e10}
    assert epoch_floor([slow, PROFILE], 100) == epoch_floor([PROFILE], 100)
    assert epoch_floor([PROFILE], 100)["seconds"] == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("largest", "words"),
    [("gemm", "matrix products (70%"), ("optimizer", "the optimizer (70%"), ("data", "its data (70%"), ("none", "all else: ")],
)
def test_the_bound_is_the_largest_share(largest: str, words: str) -> None:
    shares = dict.fromkeys(("gemm", "optimizer", "data"), 0.1) | ({largest: 0.7} if largest != "none" else {})
    said = found(Case("tight", 400), [RUN], shares=shares)["bound"]
    assert words in said
    assert "0.47 s an epoch, at 100 GFLOP/s" in said
    assert "0.23 s, at 30 GB/s; it takes 2.8 times that floor" in said


def test_the_plot_has_a_panel_for_each_width(tmp_path: Path) -> None:
    cases = [found(case, [RUN, RUN | {"epoch_seconds": 2.5}]) for case in bench.cases([400, 4000])]
    plot({"cases": cases}, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size < 100_000
    with Image.open(tmp_path / "speed.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1365, 507))
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_the_products_of_a_step_are_counted() -> None:
    seconds, flops = watch.gemm_seconds([torch.Size([5, 7]), torch.Size([3, 5])], 4, torch.float32)
    assert seconds > 0
    assert flops == 2 * (4 * 5 * 7) * 2 + 3 * (4 * 3 * 5) * 2


def test_a_floor_above_the_epoch_is_void() -> None:
    assert "void" in found(Case("tight", 400), [RUN], gemm_seconds=0.1)["bound"]
    assert "void" not in found(Case("tight", 400), [RUN])["bound"]


def test_a_step_is_shared_out_less_what_the_profiler_adds() -> None:
    matrix = torch.randn(200, 200)
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        start = time.perf_counter()
        for _ in range(20):
            with record_function("data"):
                matrix.cos()  # has no kind of its own
            matrix.mm(matrix)
        step = (time.perf_counter() - start) / 20
    raw = watch.step_shares(watched, step, step, 20)
    assert min(raw["data"], raw["gemm"]) > raw["optimizer"] == 0
    for plain in (0.9 * step, 0.5 * step, 0.1 * step):  # far more than a profiler adds
        assert 0 < sum(watch.step_shares(watched, plain, step, 20).values()) <= 1


@pytest.mark.slow
def test_a_small_benchmark_runs_to_its_end(
    small_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # steps so small gain nothing from more, and other tests run beside
    options = ["--data", small_root, "--rounds", 1, "--hidden", 40, "--only", "fp32: vae_dist$", "--out", tmp_path]
    assert bench.main(list(map(str, options))) == 0
    printed = capsys.readouterr().out
    (case,) = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert case["case"] == Case("vae_dist", 40)._asdict()
    assert 0 < case["epoch_seconds"] < case["start_seconds"]
    assert case["shares"].keys() == {"gemm", "optimizer", "data", "communication", "other"}
    assert case["shares"]["gemm"] > 0
    assert case["bound"] in printed
    assert (tmp_path / "speed.png").is_file()
    loop = bench.measure(Case("tight", 40), str(small_root))
    assert loop.keys() == RUN.keys()
    assert 0 < loop["epoch_seconds"] < loop["start_seconds"]
