"""The command `vae-dist`: it says what to do first, finds each entry point, and is no layer between that and the shell."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT, Outcome, environment, refused
from vae_dist import __version__
from vae_dist.__main__ import COMMANDS, main
from vae_dist.config import InputError
from vae_dist.options import RECIPES, parse, program

NAMES = [name for group in COMMANDS.values() for name in group]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A program as pip makes one of an entry point, here of this checkout."""
    path = tmp_path / "bin" / "vae-dist"
    path.parent.mkdir()
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path[0] = {str(ROOT)!r}\nfrom vae_dist.__main__ import main\nmain()\n"
    )
    path.chmod(0o755)
    return path


def run(*command: object, cwd: Path = ROOT, path: Path = Path("/usr/bin")) -> Outcome:
    """Runs a command, by default of this Python, in a process of its own; a shell finds programs in `path` alone."""
    start = list(map(str, command)) if str(command[0]).startswith("/") else [sys.executable, *map(str, command)]
    env = environment(PATH=str(path))
    done = subprocess.run(start, cwd=cwd, env=env, capture_output=True, text=True, timeout=100, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_alone_it_says_what_to_do_first_on_one_screen() -> None:
    alone = run("-m", "vae_dist")
    assert alone.status == 0
    lines = alone.out.splitlines()
    assert len(lines) < 24, "a plain terminal"
    assert max(map(len, lines)) <= 80
    assert "  vae-dist train --config glyphs" in alone.out
    for name in NAMES:
        assert f"\n  {name:10}" in alone.out
    assert run("-m", "vae_dist", "--help") == run("-m", "vae_dist", "-h") == alone
    assert run("-m", "vae_dist", "--version") == Outcome(0, f"vae_dist {__version__}\n", "")


@pytest.mark.parametrize(("typed", "meant"), [("tarin", "train"), ("evalute", "evaluate"), ("Generate", "generate")])
def test_a_typo_is_an_error_with_the_name_that_was_meant(typed: str, meant: str) -> None:
    outcome = run("-m", "vae_dist", typed, "--seed", 1)
    refused(outcome, f"vae-dist {typed}", f"did you mean `vae-dist {meant}`?")
    assert outcome.out == ""


def test_a_name_like_none_is_refused_with_all_names() -> None:
    refused(run("-m", "vae_dist", "frobnicate"), *NAMES)
    refused(run("-m", "vae_dist", "--seed"), *NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_each_command_shows_its_own_help(
    name: str, script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And names itself as it was called."""
    monkeypatch.setattr(sys, "argv", [str(script), name, "--help"])
    monkeypatch.setenv("PATH", str(script.parent))
    with pytest.raises(SystemExit, match="0"):
        main()
    assert capsys.readouterr().out.startswith(f"usage: vae-dist {name} ")


@pytest.mark.parametrize(
    ("started", "path", "shown"),
    [
        ("/usr/bin/vae-dist", "/usr/bin", "/usr/bin/vae-dist evaluate"),  # a shell would not find it
        (f"{ROOT}/vae_dist/train.py", f"{ROOT}/.venv/bin", "python -m vae_dist.evaluate"),
        (f"{ROOT}/vae_dist/__main__.py", f"{ROOT}/.venv/bin", "python -m vae_dist evaluate"),
        (f"{ROOT}/vae_dist/doctor/__main__.py", f"{ROOT}/.venv/bin", "python -m vae_dist.evaluate"),
        (f"{ROOT}/vae_dist/doctor/__main__.py", "/nowhere", ".venv/bin/python -m vae_dist.evaluate"),
    ],
)
def test_other_commands_are_named_so_that_they_can_be_typed(
    started: str, path: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = ROOT / ".venv" / "bin" / "python"
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr("shutil.which", lambda name: str(python) if name == "python" and path == str(python.parent) else None)
    monkeypatch.chdir(ROOT)
    assert program("vae_dist.evaluate") == shown


@pytest.mark.parametrize("command", ["vae_dist --help", "vae_dist.train --help"])
def test_a_reader_who_has_seen_enough_of_the_help_is_no_error(command: str) -> None:
    started = [sys.executable, "-u", "-m", *command.split()]
    with subprocess.Popen(started, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        assert job.stdout is not None
        assert job.stderr is not None
        job.stdout.close()
        assert job.stderr.read() == b""


def test_exit_status_and_words_are_those_of_the_entry_point(script: Path, tmp_path: Path) -> None:
    through = run(script, "evaluate", tmp_path / "nowhere")
    refused(through, f"{tmp_path / 'nowhere'}: no weights there")
    assert through == run("-m", "vae_dist.evaluate", tmp_path / "nowhere")


def test_a_locale_without_some_letters_gets_question_marks(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    outcome = run(script, "train", "--help")
    assert (outcome.status, outcome.err) == (0, "")
    assert "?" in outcome.out


@pytest.mark.slow
def test_a_launcher_starts_the_command_too(script: Path, small_root: Path, tmp_path: Path) -> None:
    """From a folder without recipes, which are in the package; the next commands are named as they can be typed there."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", "vae-dist", "train"]
    options = ["--config", "mnist", "--data.root", small_root, "--trainer.epochs", 1, "--output", "runs/my run"]
    outcome = run(*launcher, *options, cwd=tmp_path, path=script.parent)
    assert outcome.status == 0, outcome.err
    assert "  generate     vae-dist generate 'runs/my run'\n" in outcome.out
    assert " -m wandb sync 'runs/my run/wandb'/offline-run-*\n" in outcome.out
    assert json.loads((tmp_path / "runs" / "my run" / "status.json").read_text())["state"] == "finished"
    rows = (tmp_path / "runs" / "my run" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(row)["processes"] for row in rows if "processes" in row} == {2}


@pytest.mark.parametrize("file", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_has_a_name_that_works_anywhere(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_file = parse(["--config", str(file)])
    monkeypatch.chdir(tmp_path)
    name = str(file.relative_to(ROOT / "configs").with_suffix(""))
    assert parse(["--config", name]) == by_file
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("seed: 7")  # a user's own file is what its name says
    assert parse(["--config", name]).seed == 7


def test_the_recipes_of_the_package_are_those_of_the_repository() -> None:
    assert RECIPES.resolve() == (ROOT / "configs").resolve()


def test_a_recipe_that_is_nowhere_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(
        InputError, match=r"--config configs/mnits\.yaml: No such file .*: celeba64, .*iwae/iwae_5, .*mnist_fast$"
    ):
        parse(["--config", "configs/mnits.yaml"])
