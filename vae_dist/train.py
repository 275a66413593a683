"""Train a variational autoencoder, on one process or many.

python -m vae_dist.train --config configs/glyphs.yaml
accelerate launch --config_file launch/multi_gpu.yaml -m vae_dist.train --config configs/mnist.yaml
"""

import sys

from vae_dist.distributed import run_entry_point
from vae_dist.fitting import train_to_end
from vae_dist.options import parse


def main(args: list[str] | None = None) -> int:
    return train_to_end(parse(sys.argv[1:] if args is None else args)).status


if __name__ == "__main__":
    run_entry_point(main)
