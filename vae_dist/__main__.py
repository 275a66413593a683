"""The command `vae-dist`, also `python -m vae_dist`: the entry points of this package by their names.

vae-dist train --config glyphs
"""

import difflib
import importlib
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from vae_dist import __version__

# By what one wants to do: the name of a module with a main(args), and what it does.
COMMANDS = {
    "Train": {
        "train": "train a model on one process or many, or go on with a run",
        "verify": "train a recipe, and hold the result to the band it promises",
    },
    "Look at a run": {
        "evaluate": "exact figures on the test images, log p(x) among them",
        "generate": "samples, reconstructions, traversals and interpolations as PNG",
        "report": "one page about a run, or about several side by side",
        "explore": "a page to play with: sliders, a drawing pad, interpolation",
        "dashboard": "save the W&B dashboard of all runs to a project",
    },
    "Give it to others": {
        "export": "encoder and decoder as ONNX files",
        "upload": "to the Hugging Face Hub, with a model card of what was measured",
    },
    "Prepare": {
        "pack": "decode a folder of pictures once, for many runs",
        "doctor": "look for what would keep a training from starting here",
        "check": "show that several processes give the numbers of one",
    },
}
_BEGIN = f"""vae_dist {__version__}: variational autoencoders, the same numbers on any machines

Begin with the embedded digits (no download, about a minute):
  vae-dist train --config glyphs
"""
_MORE = """`vae-dist COMMAND --help` lists options; docs/ of the repository has the rest.
Several processes: torchrun --nproc-per-node 2 -m vae_dist.train ..."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Ends the process with the status of the command."""
    command, *options = (sys.argv[1:] if args is None else args) or ["--help"]
    names = [name for group in COMMANDS.values() for name in group]
    if command in names:
        from vae_dist.distributed import run_entry_point  # imports torch

        is_package = command in ("doctor", "explore", "report")
        module = importlib.import_module(f"vae_dist.{command}.__main__" if is_package else f"vae_dist.{command}")
        run_entry_point(lambda: module.main(options))
    if command in ("-h", "--help", "--version"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `vae-dist | head` has seen enough
        print(f"vae_dist {__version__}" if command == "--version" else overview())
        sys.exit(0)
    meant = difflib.get_close_matches(command, names, n=1)
    way_out = f"did you mean `vae-dist {meant[0]}`?" if meant else f"the commands are {', '.join(names)}"
    print(f"error: vae-dist {command}: no such command; {way_out}", file=sys.stderr)
    sys.exit(2)


def overview() -> str:
    """What this is, what to do first, and all commands, on one screen."""
    groups = [
        "\n".join([f"{title}:", *(f"  {name:10}{what}" for name, what in commands.items())])
        for title, commands in COMMANDS.items()
    ]
    return "\n".join([_BEGIN, *groups, _MORE])


if __name__ == "__main__":
    main()
