"""W&B's server: whether a run is to go there, whether there is a key for it, and whether it answers."""

import base64
import json
import netrc
import os
import urllib.error
import urllib.request
from urllib.parse import urlparse

from vae_dist.config import Config, InputError


def wandb_mode(config: Config) -> str:
    """online, offline or disabled, decided without asking anybody. Raises InputError where online lacks a key."""
    mode = config.tracking.wandb
    has_key = bool(wandb_key())
    if mode == "auto":
        wanted = os.environ.get("WANDB_MODE", "")
        return wanted if wanted in ("offline", "disabled") else "online" if has_key else "offline"
    if mode == "online" and not has_key:
        raise InputError("--tracking.wandb online: no key; run `wandb login`, set WANDB_API_KEY, or take offline")
    return mode


def _wandb_url() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")


def wandb_key() -> str:
    """Empty where none is configured."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(_wandb_url()).hostname or "")
    except (OSError, netrc.NetrcParseError):
        return ""
    return found[2] if found else ""


def ask_wandb(seconds: float) -> str:
    """What keeps W&B's server from taking a run with the key that is configured; empty where it answers and knows the key."""
    credentials = base64.b64encode(f"api:{wandb_key()}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {credentials}"}
    question = urllib.request.Request(f"{_wandb_url()}/graphql", b'{"query": "{ viewer { id } }"}', headers)
    try:
        with urllib.request.build_opener().open(question, timeout=seconds) as answer:
            viewer = json.loads(answer.read())["data"]["viewer"]
        return "" if viewer else f"{_wandb_url()} does not know the key"
    except urllib.error.HTTPError as error:
        return f"{_wandb_url()} refuses the key" if error.code in (401, 403) else f"{_wandb_url()} answers {error}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{_wandb_url()} does not answer ({error})"
