"""A config comes from a file and then the command line, survives being saved, and refuses what is wrong by name."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import ROOT
from vae_dist.config import Config, DataConfig, InputError, ModelConfig, ObjectiveConfig, OptimizerConfig, TrainerConfig
from vae_dist.options import differences, from_mapping, parse, to_mapping, to_yaml

RECIPES = sorted((ROOT / "configs").glob("**/*.yaml"))


def test_no_option_at_all_is_the_seeds_job() -> None:
    config = parse([])
    assert (config.data.name, config.data.batch_size, config.trainer.epochs) == ("mnist", 128, 10)
    assert (config.model.kind, config.model.hidden, config.model.latent_dim) == ("mlp", (400,), 20)
    assert (config.optimizer.kind, config.optimizer.lr, config.optimizer.betas) == ("adam", 1e-3, (0.9, 0.999))
    assert (config.trainer.precision, config.output, config.resume) == ("fp32", "runs/mnist", "auto")


def test_options_beat_the_file_and_the_file_beats_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 3\nmodel: {hidden: [300, 100]}\noptimizer: {lr: 1e-2, clip_norm: 5}\n")
    config = parse(["--config", str(file), "--optimizer.lr", "0.5", "--trainer.deterministic", "true"])
    assert config.seed == 3
    assert config.model.hidden == (300, 100)
    assert config.optimizer == OptimizerConfig(lr=0.5, clip_norm=5.0)
    assert config.trainer.deterministic
    assert config.output == "runs/mine"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_parses_and_says_what_it_is(recipe: Path) -> None:
    config = parse(["--config", str(recipe)])
    assert (config.output, config.tracking.group) == (f"runs/{recipe.stem}", recipe.stem)
    assert recipe.read_text().startswith("# ")
    assert config.expect.low is not None
    assert config.expect.high is not None


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(output="x", seed=7, data=DataConfig(name="glyphs", batch_size=1)),
        Config(model=ModelConfig(hidden=()), optimizer=OptimizerConfig(lr=3e-7, clip_norm=1.5, betas=(0.0, 0.5))),
        Config(trainer=TrainerConfig(precision="bf16", micro_batch_size=64, deterministic=True)),
        Config(optimizer=OptimizerConfig(kind="adamw", weight_decay=0.05, ema=0.999)),
        Config(model=ModelConfig(likelihood="gaussian", sigma=0.25)),
        Config(model=ModelConfig(kind="resnet", halvings=3, latent="spatial", blocks=2, attention=8, recompute=True)),
        Config(objective=ObjectiveConfig(beta=0.5, anneal="cyclical", anneal_steps=9, free_bits=0.1, free_bits_per="group")),
        Config(model=ModelConfig(likelihood="gaussian", sigma="optimal"), objective=ObjectiveConfig(kind="iwae", samples=5)),
    ],
)
def test_a_saved_config_fed_back_is_the_same(config: Config, tmp_path: Path) -> None:
    assert from_mapping(to_mapping(config), "here") == config
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    named_by_the_file = replace(config, output="x", tracking=replace(config.tracking, group="y"))
    assert parse(["--config", str(file), "--output", "x", "--tracking.group", "y"]) == named_by_the_file


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--optimizer.lrr", "1"], ["--optimizer.lrr", "--optimizer.lr FLOAT"]),
        (["--data.bach_size", "1"], ["--data.bach_size", "--data.batch_size INT"]),
        (["--data.name", "mnits"], ["mnits", "--data.name", "'mnist'"]),
        (["--seed", "x"], ["--seed", "'x'"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--trainer.epochs", "1.5"], ["--trainer.epochs", "1.5"]),
        (["--trainer.epochs", "0"], ["--trainer.epochs 0", "at least 1"]),
        (["--data.batch_size", "-3"], ["--data.batch_size -3", "at least 1"]),
        (["--model.latent_dim", "0"], ["--model.latent_dim 0"]),
        (["--model.hidden", "400", "0"], ["--model.hidden 400 0"]),
        (["--optimizer.lr", "nan"], ["--optimizer.lr nan"]),
        (["--optimizer.lr", "-1"], ["--optimizer.lr -1"]),
        (["--optimizer.betas", "0.9", "1"], ["--optimizer.betas 0.9 1"]),
        (["--optimizer.clip_norm", "0"], ["--optimizer.clip_norm 0"]),
        (["--optimizer.ema", "1"], ["--optimizer.ema 1.0", "in [0, 1)"]),
        (["--optimizer.ema", "-0.1"], ["--optimizer.ema -0.1"]),
        (["--optimizer.weight_decay", "0.1"], ["--optimizer.weight_decay 0.1", "--optimizer.kind adamw"]),
        (["--optimizer.weight_decay", "0.1", "--optimizer.kind", "sgd"], ["--optimizer.weight_decay 0.1", "adamw"]),
        (["--optimizer.weight_decay", "-1", "--optimizer.kind", "adamw"], ["--optimizer.weight_decay -1", "0 or more"]),
        (["--trainer.micro_batch_size", "0"], ["--trainer.micro_batch_size 0"]),
        (["--model.kind", "conv", "--model.hidden", "40"], ["--model.hidden 40", "--model.kind mlp alone"]),
        (["--model.kind", "resnet", "--model.activation", "tanh"], ["--model.activation tanh", "mlp and conv alone"]),
        (["--model.channels", "16"], ["--model.channels 16", "--model.kind conv and resnet alone"]),
        (["--model.halvings", "2"], ["--model.halvings 2", "conv and resnet alone"]),
        (["--model.latent", "spatial"], ["--model.latent spatial", "conv and resnet alone"]),
        (["--model.kind", "conv", "--model.blocks", "2"], ["--model.blocks 2", "--model.kind resnet alone"]),
        (["--model.kind", "conv", "--model.attention", "7"], ["--model.attention 7", "--model.kind resnet alone"]),
        (["--model.kind", "conv", "--model.recompute", "true"], ["--model.recompute true", "--model.kind resnet alone"]),
        (["--model.kind", "conv", "--model.channels", "0"], ["--model.channels 0", "at least 1"]),
        (["--model.kind", "conv", "--model.halvings", "0"], ["--model.halvings 0", "at least 1"]),
        (["--model.kind", "resnet", "--model.blocks", "0"], ["--model.blocks 0", "at least 1"]),
        (["--model.kind", "resnet", "--model.attention", "-1"], ["--model.attention -1", "0 or more"]),
        (["--model.sigma", "0", "--model.likelihood", "gaussian"], ["--model.sigma 0", "a positive number"]),
        (["--model.sigma", "0.5"], ["--model.sigma 0.5", "--model.likelihood gaussian"]),
        (["--model.mixtures", "0", "--model.likelihood", "discretized_logistic"], ["--model.mixtures 0"]),
        (["--model.mixtures", "2"], ["--model.mixtures 2", "discretized_logistic"]),
        (["--model.output_bias", "data", "--model.likelihood", "discretized_logistic"], ["--model.output_bias data"]),
        (["--data.binarize", "static", "--model.likelihood", "gaussian"], ["--data.binarize static", "bernoulli"]),
        (["--objective.samples", "0"], ["--objective.samples 0"]),
        (["--objective.beta", "-1"], ["--objective.beta -1"]),
        (["--objective.beta", "2", "--objective.kind", "iwae"], ["--objective.beta 2", "iwae"]),
        (
            ["--objective.anneal", "linear", "--objective.anneal_steps", "9", "--objective.kind", "iwae"],
            ["--objective.anneal linear", "iwae"],
        ),
        (["--objective.anneal", "linear"], ["--objective.anneal_steps 0", "at least 1"]),
        (["--objective.anneal_steps", "9"], ["--objective.anneal_steps 9", "--objective.anneal"]),
        (["--objective.anneal_cycles", "0"], ["--objective.anneal_cycles 0"]),
        (["--objective.free_bits", "nan"], ["--objective.free_bits nan"]),
        (["--objective.free_bits", "0.5", "--objective.kind", "iwae"], ["--objective.free_bits 0.5", "iwae"]),
        (["--objective.doubly_reparameterized", "true"], ["--objective.doubly_reparameterized true", "iwae"]),
        (["--trainer.deterministic", "true", "--trainer.micro_batch_size", "3"], ["--trainer.micro_batch_size 3", "16"]),
        (["--trainer.precision", "no"], ["--trainer.precision", "'fp32'"]),
        (["--trainer.max_minutes", "-1"], ["--trainer.max_minutes -1"]),
        (["--checkpoint.keep", "0"], ["--checkpoint.keep 0"]),
        (["--tracking.log_every", "0"], ["--tracking.log_every 0"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_options_are_named(options: list[str], told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(options)
    assert end.value.code == 2
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for words in told:
        assert words in printed


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "No such file"),
        ("a: [", "not YAML"),
        ("- 1", "must hold fields"),
        ("\0", "not YAML"),
        ("just words", "must hold fields"),
        ("seed: 1\nseed: 2", "more than once"),
        ("help: true", "must hold fields"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(content: str | None, told: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=rf"mine\.yaml: .*{told}"):
        parse(["--config", str(file)])


def test_config_names_one_file(tmp_path: Path) -> None:
    for options in (["--config"], ["--config="], ["--config", "a.yaml", "--config", "b.yaml"]):
        with pytest.raises(InputError, match="name one YAML file"):
            parse(options)


def test_text_fields_hold_any_text_and_empty_sections_nothing(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("output: none\ntracking: {project: --seed}\ndata:\n")
    config = parse(["--config", str(file)])
    assert (config.output, config.tracking.project, config.data) == ("none", "--seed", DataConfig())
    assert parse(["--output", "none", "--tracking.project", "true"]).tracking.project == "true"
    assert parse(["--output=none", "--tracking.project=true"]).tracking.project == "true"


@pytest.mark.parametrize("options", [["--trainer.deterministic", "true"], ["--trainer.deterministic=true"]])
def test_switches_are_written_as_in_yaml(options: list[str]) -> None:
    assert parse(options).trainer.deterministic
    assert not parse([word.replace("true", "false") for word in options]).trainer.deterministic
    assert parse(["--optimizer.clip_norm=none"]).optimizer.clip_norm is None


def test_a_typo_in_a_file_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("optimizer: {lrr: 1}")
    with pytest.raises(SystemExit):
        parse(["--config", str(tmp_path / "mine.yaml")])
    printed = capsys.readouterr().err
    assert "--optimizer.lr FLOAT" in printed
    assert "mine.yaml" in printed


SECTIONS = {name: list(fields) for name, fields in to_mapping(Config()).items() if isinstance(fields, dict)}


def help_of(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as end:
        parse(args)
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [80, 200])
def test_the_help_is_one_screen_and_names_every_option(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    printed = help_of(capsys, "--seed", "3", "-h")
    assert len(printed.splitlines()) <= 50
    assert max(map(len, printed.splitlines())) <= 100
    assert all(f"--{name} " in printed for name in ("seed", "output", "resume", "config"))
    shown = printed.split()
    assert [name for section, names in SECTIONS.items() for name in [section, *names] if name not in shown] == []


@pytest.mark.parametrize("section", SECTIONS)
def test_a_sections_help_explains_its_options_and_no_others(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    printed = help_of(capsys, "--help", section)
    assert printed == help_of(capsys, f"--help={section}")
    assert all(f"--{section}.{name} " in printed for name in SECTIONS[section])
    assert printed.count("(default:") == len(SECTIONS[section])


def test_the_whole_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    printed = help_of(capsys, "--help", "all")
    assert [
        f"{section}.{name}" for section in SECTIONS for name in SECTIONS[section] if f"--{section}.{name}" not in printed
    ] == []
    assert all(f"--{name} " in printed for name in ("seed", "output", "resume"))


def test_help_of_no_section_says_which_there_are() -> None:
    with pytest.raises(InputError, match="did you mean `--help optimizer`"):
        parse(["--help", "optimiser"])
    with pytest.raises(InputError, match="the sections are data, model"):
        parse(["--help", "7"])


def test_differences_name_what_changes_a_runs_meaning() -> None:
    old = Config(seed=1)
    assert differences(old, Config(seed=2)) == ["seed: 1 there, 2 here"]
    harmless = Config(
        seed=1, output="y", data=DataConfig(root="/elsewhere"), trainer=TrainerConfig(epochs=99, micro_batch_size=3)
    )
    assert differences(old, harmless) == []
    kept, again = (Config(model=ModelConfig(kind="resnet", recompute=recompute)) for recompute in (False, True))
    assert differences(kept, again) == []
    falling = OptimizerConfig(schedule="linear")
    longer = Config(seed=1, optimizer=falling, trainer=TrainerConfig(epochs=99))
    assert differences(Config(seed=1, optimizer=falling), longer) == ["trainer.epochs: 10 there, 99 here"]
    staged = OptimizerConfig(schedule="iwae")
    assert differences(Config(optimizer=staged), Config(optimizer=staged, trainer=TrainerConfig(epochs=99))) == []
    assert differences(Config(), Config(objective=ObjectiveConfig(beta=2))) == ["objective.beta: 1.0 there, 2 here"]


def test_a_config_from_before_a_field_was_there_has_its_default() -> None:
    old = to_mapping(Config(seed=4))
    del old["objective"], old["data"]["binarize"]
    del old["optimizer"]["weight_decay"], old["optimizer"]["ema"]
    for name in ("channels", "halvings", "latent", "blocks", "attention", "recompute"):
        del old["model"][name]
    for name in ("activation", "output_bias", "likelihood", "sigma", "mixtures"):
        del old["model"][name]
    assert from_mapping(old, "here") == Config(seed=4)


@pytest.mark.parametrize(
    ("section", "values", "told"),
    [
        (ModelConfig, {"kind": "transformer"}, "--model.kind transformer: must be one of mlp, conv, resnet, own"),
        (ModelConfig, {"hidden": (1.5,)}, "--model.hidden 1.5: must be tuple[int, ...]"),
        (
            ModelConfig,
            {"likelihood": "gaussian", "sigma": "own"},
            "--model.sigma own: must be float or one of learned, optimal",
        ),
        (OptimizerConfig, {"schedule": "step"}, "--optimizer.schedule step: must be one of constant"),
        (TrainerConfig, {"epochs": 1.5}, "--trainer.epochs 1.5: must be int"),
        (TrainerConfig, {"precision": "fp8"}, "--trainer.precision fp8: must be one of fp32"),
    ],
)
def test_a_program_is_refused_too_what_is_no_value_of_an_option(section: Any, values: dict[str, Any], told: str) -> None:
    name = section.__name__.removesuffix("Config").lower()
    with pytest.raises(InputError, match=re.escape(told)):
        replace(Config(), **{name: section(**values)})


def test_fields_of_a_config_itself_are_of_their_types() -> None:
    wrong: Any = {"output": Path("runs"), "data": TrainerConfig()}
    for name, kind in (("output", "str"), ("data", "DataConfig")):
        with pytest.raises(InputError, match=f"--{name} .*: must be {kind}"):
            Config(**{name: wrong[name]})
