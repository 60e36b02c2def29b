"""A server that answers as the Hugging Face hub and as a plain file server do, on this machine alone."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Files by path, ``/OWNER/REPO/resolve/main/model.safetensors`` or ``/any/file.pth``.

    Attributes:
        asked: what was asked for, ``GET /path``.
        private: whether repositories are that were created here.
        short: GET sends so many bytes less than there are.
        cut: GET also promises what it does not send.
        etag: instead of the file's hash.
        commit: that main stands for.
        gated: repositories of data sets that want an account.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    private: dict[str, bool] = field(default_factory=dict)
    short: int = 0
    cut: bool = False
    etag: str | None = None
    commit: str = COMMIT
    gated: set[str] = field(default_factory=set)

    def put(self, repository: str, name: str, content: bytes, revision: str = "main") -> None:
        self.files[f"/{repository}/resolve/{revision}/{name}"] = content

    def put_data(self, repository: str, name: str, content: bytes) -> None:
        """A file of a data set, at the commit that main stands for."""
        self.put(f"datasets/{repository}", name, content, self.commit)

    def told(self, path: str, sent: bytes) -> bytes | None:
        """What the hub's API says of a data set; None where there is none."""
        asked = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(revision|tree|paths-info)/([^/?]+)(?:/([^?]*))?.*", path)
        if asked is None:
            plain = re.fullmatch(r"/api/datasets/([^/]+/[^/?]+)", path)
            if plain is None:
                return None
            repository, what, revision, below = plain[1], "revision", "main", None
        else:
            repository, what, revision, below = asked.groups()
        start = f"/datasets/{repository}/resolve/{self.commit}/"
        files = {p.removeprefix(start): c for p, c in self.files.items() if p.startswith(start)}
        if not files or revision not in ("main", self.commit):
            return None
        if what == "revision":
            siblings = [{"rfilename": name} for name in files]
            return json.dumps({"id": repository, "sha": self.commit, "siblings": siblings, "tags": []}).encode()
        listed = [
            {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files.items()
        ]
        folders = {str(parent) for name in files for parent in PurePosixPath(name).parents if str(parent) != "."}
        listed += [{"type": "directory", "path": f, "size": 0, "oid": "0" * 40} for f in sorted(folders)]
        if what == "tree":
            within = f"{below}/" if below else ""
            inside = [entry for entry in listed if entry["path"].startswith(within)]
            return json.dumps(inside).encode() if inside else None
        wanted = parse_qs(sent.decode()).get("paths", []) if b"{" not in sent else json.loads(sent)["paths"]
        return json.dumps([entry for entry in listed if entry["path"] in wanted]).encode()


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_CONNECT(self) -> None:
            hub.asked.append(f"CONNECT {self.path}")
            self.send_error(403)

        def do_POST(self) -> None:
            """What is asked of a data set; or what an upload asks for, of files that are no large ones."""
            if self.path.startswith("/api/datasets/"):
                self._answer(body=True)
                return
            hub.asked.append(f"POST {self.path}")
            lines = self.rfile.read(int(self.headers["Content-Length"])).splitlines()
            said = [json.loads(line) for line in lines]
            told = self._uploaded(said) if self.headers.get("Authorization") else None
            body = json.dumps(told or {"error": "Invalid username or password."}).encode()
            self.send_response(200 if told else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _uploaded(self, said: list[dict]) -> dict | None:
            words = self.path.strip("/").split("/")
            if words == ["api", "repos", "create"]:
                repository = f"{said[0]['organization']}/{said[0]['name']}"
                hub.private[repository] = said[0].get("visibility") == "private" or bool(said[0].get("private"))
                return {"url": f"{hub.url}/{repository}"}
            if words == ["api", "validate-yaml"]:
                return {"errors": [], "warnings": []}
            repository, what = "/".join(words[2:4]), words[4]
            if what == "preupload":
                modes = {"uploadMode": "regular", "shouldIgnore": False}
                return {"files": [{"path": file["path"], **modes} for file in said[0]["files"]]}
            for file in (line["value"] for line in said if line["key"] == "file"):
                hub.put(repository, file["path"], base64.b64decode(file["content"]))
            return {"success": True, "commitOid": COMMIT, "commitUrl": f"{hub.url}/{repository}/commit/{COMMIT}"}

        def _answer(self, *, body: bool) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            length = int(self.headers.get("Content-Length") or 0)
            sent = self.rfile.read(length) if length else b""
            content = hub.files.get(self.path)
            if self.path.startswith("/api/"):
                content = hub.told(self.path, sent)
            if any(f"/{name}/" in f"{self.path}/" for name in hub.gated):
                content = None
            if content is None:
                self._refuse()
                return
            sent = content[: len(content) - hub.short] if body else content
            self.send_response(200)
            self.send_header("Content-Length", str(len(content if hub.cut else sent)))
            self.send_header("ETag", f'"{hub.etag or hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", hub.commit)
            self.end_headers()
            if body:
                self.wfile.write(sent)

        def _refuse(self) -> None:
            repository, _, rest = self.path.partition("/resolve/")
            if self.path.startswith("/api/datasets/"):
                owner, name, *rest_of_path = self.path.removeprefix("/api/datasets/").split("/")
                repository, rest = f"/datasets/{owner}/{name}", "/".join(rest_of_path[1:])
            known = repository in {path.partition("/resolve/")[0] for path in hub.files}
            revisions = {path.partition("/resolve/")[2].partition("/")[0] for path in hub.files}
            what = "EntryNotFound" if re.split("[/?]", rest)[0] in revisions else "RevisionNotFound"
            gated = repository.removeprefix("/datasets/") in hub.gated
            self.send_response(403 if gated else 404)
            self.send_header("Content-Length", "0")
            self.send_header("X-Error-Code", "GatedRepo" if gated else what if known else "RepoNotFound")
            self.end_headers()

        def log_message(self, *_words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
