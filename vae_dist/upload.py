"""A finished run on the Hugging Face Hub: its weights, figures and pictures, and a model card of what was measured.

python -m vae_dist.upload runs/mnist --repo user/mnist-vae
"""

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml

from vae_dist import __version__
from vae_dist.config import Config, InputError
from vae_dist.distributed import run_entry_point
from vae_dist.likelihoods import remark
from vae_dist.model import VAE
from vae_dist.options import command_line, flat, to_mapping, to_yaml, without_places
from vae_dist.run import RunFolder, evaluation_of, load_model
from vae_dist.tracking import Row, read_rows

_FILES = ("model.safetensors", "metrics.jsonl")
_OF_TRAINING = ("data", "model", "objective", "optimizer", "trainer")  # sections that say how the weights came about
_PICTURES = {
    "reconstruction": "Test images over their reconstructions",
    "sample": "Samples from the prior",
    "traversal": "One test image; each row moves one latent dimension",
}


@dataclass(frozen=True)
class Options:
    """Upload a finished run to the Hugging Face Hub, with a model card written from its files."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    repo: str | None = None
    """USER/NAME on the Hub; it is made if it is not there, and gets one commit."""
    visibility: Literal["public", "private"] = "public"
    """Of a repository that is made."""
    license: str | None = None
    """Of the weights, as the Hub names licenses, such as apache-2.0."""
    out: Path | None = None
    """Only write what would be uploaded to this new or empty folder."""

    def __post_init__(self) -> None:
        if (self.repo is None) == (self.out is None):
            raise InputError("name where the run goes: --repo USER/NAME, or a folder, --out DIR")


def main(args: list[str] | None = None) -> int:
    options = command_line(Options, "vae_dist.upload", sys.argv[1:] if args is None else args)
    if options.out is not None:
        if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
            raise InputError(f"--out {options.out}: is there already; name a new or empty folder")
        collect(options, options.out)
        print(f"{options.out}: what would be uploaded; README.md is the model card")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        collect(options, Path(folder))
        print(send(Path(folder), str(options.repo), options.visibility))
    return 0


def collect(options: Options, folder: Path) -> None:
    """Copies a run's files to a folder, and writes the card. Raises InputError where the run is not finished, or damaged."""
    run = RunFolder(options.run)
    if run.state() != "finished":
        raise InputError(f"{options.run}: is {run.state() or 'no run'}, not finished; train it to its end first")
    model, config = load_model(options.run)
    tests = [row for row in read_rows(run.metrics) if row["split"] == "test"]
    if not tests:
        raise InputError(f"{run.metrics}: has no figures of test images")
    folder.mkdir(parents=True, exist_ok=True)
    public = without_places(config)
    description = json.loads((run.path / "config.json").read_text()) | {"config": to_mapping(public)}
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    (folder / "config.yaml").write_text(to_yaml(public))
    for name in _FILES:
        if (run.path / name).is_file():
            shutil.copyfile(run.path / name, folder / name)
    for name in _PICTURES:
        picture = run.images / f"{name}_{tests[-1]['epoch']}.png"
        if picture.is_file():
            shutil.copyfile(picture, folder / f"{name}.png")
    if evaluation := evaluation_of(run, model):
        shutil.copyfile(run.evaluation, folder / run.evaluation.name)
    (folder / "README.md").write_text(card(options, public, model, tests[-1], evaluation, folder), encoding="utf-8")


def send(folder: Path, repo: str, visibility: Literal["public", "private"]) -> str:
    """Uploads a folder as one commit. Returns its address. Raises InputError where the Hub does not take it."""
    from huggingface_hub import HfApi  # costs a second: only where it is used
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
    from huggingface_hub.errors import HTTPError as NoAnswer  # type: ignore[attr-defined]  # of its HTTP client

    api = HfApi(library_name="vae_dist", library_version=__version__)
    try:
        made = api.create_repo(repo, visibility=visibility, exist_ok=True)
        commit = api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="A run of vae_dist")
    except (ValueError, LocalTokenNotFoundError, NoAnswer) as error:  # wrong names; no token, or none that can be sent
        code = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
        why = str(error)
        if code in (401, 403) or isinstance(error, LocalTokenNotFoundError):
            why = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"
        elif not code and not isinstance(error, ValueError):
            why = f"no answer from the Hub ({error})"
        raise InputError(f"--repo {repo}: {' '.join(why.split())}") from None
    return str(commit.commit_url)


def card(options: Options, config: Config, model: VAE, test: Row, evaluation: dict[str, Any], folder: Path) -> str:
    """The model card: what is known of the run, and nothing else."""
    name = options.repo.split("/")[-1] if options.repo else options.run.resolve().name
    metadata = {"library_name": "vae_dist", "tags": ["vae", "variational-autoencoder"]}
    metadata |= {"license": options.license} if options.license else {}
    defaults = flat(Config())
    changed = {option: value for option, value in flat(config).items() if value != defaults[option]}
    changed = {option: value for option, value in changed.items() if option.split(".")[0] in _OF_TRAINING}
    parameters = sum(weights.numel() for weights in model.parameters())
    shape = "x".join(map(str, model.image_shape))
    sections = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {name}",
        f"A variational autoencoder of {shape} images (channels, height, width) with {model.latent_dim} latent dimensions and "
        f"{parameters:,} parameters, trained with vae_dist on `{config.data.name}`. Its version {__version__} wrote this card.",
        "## Figures",
        _figures(config, model, test, evaluation),
        *(f"![{words}]({file}.png)\n\n{words}." for file, words in _PICTURES.items() if (folder / f"{file}.png").is_file()),
        "## Use",
        _use(options.repo or "USER/NAME"),
        "## Training",
        f"{test['epoch']} epochs, {test['step']:,} optimizer steps, {test['images_seen']:,} images seen; "
        f"{config.data.batch_size} images a step, {config.optimizer.kind} at {config.optimizer.lr:g}, "
        f"{config.trainer.precision}, seed {config.seed}. `metrics.jsonl` has the curves, `config.yaml` every option. Those "
        "of the training that are not the defaults:",
        "```yaml\n" + "".join(f"{option}: {json.dumps(value)}\n" for option, value in changed.items()) + "```",
    ]
    return "\n\n".join(sections) + "\n"


def _figures(config: Config, model: VAE, test: Row, evaluation: dict[str, Any]) -> str:
    """A table of what was measured, in nats per image unless it says otherwise."""
    found, is_binary = evaluation or test, config.data.binarize != "none"
    error = f" ± {found['stderr']:.2f}" if "stderr" in found else ""
    note = remark(model.likelihood, is_binary, found["loss"], model.image_shape)
    rows = [
        (f"negative ELBO{note}", f"{found['loss']:.4f}{error}"),
        ("of it -log p(x\\|z)", f"{found['bce']:.4f}"),
        ("of it KL(q(z\\|x), p(z))", f"{found['kld']:.4f}"),
    ]
    if "nll" in found:
        what = "-log p(x)" if found["is_log_likelihood"] else "importance-weighted loss"
        rows.append((f"{what}, k = {found['iw_samples']}", f"{found['nll']:.4f} ± {found['nll_stderr']:.2f}"))
    if "active_units" in found:
        rows.append(("active units", f"{found['active_units']} of {model.latent_dim}"))
    head = f"| of {found['n']:,} test images, nats per image | |\n|---|---|\n"
    return head + "\n".join(f"| {what} | {figure} |" for what, figure in rows)


def _use(repo: str) -> str:
    return f"""```python
import vae_dist
from huggingface_hub import snapshot_download

model = vae_dist.load(snapshot_download("{repo}"))  # a torch.nn.Module
images = model.sample(16, seed=0)  # in [0, 1]
posterior = model.encode(images)  # .mean and .logvar
again = model.decode(posterior.mean)
```"""


if __name__ == "__main__":
    run_entry_point(main)
