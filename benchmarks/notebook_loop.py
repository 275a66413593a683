"""The MNIST VAE the way every notebook writes it in plain PyTorch: the yardstick, not to be made faster.

python benchmarks/notebook_loop.py --data DIR --epochs 2
Prints one JSON object: the seconds of each epoch of training, and the last test loss.
"""

import argparse
import json
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import datasets, transforms


class VAE(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, hidden)
        self.fc_mean = nn.Linear(hidden, 20)
        self.fc_logvar = nn.Linear(hidden, 20)
        self.fc3 = nn.Linear(20, hidden)
        self.fc4 = nn.Linear(hidden, 784)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.relu(self.fc1(x.view(-1, 784)))
        mean, logvar = self.fc_mean(h), self.fc_logvar(h)
        z = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mean, logvar


def loss_function(reconstruction: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    bce = F.binary_cross_entropy(reconstruction, x.view(-1, 784), reduction="sum")
    return bce - 0.5 * torch.sum(1 + logvar - mean.pow(2) - logvar.exp())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder with MNIST/raw in it")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=400)
    args = parser.parse_args()
    torch.manual_seed(0)
    loaders = [
        DataLoader(datasets.MNIST(args.data, train=train, transform=transforms.ToTensor()), batch_size=128, shuffle=True)
        for train in (True, False)
    ]
    model = VAE(args.hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    seconds, test = [], 0.0
    for _ in range(args.epochs):
        start = time.perf_counter()
        for x, _labels in loaders[0]:
            optimizer.zero_grad()
            reconstruction, mean, logvar = model(x)
            loss = loss_function(reconstruction, x, mean, logvar)
            loss.backward()
            loss.item()
            optimizer.step()
        seconds.append(time.perf_counter() - start)
        with torch.no_grad():
            terms = ((*model(x), x) for x, _labels in loaders[1])
            test = sum(loss_function(r, x, mean, logvar).item() for r, mean, logvar, x in terms) / 10_000
    print(json.dumps({"train_seconds": seconds, "test_loss": test}))


if __name__ == "__main__":
    main()
