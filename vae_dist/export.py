"""The encoder and the decoder of a trained model as ONNX files, for programs without torch.

python -m vae_dist.export runs/mnist
"""

import copy
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn

from vae_dist.checkpoint import write_atomically
from vae_dist.config import InputError, missing_extra
from vae_dist.distributed import run_entry_point
from vae_dist.model import VAE
from vae_dist.options import command_line
from vae_dist.run import load_model, run_of

_TOLERANCE = 1e-3  # relative, of what other kernels make of the same weights
_TRIED = 3  # images; another number than that of the tracing, for the batch is of any size


@dataclass(frozen=True)
class Options:
    """Write a trained model's encoder and decoder as ONNX files, and compare what they compute with the model itself."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, or of one of its checkpoints."""
    out: Path | None = None
    """Folder of the files; default: `onnx` in the run's folder."""


def main(args: list[str] | None = None) -> int:
    options = command_line(Options, "vae_dist.export", sys.argv[1:] if args is None else args)
    model, _ = load_model(options.run)
    for file, difference in to_onnx(model, options.out or run_of(options.run) / "onnx").items():  # checkpoints are sealed
        print(f"{file}: at most {difference:.1e} (relative) from the model itself")
    return 0


def require_packages() -> None:
    """Raises InputError where the extra is not installed."""
    if missing := [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]:
        raise missing_extra(f"vae_dist.export: needs {', '.join(missing)}", "onnx")


def to_onnx(model: VAE, folder: str | Path) -> dict[Path, float]:
    """Writes two files, each for batches of any size, in float32:

    encoder.onnx: `images` in [0, 1], (batch, *image_shape) -> `mean` and `logvar` of the posterior, (batch, latent_dim);
    decoder.onnx: `latents`, (batch, latent_dim) -> `images`, their mean E[x|z] in [0, 1], (batch, *image_shape).

    It is of the model in eval mode, which stays as and where it is. Returns how far ONNX Runtime is from it, relative to the
    largest output, by file. Raises InputError where it is not near, and no file is written then, or the extra is missing.
    """
    require_packages()
    model = copy.deepcopy(model).cpu().eval()
    images, latents = torch.rand(_TRIED, *model.image_shape), torch.randn(_TRIED, model.latent_dim)
    parts: dict[str, tuple[nn.Module, Tensor, list[str]]] = {
        "encoder": (_Encoder(model), images, ["images", "mean", "logvar"]),
        "decoder": (_Decoder(model), latents, ["latents", "images"]),
    }
    contents, differences = {}, {}
    for name, (part, inputs, names) in parts.items():
        file = Path(folder) / f"{name}.onnx"
        contents[file] = _converted(part, inputs[:2], *names)
        differences[file] = _difference(part, contents[file], inputs, names[0])
        if not differences[file] <= _TOLERANCE:
            raise InputError(
                f"{file}: ONNX Runtime would give other figures, {differences[file]:.1e} away; nothing was written"
            )
    for file, content in contents.items():
        write_atomically(file, content)
    return differences


class _Encoder(nn.Module):
    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.encode(images))


class _Decoder(nn.Module):
    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        return (self.model.decode(latents),)


def _converted(part: nn.Module, inputs: Tensor, name: str, *outputs: str) -> bytes:
    """An ONNX model, traced with some inputs, (2, …), for any number of them."""
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        part.eval(),
        (inputs,),
        input_names=[name],
        output_names=list(outputs),
        dynamic_shapes={name: {0: batch}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # it is, when no file is named
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in which file of this machine each came from
    content: bytes = program.model_proto.SerializeToString()
    return content


@torch.no_grad()
def _difference(part: nn.Module, content: bytes, inputs: Tensor, name: str) -> float:
    """The largest, relative to the largest output; no number where either has one that is none."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = [torch.from_numpy(output) for output in session.run(None, {name: inputs.numpy()})]
    pairs = list(zip(part(inputs), found, strict=True))
    return float(
        torch.stack([(right - output).abs().max() / right.abs().max().clamp(min=1e-30) for right, output in pairs]).max()
    )


if __name__ == "__main__":
    run_entry_point(main)
