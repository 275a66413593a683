"""A local page to play with a trained model: sliders, a drawing pad, and the way between two test images.

python -m vae_dist.explore runs/mnist
"""

import contextlib
import ipaddress
import socket
import sys
import webbrowser
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vae_dist.config import DataConfig, InputError, missing_extra
from vae_dist.data.images import Images
from vae_dist.distributed import run_entry_point
from vae_dist.explore.explorer import Explorer
from vae_dist.loading import load_images
from vae_dist.model import VAE
from vae_dist.options import command_line
from vae_dist.run import load_model
from vae_dist.starting import start


@dataclass(frozen=True)
class Options:
    """Serve a page to play with a trained model, until Ctrl-C: sliders, a drawing pad, the way between two test images."""

    run: tyro.conf.Positional[Path]
    """Folder of the run, or of one of its checkpoints."""
    host: str = "127.0.0.1"
    """Address to listen at. Without a password: this one is open to all users of this machine, another to all who reach it."""
    port: int = 8000
    """Port to listen at; 0: any that is free."""
    open: Literal["no", "yes"] = "no"
    """yes: show the page in the browser of this machine."""
    root: Annotated[str | None, tyro.conf.arg(name="data.root")] = None
    """Where the data set lies, if elsewhere than in training."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise InputError(f"--port {self.port}: must be in 0 … 65535")


def main(args: list[str] | None = None) -> int:
    options = command_line(Options, "vae_dist.explore", sys.argv[1:] if args is None else args)
    try:
        import uvicorn

        from vae_dist.explore.app import build_app
    except ModuleNotFoundError as error:
        raise missing_extra(f"the page needs {error.name}", "explore") from None
    with listen(options.host, options.port) as listener:
        model, config = load_model(options.run)
        images, problem = load_test_images(model, replace(config.data, root=options.root or config.data.root))
        explorer = Explorer(str(options.run), model, config, images, problem)
        names = ("localhost", options.host, socket.gethostname(), socket.getfqdn())
        app = build_app(explorer, {name.lower() for name in names})
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", ws="none"))
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it; uvicorn raises it again after it has hung up
            introduce(options, listener)
            server.run(sockets=[listener])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """An open port. Raises InputError where it is taken, or not this machine's."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # so that `::` listens at those of version 4, too
        listener = socket.create_server(address[:2], family=family, dualstack_ipv6=both)
    except (socket.gaierror, UnicodeError):  # UnicodeError: of what no name can be
        raise InputError(f"--host {host}: no such host is known here; give an address of this machine, or its name") from None
    except OSError as error:
        words = f"--host {host} --port {port}: {error.strerror}; name another port, or 0 for any that is free"
        raise InputError(words) from None
    # Answers go in two parts, of which TCP would keep the second back until the first is acknowledged: 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def load_test_images(model: VAE, config: DataConfig) -> tuple[Images | None, str]:
    """The test images, or why there are none: most of the page goes without."""
    try:
        return load_images(config, start(), train=False, shape=model.image_shape), ""
    except InputError as error:
        print(f"warning: no test images: {error}", file=sys.stderr)
        return None, str(error)


def introduce(options: Options, listener: socket.socket) -> None:
    """Says where the page is, and who may use it."""
    host, port = options.host, listener.getsockname()[1]
    address = ipaddress.ip_address(listener.getsockname()[0])
    if not address.is_loopback:
        print(f"warning: --host {host}: whoever reaches this machine may use the page, and see test images")
    if address.is_unspecified:  # all of this machine's, and elsewhere none of it
        host = socket.gethostname()
    host = f"[{host}]" if ":" in host else host
    print(f"{options.run}: http://{host}:{port} (Ctrl-C ends it)", flush=True)
    if options.open == "yes":
        webbrowser.open(f"http://{host}:{port}")


if __name__ == "__main__":
    run_entry_point(main)
