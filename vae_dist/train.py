"""Train a variational autoencoder, on one process or many.

python -m vae_dist.train --config configs/glyphs.yaml
accelerate launch --config_file launch/multi_gpu.yaml -m vae_dist.train --config configs/mnist.yaml
"""

import sys

from vae_dist.distributed import run_entry_point
from vae_dist.fitting import train_to_end
from vae_dist.options import parse
from vae_dist.starting import start


def main(args: list[str] | None = None) -> int:
    config = parse(sys.argv[1:] if args is None else args)
    return train_to_end(config, start(config.trainer, config.data.batch_size)).status


if __name__ == "__main__":
    run_entry_point(main)
