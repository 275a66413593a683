"""A local Hugging Face Hub, as far as an upload needs one: it answers as the recorded API does, and keeps what it is sent."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.repos: dict[str, dict[str, Any]] = {}  # what each was made with
        self.files: dict[str, bytes] = {}  # of the last commit
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.asked: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._take()
        self._answer({"id": "user/name", "sha": "0" * 40, "siblings": [], "tags": []})

    def do_POST(self) -> None:
        body = self._take()
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            made = json.loads(body)
            name = f"{made.get('organization', 'user')}/{made['name']}"
            is_new = name not in self.server.repos
            self.server.repos.setdefault(name, made)
            self._answer({"url": f"{self.server.address}/{name}", "name": name}, 200 if is_new else 409)
        elif self.path.endswith("/preupload/main"):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith((".safetensors", ".png")) else "regular" for path in files]
            answers = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in zip(files, modes, strict=True)
            ]
            self._answer({"files": answers})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            uploads = [o | {"actions": {"upload": {"href": f"{self.server.address}/lfs/{o['oid']}"}}} for o in objects]
            self._answer({"transfer": "basic", "objects": uploads})
        elif "/commit/" in self.path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._answer({})

    def do_PUT(self) -> None:
        self.server.large[self.path.removeprefix("/lfs/")] = self._take()
        self._answer({})

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.large[value["oid"]]
        address = f"{self.server.address}/user/name/commit/{'1' * 40}"
        self._answer({"success": True, "commitOid": "1" * 40, "commitUrl": address, "hookOutput": ""})

    def _take(self) -> bytes:
        self.server.asked.append(f"{self.command} {self.path}")
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
