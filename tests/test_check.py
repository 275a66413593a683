"""The receipt: what it prints of real jobs, and what it calls wrong."""

from collections.abc import Callable

import pytest

from tests.helpers import Outcome, launch, refused
from vae_dist import check
from vae_dist.check import Apart
from vae_dist.config import InputError

ALIKE = Apart(weights=1e-7, losses=1e-4, first_losses=1e-8, first_norms=1e-7, test_loss=1e-5)  # as the default mode may be
SAME = Apart(0.0, 0.0, 0.0, 0.0, 1e-16)


def test_two_processes_agree_with_one() -> None:
    done = launch("vae_dist.check", "--world", "1,2")
    assert done.returncode == 0, done.stderr
    row = next(line.split() for line in done.stdout.splitlines() if line.startswith("2 "))
    assert row[4] == "identical", "the weights in bitwise mode"
    assert "ok: the same weights in bitwise mode" in done.stdout


@pytest.mark.slow
def test_averaged_gradients_are_found_out_though_adam_hides_them(
    monkeypatch: pytest.MonkeyPatch, command: Callable[..., Outcome]
) -> None:
    monkeypatch.setattr(check, "_PROGRAM", ("tests.sabotage", "average"))
    outcome = command("check", "--world", "1, 2")
    assert outcome.status == 1
    assert "FAILED: the norms of the first 10 gradients differ by 5.0e-01 with 2 processes" in outcome.out
    assert outcome.out.count("FAILED") == 1, "neither the losses nor bitwise mode show it"


@pytest.mark.parametrize("world", ["1", "2,2", "1,two", "0,1", "1,-2", "1;2"])
def test_wrong_numbers_of_processes_are_refused(world: str, command: Callable[..., Outcome]) -> None:
    refused(command("check", "--world", world), f"--world {world}", "1,2,3")


def test_it_starts_the_processes_itself(command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    refused(command("check", "--world", "1,2"), "python -m vae_dist.check")


def test_without_a_wish_it_takes_what_the_machine_has() -> None:
    assert check.Options().worlds()[:2] == [1, 2]
    assert check.Options("3,1").worlds() == [3, 1]
    with pytest.raises(InputError):
        check.Options("1").worlds()


@pytest.mark.parametrize(
    ("default", "bitwise", "told"),
    [
        (ALIKE, SAME, ""),
        (ALIKE._replace(first_losses=2e-6), SAME, "the first 10 losses differ by 2.0e-06 with 2 processes"),
        (ALIKE._replace(first_norms=0.5), SAME, "the norms of the first 10 gradients differ by 5.0e-01"),
        (ALIKE, SAME._replace(weights=1e-12), "weights in bitwise mode differ"),
        (ALIKE, SAME._replace(losses=1e-8), "losses in bitwise mode differ"),
        (ALIKE, SAME._replace(test_loss=1e-8), "evaluation in bitwise mode differ"),
        (ALIKE._replace(first_losses=float("nan")), SAME, "the first 10 losses differ by nan"),
    ],
)
def test_what_is_further_apart_than_it_may_be_is_named_and_fails(
    default: Apart, bitwise: Apart, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = check.verdict({2: default}, {2: bitwise})
    out = capsys.readouterr().out
    assert status == (1 if told else 0)
    assert told in out
    assert ("FAILED" in out) == bool(told)
