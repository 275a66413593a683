"""A packed set of small shards, a server like S3 (moto's, in its own process), and a way to it on which things go wrong."""

import hashlib
import http.client
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vae_dist.config import DataConfig
from vae_dist.data import packed

BUCKET = "bucket"
TRAIN, TEST, PER_SHARD = 1000, 300, 40
SHARDS, TEST_SHARDS = 25, 8
Answer = tuple[int, dict[str, str], bytes]


def write_set(folder: Path, pixels: Tensor) -> None:
    """A packed set of small shards."""
    folder.mkdir(parents=True)
    shards = []
    for number, part in enumerate(torch.split(pixels, PER_SHARD)):
        content = packed.shard_content([image.numpy().tobytes() for image in part])
        name = f"shard-{number:05d}.bin"
        (folder / name).write_bytes(content)
        shards.append(packed.Shard(name, len(part), len(content), hashlib.sha256(content).hexdigest()))
    packed.write_index(folder, packed.Index((1, 28, 28), shards, {}))


def config(root: object = f"s3://{BUCKET}/set", **more: float) -> DataConfig:
    return DataConfig(name="stream", root=str(root), **more)  # type: ignore[arg-type]


class Server:
    """An empty store."""

    def __init__(self, log: Path) -> None:
        command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"]
        with log.open("w") as stream:
            self._process = subprocess.Popen(command, stdout=stream, stderr=stream)
        deadline = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", log.read_text())):
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        self.port = int(found[1])
        self.request("PUT", f"/{BUCKET}")

    def request(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        # A signature names the region, from which moto guesses that S3 is meant.
        sign = {"Authorization": "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"}
        try:
            connection.request(method, path, body, sign | (headers or {}))
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def upload(self, folder: Path, prefix: str) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                status, _, words = self.request("PUT", f"/{BUCKET}/{prefix}/{file.relative_to(folder)}", file.read_bytes())
                assert status == 200, words

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


class Way:
    """To the server, from a port of its own. `fault` is asked at each request for a shard, with its number from 0."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.shards: list[str] = []  # what was asked for
        self.whole: list[str] = []  # what was given
        self.fault: Callable[[int], str | float] = lambda number: 0.0
        self.port = 0
        self.open()

    def open(self) -> None:
        way = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                way._answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """Who asks may hang up."""

        self._listener = Listener(("127.0.0.1", self.port), Handler)
        self.port = self._listener.server_port
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()

    def vanish(self) -> None:
        """From now on connections are refused."""
        self._listener.shutdown()
        self._listener.server_close()

    def environment(self, cache: Path) -> dict[str, str]:
        """What names this way to boto3 and LitData."""
        names = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
        names |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "NO_PROXY": "127.0.0.1"}
        return names | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", "LITDATA_CACHE_DIR": str(cache)}

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        fault: str | float = 0.0
        if handler.path.endswith(".bin"):
            self.shards.append(handler.path)
            fault = self.fault(len(self.shards) - 1)
        if isinstance(fault, float):
            time.sleep(fault)
        handler.close_connection = True
        if fault == "vanish":
            self.vanish()
            return
        if fault == "hang":
            time.sleep(60)
            return
        passed = {name: value for name, value in handler.headers.items() if name in ("Range", "x-amz-checksum-mode")}
        status, headers, body = self._server.request(handler.command, handler.path, headers=passed)
        if fault == "503":
            status, headers, body = 503, {}, b""
        handler.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "content-length", "server", "date", "transfer-encoding"):
                handler.send_header(name, value)
        length = headers.get("Content-Length", str(len(body))) if handler.command == "HEAD" else str(len(body))
        handler.send_header("Content-Length", length)
        handler.send_header("Connection", "close")
        handler.end_headers()
        content = b"" if handler.command == "HEAD" else body
        if fault == "other":
            content = content[:-1] + bytes([content[-1] ^ 1])
        handler.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        if isinstance(fault, float) and handler.path.endswith(".bin") and status < 300:
            self.whole.append(handler.path)
