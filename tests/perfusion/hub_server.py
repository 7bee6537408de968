"""A Hugging Face hub of one's own, on this machine: what huggingface_hub asks of the real one, for models, downloads and commits.

    with hub_server({"user/teddy": {"teddy.safetensors": b"…"}}) as hub:
        ...                         # HF_ENDPOINT names it; hub.requests lists what was asked, hub.bytes
                                    # counts what was sent of files, hub.repositories what is there
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Hub:
    endpoint: str
    repositories: dict[str, dict[str, bytes]]
    requests: list[str]
    bytes: int = 0  # of files, that were sent


@contextlib.contextmanager
def hub_server(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    hub = Hub("", repositories, [])

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, code, body=b"", kind="application/json", **headers):
            self.send_response(code)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def read(self):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def find(self):
            hub.requests.append(f"{self.command} {self.path}")
            path = self.path.split("?")[0].strip("/")
            api = path.startswith("api/models/")
            parts = path.removeprefix("api/models/").split("/")
            return api, "/".join(parts[:2]), parts[2:]

        def do_GET(self):
            api, name, rest = self.find()
            files = hub.repositories.get(name)
            revision = rest[1] if len(rest) > 1 else "main"
            if files is None:
                return self.answer(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            if revision not in ("main", "v1", SHA):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            if api:
                siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
                if rest[:1] == ["tree"]:
                    body = [{"type": "file", "path": f, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for f, d in files.items()]
                else:
                    body = {"id": name, "modelId": name, "sha": SHA, "siblings": siblings, "tags": [], "private": False}
                return self.answer(200, json.dumps(body).encode())
            file = "/".join(rest[2:])
            if file not in files:
                return self.answer(404, b"", X_Error_Code="EntryNotFound")
            data = files[file]
            ranged = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if ranged:
                part = data[int(ranged[1]) : int(ranged[2]) + 1]
                hub.bytes += len(part)
                return self.answer(206, part, Content_Range=f"bytes {ranged[1]}-{int(ranged[1]) + len(part) - 1}/{len(data)}")
            hub.bytes += len(data) * (self.command == "GET")
            self.answer(200, data, "application/octet-stream", ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=SHA)

        do_HEAD = do_GET

        def do_POST(self):
            hub.requests.append(f"{self.command} {self.path}")
            path, body = self.path.split("?")[0], self.read()
            if path == "/api/validate-yaml":
                return self.answer(200, b"{}")
            if path == "/api/repos/create":
                told = json.loads(body)
                name = "/".join(filter(None, (told.get("organization"), told["name"])))
                hub.repositories.setdefault(name, {})
                return self.answer(200, json.dumps({"url": f"{hub.endpoint}/{name}"}).encode())
            name = "/".join(path.split("/")[3:5])
            if "/preupload/" in path:
                files = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in json.loads(body)["files"]]
                return self.answer(200, json.dumps({"files": files}).encode())
            for line in body.splitlines():
                told = json.loads(line)
                if told["key"] == "file":
                    hub.repositories[name][told["value"]["path"]] = base64.b64decode(told["value"]["content"])
            url = f"{hub.endpoint}/{name}/commit/{SHA}"
            self.answer(200, json.dumps({"success": True, "commitOid": SHA, "commitUrl": url, "hookOutput": ""}).encode())

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
