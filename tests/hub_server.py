"""A stand-in of the Hugging Face hub on 127.0.0.1: what huggingface_hub asks for, with faults on demand.

Two servers, as in the world: the hub itself, and the storage that large files are redirected to. Each request is
recorded with the token that it carried.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

LARGE = (".safetensors", ".data", ".onnx", ".bin")  # kept by their sha256, in the storage
BROKEN_OFF = -1


@dataclass(frozen=True)
class Request:
    server: str  # "hub" or "storage"
    method: str
    path: str
    token: str
    range: str


@dataclass
class Fault:
    """What happens to requests instead of an answer.

    `status` is sent as it is, with `code` as X-Error-Code; BROKEN_OFF sends `share` of the body and hangs up.
    `change` makes another body of the right one.
    """

    pattern: str
    method: str = "GET"
    times: int = 1
    status: int = 200
    code: str = ""
    share: float = 0.5
    headers: dict[str, str] = field(default_factory=dict)
    change: Callable[[bytes], bytes] | None = None
    before: Callable[[], object] | None = None


@dataclass
class Model:
    """A repository: commit → files, branches and tags, and who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Adds a commit with these files instead of the former ones; returns its hash."""
        listing = "".join(f"{name}:{hashlib.sha256(content).hexdigest()}\n" for name, content in sorted(files.items()))
        sha = hashlib.sha1(f"{len(self.commits)}\n{listing}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha


class Hub:
    """The state of both servers.

    Attributes:
        endpoint: address of the hub.
        models: id → repository.
        users: token → (name, "read" or "write").
        objects: sha256 → content that was uploaded.
        requests: all of them, in order.
        faults: the first one that fits a request counts, `times` times.
    """

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.users: dict[str, tuple[str, str]] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.endpoint = self.storage = ""
        self.lock = threading.Lock()

    def add(self, model_id: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False) -> Model:
        self.models[model_id] = Model(private=private, gated=gated)
        self.models[model_id].commit(files)
        return self.models[model_id]

    def asked(self, pattern: str, method: str = "GET") -> list[Request]:
        return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def fault(self, request: Request) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and fault.method == request.method and re.search(fault.pattern, request.path):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def serve() -> Iterator[Hub]:
    """Runs both servers for as long as the block lasts."""
    hub = Hub()
    servers = []
    for kind in (HubHandler, StorageHandler):
        handler = type(kind.__name__, (kind,), {"hub": hub})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
    hub.endpoint, hub.storage = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    server_name = ""
    token = ""
    fault: Fault | None = None

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def route(self, path: str, body: bytes) -> None:
        raise NotImplementedError

    def send(self, content: bytes, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        headers = dict(headers)
        fault, self.fault = self.fault, None
        if fault is not None and fault.change is not None:
            content = fault.change(content)
        whole = len(content)
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is not None and status == 200:
            start = int(part[1])
            content = content[start : int(part[2]) + 1 if part[2] else None]
            status, headers["Content-Range"] = 206, f"bytes {start}-{start + len(content) - 1}/{whole}"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.status == BROKEN_OFF:
            self.wfile.write(content[: int(len(content) * fault.share)])
            self.close_connection = True
            return
        self.wfile.write(content)

    def send_json(self, value: Any, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})

    def refuse(self, status: int, code: str = "") -> None:
        self.send_json({"error": "no"}, status, {"X-Error-Code": code, "X-Error-Message": code} if code else {})

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.token = token
        request = Request(self.server_name, self.command, path, token, self.headers.get("Range", ""))
        self.fault = self.hub.fault(request)
        if self.fault is not None:
            if self.fault.before is not None:
                self.fault.before()
            if self.fault.status >= 300:
                fault, self.fault = self.fault, None
                names = {"X-Error-Code": fault.code, "X-Error-Message": fault.code} if fault.code else {}
                self.send_json({"error": "no"}, fault.status, names | fault.headers)
                return
        self.route(path, body)


class HubHandler(_Handler):
    server_name = "hub"

    def route(self, path: str, body: bytes) -> None:
        post = self.command == "POST"
        if path == "/api/whoami-v2":
            self._whoami()
        elif path == "/api/repos/create" and post:
            self._create(json.loads(body))
        elif path == "/api/validate-yaml" and post:
            self.send_json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/auth-check/write", path):
            self._may_write(found[1])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            self._preupload(found[1], json.loads(body))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            self._commit(found[1], found[2], body)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(found[1], found[2], found[3])
        else:
            self.refuse(404)

    def _model(self, model_id: str, *, files: bool = False) -> Model | None:
        """The repository, if it may be read with this token; else the refusal is sent."""
        model = self.hub.models.get(model_id)
        known = self.token in self.hub.users
        if model is None or (model.private and not known):
            self.refuse(404 if known else 401, "RepoNotFound")
            return None
        if files and model.gated and not known:
            self.refuse(401, "GatedRepo")
            return None
        return model

    def _at(self, model: Model, revision: str) -> str | None:
        sha = model.refs.get(revision, revision)
        if sha in model.commits:
            return sha
        self.refuse(404, "RevisionNotFound")
        return None

    def _info(self, model_id: str, revision: str) -> None:
        model = self._model(model_id)
        sha = self._at(model, revision) if model is not None else None
        if model is None or sha is None:
            return
        siblings = []
        for name, content in model.commits[sha].items():
            entry: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_id(content)}
            if name.endswith(LARGE):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 134}
            siblings.append(entry)
        self.send_json({"id": model_id, "modelId": model_id, "sha": sha, "tags": [], "siblings": siblings})

    def _resolve(self, model_id: str, revision: str, name: str) -> None:
        model = self._model(model_id, files=True)
        sha = self._at(model, revision) if model is not None else None
        if model is None or sha is None:
            return
        content = model.commits[sha].get(name)
        if content is None:
            self.send_json({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        elif name.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            self.hub.objects[digest] = content
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"', "X-Repo-Commit": sha}
            linked["Location"] = f"{self.hub.storage}/{digest}?Signature=secret"
            self.send(b"", 302, linked)
        else:
            self.send(content, headers={"ETag": f'"{git_id(content)}"', "X-Repo-Commit": sha})

    def _whoami(self) -> None:
        if self.token not in self.hub.users:
            self.refuse(401)
            return
        name, role = self.hub.users[self.token]
        token = {"displayName": "test", "role": role}
        self.send_json({"type": "user", "name": name, "orgs": [{"name": "team"}], "auth": {"accessToken": token}})

    def _may_write(self, model_id: str) -> bool:
        name, role = self.hub.users.get(self.token, ("", ""))
        if role != "write" or model_id.partition("/")[0] not in (name, "team"):
            self.refuse(403)
            return False
        if self.path.endswith("/write"):
            model = self._model(model_id)
            if model is not None:
                self.send_json({})
        return True

    def _create(self, wanted: dict[str, Any]) -> None:
        name, role = self.hub.users.get(self.token, ("", ""))
        model_id = f"{wanted.get('organization') or name}/{wanted['name']}"
        if role != "write" or model_id.partition("/")[0] not in (name, "team"):
            self.refuse(403)
        elif model_id in self.hub.models:
            self.send_json({"error": "exists", "url": f"{self.hub.endpoint}/{model_id}"}, 409)
        else:
            private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
            self.hub.models[model_id] = Model(private=private)
            self.hub.models[model_id].commit({".gitattributes": b"*.data filter=lfs\n"})
            self.send_json({"url": f"{self.hub.endpoint}/{model_id}"})

    def _preupload(self, model_id: str, wanted: dict[str, Any]) -> None:
        if self._may_write(model_id):
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                 "shouldIgnore": False}
                for f in wanted["files"]
            ]  # fmt: skip
            self.send_json({"files": modes})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for entry in wanted["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.storage}/{entry['oid']}"}}
            objects.append(answer)
        self.send_json({"transfer": "basic", "objects": objects})

    def _commit(self, model_id: str, revision: str, body: bytes) -> None:
        if not self._may_write(model_id):
            return
        model = self.hub.models[model_id]
        files = dict(model.commits[model.refs[revision]])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = model.commit(files, revision)
        self.send_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.endpoint}/{model_id}/commit/{sha}"})


class StorageHandler(_Handler):
    server_name = "storage"

    def route(self, path: str, body: bytes) -> None:
        digest = path.strip("/")
        if self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == digest
            self.hub.objects[digest] = body
            self.send(b"")
        elif digest in self.hub.objects:
            self.send(self.hub.objects[digest], headers={"ETag": f'"{digest}"'})
        else:
            self.refuse(404)


def point_at(hub: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Lets huggingface_hub in this process work with the stand-in, and with nothing else."""
    from huggingface_hub import constants

    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    for name in ("NO_PROXY", "no_proxy"):  # a machine that reaches the world through a proxy
        monkeypatch.setenv(name, "127.0.0.1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def environment(hub: Hub, cache: Path) -> dict[str, str]:
    """The same for another process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    kept |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return kept | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}


def git_id(content: bytes) -> str:
    """The hash under which git keeps a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
