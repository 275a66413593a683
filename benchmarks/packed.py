"""Images a second from packed files, beside torchvision's ImageFolder on the JPEGs that they were packed from.

python -m benchmarks.packed
python -m benchmarks.packed --memory 512    # a set 2.5 times as large as the memory it may use (as root, with cgroup v1)

It makes its pictures itself, of CelebA's size: the embedded digits in colour, enlarged to 178 x 218, with a grain that gives
their JPEGs the bytes that CelebA's have.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vae_dist.config import DataConfig
from vae_dist.data import as_images, colour_glyphs, folder, packed, packing
from vae_dist.data.order import Partition
from vae_dist.data.packed import Index, Packed, Shard
from vae_dist.distributed import run_entry_point

BATCH, SIZE, WORKERS = 128, 64, 2
SHOWN = (178, 218)  # CelebA's aligned pictures
GRAIN = 6.0  # standard deviation, of 256 grey levels: JPEGs of some 7 kB, as CelebA's
CGROUP = Path("/sys/fs/cgroup/memory")


def main(options: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000, help="how many, nine in ten for training")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of the packed set; ImageFolder has one for every two")
    parser.add_argument("--memory", type=int, help="instead: an epoch of a set 2.5 times as large as so many MiB, within them")
    parser.add_argument("--scratch", type=Path, help="folder of the pictures, on a disk; default: the system's for such")
    args = parser.parse_args(options)
    torch.set_num_threads(1)  # a second one of torch's would share its core with a thread that fetches, and be waited for
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        found = within_memory(Path(scratch), args.memory) if args.memory else compare(Path(scratch), args.images, args.rounds)
    print(json.dumps({"machine": machine(), "date": time.strftime("%Y-%m-%d"), **found}))
    return 0


def compare(scratch: Path, images: int, rounds: int) -> dict[str, Any]:
    """Makes JPEGs, packs them, and reads both sets; prints a table."""
    jpegs = write_jpegs(scratch / "jpegs", images)
    plan = folder.plan(DataConfig(name="folder", root=str(scratch / "jpegs"), image_size=SIZE))
    done = packing.write(plan, scratch / "packed", "refuse")
    print(f"{images:,} JPEGs of {SHOWN[0]} x {SHOWN[1]}, {jpegs / images / 1000:.1f} kB each; {machine()}; batches of {BATCH}")
    print(f"  packing them           {images / done.seconds:10,.0f} images/s, once")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = Packed(scratch / "packed" / "train").to(device)
    rates: dict[str, list[float]] = {"packed": [], "packed, as float32": [], "ImageFolder": []}
    memory = []
    for epoch in range(rounds):  # interleaved, so that whatever else the machine does meets all alike
        if epoch % 2 == 0:
            rates["ImageFolder"].append(rate(image_folder(scratch / "jpegs", device), images, device))
        steps = Partition(len(train), BATCH, 1, BATCH).of_rank(train.order(0, epoch, BATCH), 0)
        rates["packed"].append(rate(train.stream(steps), len(train), device))
        rates["packed, as float32"].append(rate(map(as_images, train.stream(steps)), len(train), device))
        memory.append(resident())
    for name, found in rates.items():
        print(f"  {name:22} {statistics.median(found):10,.0f} images/s ({min(found):,.0f} to {max(found):,.0f})")
    times = statistics.median(rates["packed"]) / statistics.median(rates["ImageFolder"])
    print(f"  packed is {times:.0f} times as fast as ImageFolder with {WORKERS} workers")
    print(f"  memory of this process after each epoch, MiB: {', '.join(f'{own} + {files} of files' for own, files in memory)}")
    return {"images_per_second": rates, "times": times, "memory_mib": memory, "jpeg_bytes": jpegs // images}


def rate(batches: Iterator[Any], images: int, device: torch.device) -> float:
    """Images a second of an epoch, from before its first batch to the last one on the device."""
    start = time.perf_counter()
    for _ in batches:
        pass
    if device.type == "cuda":
        torch.cuda.synchronize()
    return images / (time.perf_counter() - start)


def image_folder(root: Path, device: torch.device) -> Iterator[Tensor]:
    """What every tutorial does."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps = transforms.Compose([transforms.Resize(SIZE), transforms.CenterCrop(SIZE), transforms.ToTensor()])
    images = datasets.ImageFolder(str(root), steps)
    loader = DataLoader(images, BATCH, shuffle=True, num_workers=WORKERS, pin_memory=device.type == "cuda")
    return (batch.to(device, non_blocking=True) for batch, _ in loader)


def write_jpegs(root: Path, images: int) -> int:
    """Bytes of the JPEGs that are written into ten folders below `root`."""
    for digit in range(10):
        (root / str(digit)).mkdir(parents=True)
    blocks = [(root, start, min(start + 500, images)) for start in range(0, images, 500)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(write_block, blocks))


def write_block(block: tuple[Path, int, int]) -> int:
    root, start, stop = block
    torch.set_num_threads(1)
    random, written = np.random.default_rng(start), 0
    pixels, digits = colour_glyphs.draw(start, stop)
    for number, image, digit in zip(range(start, stop), pixels.permute(0, 2, 3, 1).numpy(), digits.tolist(), strict=True):
        large = np.asarray(Image.fromarray(image).resize(SHOWN, Image.Resampling.BICUBIC), np.float32)
        grain = random.normal(0, GRAIN, large.shape[:2]).astype(np.float32)[..., None]
        file = root / str(digit) / f"{number:06d}.jpg"
        Image.fromarray((large + grain).clip(0, 255).astype(np.uint8)).save(file, quality=75)
        written += file.stat().st_size
    return written


def within_memory(scratch: Path, mib: int) -> dict[str, Any]:
    """Whole epochs of a set 2.5 times as large as the memory that the process may use, files it reads included."""
    group = CGROUP / f"vae_dist_{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(mib << 20))
    except OSError as error:
        raise SystemExit(f"error: {group}: {error.strerror}; a limit on memory needs root and cgroup v1") from None
    images = write_noise(scratch / "noise", mib * 5 // 2 << 20)
    job = multiprocessing.get_context("spawn").Process(target=limited_epochs, args=(group, scratch / "noise"))
    job.start()
    job.join()
    peak = int((group / "memory.max_usage_in_bytes").read_text()) >> 20
    group.rmdir()
    if job.exitcode != 0:
        raise SystemExit(f"error: the process within {mib} MiB ended with {job.exitcode}")
    set_mib = images * (3 * SIZE**2 + 8) >> 20
    print(f"  done: a set of {set_mib:,} MiB within {mib} MiB; peak of the control group {peak} MiB; {machine()}")
    return {"set_mib": set_mib, "limit_mib": mib, "peak_mib": peak}


def limited_epochs(group: Path, root: Path) -> None:
    """Two epochs of a packed set in this process, which joins the control group first."""
    (group / "cgroup.procs").write_text(str(os.getpid()))
    images = Packed(root)
    for epoch in range(2):
        steps = Partition(len(images), BATCH, 1, BATCH).of_rank(images.order(0, epoch, BATCH), 0)
        speed = rate(images.stream(steps), len(images), torch.device("cpu"))
        own, files = resident()
        print(f"  epoch {epoch + 1}: {len(images):,} images, {speed:,.0f} images/s; {own} MiB + {files} of files", flush=True)


def write_noise(root: Path, size: int) -> int:
    """Images in a packed set of noise of about so many bytes, none of which is left in the memory for files."""
    root.mkdir()
    n, random, shards = packed.images_per_shard(3 * SIZE**2), np.random.default_rng(0), []
    for number in range(max(1, size // packed.SHARD_BYTES)):
        content = packed.shard_content([random.bytes(3 * SIZE**2) for _ in range(n)])
        file = root / f"shard-{number:05d}.bin"
        with file.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        shards.append(Shard(file.name, n, len(content), hashlib.sha256(content).hexdigest()))
    packed.write_index(root, Index((3, SIZE, SIZE), shards, {}))
    return n * len(shards)


def resident() -> tuple[int, int]:
    """MiB of this process in memory: its own, and of files, which the system takes back when it needs the room."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, files = (int(lines[name].split()[0]) >> 10 for name in ("RssAnon", "RssFile"))
    return own, files


def machine() -> str:
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{len(os.sched_getaffinity(0))} cores of {platform.machine()}, torch {torch.__version__}{gpu}"


if __name__ == "__main__":
    run_entry_point(main)
