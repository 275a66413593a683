"""W&B's server: whether a run is to go there, whether there is a key for it, and whether it answers."""

import base64
import configparser
import json
import netrc
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlparse

from vae_dist.config import Config, InputError


def wandb_mode(config: Config) -> str:
    """online, offline or disabled, decided without asking anybody. Raises InputError where online lacks a key."""
    mode = config.tracking.wandb
    has_key = bool(wandb_key())
    if mode == "auto":
        wanted = _setting("mode", "WANDB_MODE")
        if wanted in ("offline", "disabled"):
            return wanted
        return "online" if has_key and wanted != "dryrun" else "offline"
    if mode == "online" and not has_key:
        raise InputError("--tracking.wandb online: no key; run `wandb login`, set WANDB_API_KEY, or take offline")
    return mode


def _wandb_url() -> str:
    return (_setting("base_url", "WANDB_BASE_URL") or "https://api.wandb.ai").rstrip("/")


def _setting(name: str, variable: str) -> str:
    """What the environment says, else W&B's settings files: this folder's before the user's, where `wandb login` puts it."""
    folders = os.environ.get("WANDB_CONFIG_DIR") or os.path.expanduser("~/.config/wandb"), "wandb"
    found = configparser.ConfigParser(interpolation=None)
    try:
        found.read([Path(folder, "settings") for folder in folders], encoding="utf-8")
    except (configparser.Error, OSError, ValueError):
        found.clear()  # W&B takes them for empty then
    return os.environ.get(variable, "") or str(found.get("default", name, fallback=""))


def wandb_key() -> str:
    """Empty where none is configured."""
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(_wandb_url()).hostname or "")
    except (OSError, ValueError, netrc.NetrcParseError):
        return ""
    return found[2] if found else ""


def ask_wandb(seconds: float) -> str:
    """What keeps W&B's server from taking a run with the key that is configured; empty where it answers and knows the key."""
    credentials = base64.b64encode(f"api:{wandb_key()}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {credentials}"}
    try:
        question = urllib.request.Request(f"{_wandb_url()}/graphql", b'{"query": "{ viewer { id } }"}', headers)
        with urllib.request.build_opener().open(question, timeout=seconds) as answer:
            viewer = json.loads(answer.read())["data"]["viewer"]
        return "" if viewer else f"{_wandb_url()} does not know the key"
    except urllib.error.HTTPError as error:
        error.close()
        return f"{_wandb_url()} refuses the key" if error.code in (401, 403) else f"{_wandb_url()} answers {error}"
    except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:
        return f"{_wandb_url()} does not answer ({error})"
