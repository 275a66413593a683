"""The same mathematics in the tightest loop of plain torch: what vae_dist's trainer may be compared with.

The images lie in memory as bytes, the loss comes from logits, Adam is fused, denormals are flushed; no evaluation, no files.

python benchmarks/tight_loop.py --data DIR --epochs 2 --precision bf16
Prints one JSON object: the seconds of each epoch, and the last training loss.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vae_dist.data.idx import read_idx


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST/raw in it")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    images = read_idx(args.data / "MNIST" / "raw" / "train-images-idx3-ubyte", 3).flatten(1)
    encoder = nn.Sequential(nn.Linear(784, args.hidden), nn.ReLU(), nn.Linear(args.hidden, 40))
    decoder = nn.Sequential(nn.Linear(20, args.hidden), nn.ReLU(), nn.Linear(args.hidden, 784))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3, fused=True)

    def loss_function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            mean, logvar = encoder(x).float().chunk(2, dim=1)
            logits = decoder(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)).float()
        bce = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        return bce - 0.5 * torch.sum(1 + logvar - mean.square() - logvar.exp())

    seconds, total = [], torch.zeros((), dtype=torch.float64)
    for _ in range(args.epochs):
        start = time.perf_counter()
        total.zero_()
        for indices in torch.randperm(len(images)).split(128):
            loss = loss_function(images.index_select(0, indices).float().div_(255))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"train_seconds": seconds, "train_loss": total.item() / len(images)}))


if __name__ == "__main__":
    main()
