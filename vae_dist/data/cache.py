"""Folders of pictures decoded once on this machine, and kept for as long as trainings use them."""

import contextlib
import os
import re
import shutil
import time
from functools import cache
from pathlib import Path

from vae_dist.config import DataConfig
from vae_dist.data import folder, packed, packing

_KEY = re.compile(r"[0-9a-f]{32}")
_KEPT_SECONDS = 30 * 24 * 3600  # without a start that used it
_WAY_OUT = "; set XDG_CACHE_HOME to a folder with room; a training can also have --data.name packed, of vae-dist pack"


@cache  # a process has training and test images of one moment, and looks through a folder of millions once
def prepare(config: DataConfig) -> Path:
    """Decodes `folder` or `celeba`, unless it is done, and says where the packed images are. Raises InputError.

    When a file has changed that is another place: whoever still reads the old images never meets a mixture of both. Shards
    whose pictures are as they were are one file under both names.
    """
    plan = folder.plan(config)
    home = _home(plan)
    with contextlib.suppress(OSError):  # it is not there yet, or belongs to somebody else
        os.utime(home)
    others = [path for path in home.parent.glob("*") if _KEY.fullmatch(path.name) and path != home]
    packing.write(plan, home, config.unreadable, way_out=_WAY_OUT, others=others)
    _remove_unused(others)
    return home


def to_be_decoded(config: DataConfig) -> str:
    """What `prepare` has to do, in words; empty where all is done. Raises InputError where it could not."""
    plan = folder.plan(config)
    home = _home(plan)
    if all((home / side / packed.INDEX).is_file() for side in packing.SIDES):
        return ""
    return f"{len(plan.train) + len(plan.test):,} pictures will first be decoded into {home}"


def _home(plan: folder.Plan) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "vae_dist" / plan.fingerprint()[:32]


def _remove_unused(homes: list[Path]) -> None:
    """Removes what no start has used for long. A training that has it mapped reads on."""
    for home in homes:
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            if time.time() - home.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(home, ignore_errors=True)  # what cannot be removed is no reason not to train
