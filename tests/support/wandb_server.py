"""A small W&B server for tests: GraphQL, the file stream and uploads, as far as runs, artifacts and a sweep's agent
need them.

It speaks to the real client and its service; that the real server behaves the same is not proven by it. What a run
sent is kept as it came, so that a row that came twice is seen.
"""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote

import yaml


@dataclass
class FakeRun:
    """`sent`: every history row, as often as it came; `lines`: what the server holds, by line number.

    `state`: running | finished | failed | preempted, as W&B documents them. `begun`: when it was first heard of;
    `stopped`: the server wants no more of it, as Hyperband or a button of its page say; `console`: lines of its log,
    by number.
    """

    name: str
    sent: list[dict] = field(default_factory=list)
    lines: dict[int, dict] = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    about: dict = field(default_factory=dict)
    starts: int = 0
    complete: bool = False
    state: str = ""
    preempting: bool = False
    begun: float = 0.0
    stopped: bool = False
    console: dict[int, str] = field(default_factory=dict)
    alerts: list[dict] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        return [row["step"] for row in self.sent]


@dataclass
class FakeArtifact:
    """A version: what it was made with (`about`), its files by name (the place that they were uploaded to), and where
    it was linked to."""

    id: str
    about: dict
    files: dict[str, str] = field(default_factory=dict)
    links: list[dict] = field(default_factory=list)
    committed: bool = False

    @property
    def name(self) -> str:
        return self.about["artifactCollectionName"]

    @property
    def aliases(self) -> list[str]:
        return [said["alias"] for said in self.about.get("aliases") or []]


@dataclass
class FakeSweep:
    """A grid. `project`: where its trials are; `trials`: by id, what was set; `left`: those that no agent has yet.

    `ends_after`: seconds after which early_terminate ends a trial, by its place from 0; who is at it is told.
    """

    name: str
    project: dict
    config: str
    trials: dict[str, dict] = field(default_factory=dict)
    ends_after: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        asked = {name: said["values"] for name, said in yaml.safe_load(self.config)["parameters"].items()}
        self.left = [dict(zip(asked, values, strict=True)) for values in itertools.product(*asked.values())]


class FakeServer(ThreadingHTTPServer):
    """`mode`: up | hang (connections are taken and never answered) | 401 | 403 | 500; `runs`, `sweeps`: by id.

    `received`: the body of every request, unpacked; `uploads`: the bytes of a file, by the path of its upload.
    `artifacts`: every version, as often as it was made.
    """

    daemon_threads = True
    request_queue_size = 128  # pictures are uploaded side by side

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, FakeRun] = {}
        self.sweeps: dict[str, FakeSweep] = {}
        self.artifacts: list[FakeArtifact] = []
        self.uploads: dict[str, bytes] = {}
        self.up()
        self.lock = threading.Lock()
        self.requests: list[str] = []
        self.received: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def account(self) -> dict[str, str]:
        """The environment of who has an account here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": "a" * 40, "WANDB_ERROR_REPORTING": "false"}

    def file(self, name: str) -> bytes:
        """Of a run's folder."""
        return self.uploads[f"/upload/{name}"]

    def artifact(self, name: str) -> FakeArtifact:
        """The newest version of this name, whose files have come."""
        return next(one for one in reversed(self.artifacts) if one.name == name and one.committed)

    def hang(self) -> None:
        self.mode = "hang"

    def up(self) -> None:
        self.mode = self.files_mode = "up"

    def handle_error(self, request, client_address) -> None:
        """A client that was killed in mid-request is no news."""


@contextmanager
def served():
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.up()
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *_: object) -> None:
        """Requests are no news either."""

    def do_GET(self) -> None:
        self._answer({})

    do_PUT = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.received.append(body)
        streams = self.path.endswith("/file_stream")
        mode = self.server.files_mode if streams and self.server.mode == "up" else self.server.mode
        while mode == "hang":
            time.sleep(0.05)
            mode = self.server.files_mode if streams and self.server.mode == "up" else self.server.mode
            if mode != "hang":
                self.close_connection = True
                return
        if mode != "up":
            self._answer({"errors": [{"message": "refused by the test"}]}, int(mode))
            return
        content = json.loads(body or b"{}")
        with self.server.lock:
            self._answer(self._stream(content) if streams else {"data": self._graphql(content)})

    def _answer(self, content: dict, status: int = 200) -> None:
        if self.command != "POST":
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.server.received.append(body)
            self.server.uploads[unquote(self.path)] = body
        raw = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _stream(self, content: dict) -> dict:
        run = self.server.runs.setdefault((self.path.split("/"))[-2], FakeRun(self.path.split("/")[-2]))
        for name, part in content.get("files", {}).items():
            if name == "wandb-history.jsonl":
                rows = [json.loads(line) for line in part["content"]]
                run.sent += rows
                run.lines.update({part["offset"] + at: row for at, row in enumerate(rows)})
            elif name == "output.log":
                run.console.update({part["offset"] + at: line for at, line in enumerate(part["content"])})
            elif name == "wandb-summary.json":
                run.summary = json.loads(part["content"][-1])
        run.preempting = run.preempting or bool(content.get("preempting"))
        if content.get("complete"):
            run.complete = True
            run.state = ("preempted" if run.preempting else "failed") if content.get("exitcode") else "finished"
        return {"exitcode": None, "limits": {}, "stopped": run.stopped}

    def _graphql(self, content: dict) -> dict:
        query, given = content.get("query", ""), content.get("variables") or {}
        name = (re.search(r"(?:query|mutation)\s+(\w+)", query) or ["", ""])[1]
        self.server.requests.append(name)
        if name == "UpsertBucket":
            return {"upsertBucket": self._upsert(given)}
        if name == "RunResumeStatus":
            return {"model": self._resume(given)}
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.server.url}/upload/{f}"} for f in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        if name == "Viewer":
            flags, teams = json.dumps({"code_saving_enabled": False}), {"edges": []}
            return {
                "viewer": {"id": "V", "entity": "me", "username": "me", "email": "", "flags": flags, "teams": teams}
            }
        if name == "UpsertSweep":
            return {"upsertSweep": {"sweep": self._upsert_sweep(given), "configValidationWarnings": []}}
        if name == "SweepWithRuns":
            found = self.server.sweeps.get(given["sweep"])
            about = found and {"id": found.name, "name": found.name, "config": found.config, "runs": {"edges": []}}
            return {"project": {"sweep": about}}
        if name == "CreateAgent":
            return {"createAgent": {"agent": {"id": f"agent-of-{given['sweep']}"}}}
        if name == "Heartbeat":
            sweep = self.server.sweeps[given["id"].removeprefix("agent-of-")]
            busy = [trial for trial, runs in json.loads(given["runState"]).items() if runs]
            ended = [trial for trial in busy if self._is_ended(sweep, trial)]
            commands = [{"type": "stop", "run_id": trial} for trial in ended] if busy else self._next_trial(sweep)
            return {"agentHeartbeat": {"agent": {"id": given["id"]}, "commands": json.dumps(commands)}}
        if name == "RunStoppedStatus":
            return {"project": {"run": {"shouldStop": self.server.runs[given["run"]].stopped, "stopped": False}}}
        if name in _ARTIFACTS:
            return _ARTIFACTS[name](self.server, given)
        if name == "NotifyScriptableRunAlert":
            self.server.runs[given["runName"]].alerts.append(given)
            return {"notifyScriptableRunAlert": {"success": True}}
        if name == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if "serverInfo" in query:
            return {"serverInfo": {"cliVersionInfo": {"max_cli_version": "0.99.0"}, "latestLocalVersionInfo": None}}
        return {}

    def _upsert_sweep(self, given: dict) -> dict:
        name = f"sweep{len(self.server.sweeps) + 1}"
        project = {"id": "P", "name": given["projectName"], "entity": {"id": "E", "name": given["entityName"] or "me"}}
        self.server.sweeps[name] = FakeSweep(name, project, given["config"])
        return {"name": name, "project": project}

    def _is_ended(self, sweep: FakeSweep, trial: str) -> bool:
        run, after = self.server.runs[trial], sweep.ends_after.get(list(sweep.trials).index(trial))
        run.stopped = run.stopped or (after is not None and bool(run.starts) and time.time() > run.begun + after)
        return run.stopped

    def _next_trial(self, sweep: FakeSweep) -> list[dict]:
        """What an agent is to start; the server has its run before the trial speaks."""
        if not sweep.left:
            return [{"type": "exit"}]
        trial, said = f"{sweep.name}trial{len(sweep.trials) + 1}", sweep.left.pop(0)
        sweep.trials[trial] = said
        self.server.runs[trial] = FakeRun(trial, about={"sweep": sweep.name}, state="pending")
        args = {name: {"value": value} for name, value in said.items()}
        program = yaml.safe_load(sweep.config).get("program", "")
        return [{"type": "run", "run_id": trial, "program": program, "args": args}]

    def _upsert(self, given: dict) -> dict:
        run = self.server.runs.get(given["name"])
        inserted = run is None
        run = self.server.runs.setdefault(given["name"], FakeRun(given["name"]))
        run.starts += 1
        run.begun = run.begun or time.time()
        if run.state != "running":
            run.state, run.preempting = "running", False
        run.about |= {k: v for k, v in given.items() if v is not None}
        if given.get("config"):
            run.config = json.loads(given["config"])
        if given.get("summaryMetrics"):
            run.summary |= json.loads(given["summaryMetrics"])
        entity = given.get("entity") or "me"
        project = {"id": "P", "name": given["project"], "entity": {"id": "E", "name": entity}}
        bucket = {
            "id": given["name"], "name": given["name"], "displayName": given.get("displayName") or given["name"],
            "description": "", "config": json.dumps(run.config), "project": project,
            "sweepName": run.about.get("sweep") or "", "historyLineCount": len(run.lines),
        }  # fmt: skip
        return {"bucket": bucket, "inserted": inserted}

    def _resume(self, given: dict) -> dict | None:
        run = self.server.runs.get(given["name"])
        about = {"id": "P", "name": given["project"], "entity": {"id": "E", "name": given.get("entity") or "me"}}
        if run is None:
            return {**about, "bucket": None}
        tail = [json.dumps(run.lines[max(run.lines)])] if run.lines else []
        bucket = {
            "id": run.name, "name": run.name, "summaryMetrics": json.dumps(run.summary), "displayName": run.name,
            "logLineCount": len(run.console), "historyLineCount": len(run.lines), "eventsLineCount": 0,
            "historyTail": json.dumps(tail), "eventsTail": "[]", "config": json.dumps(run.config), "tags": [],
            "notes": "", "wandbConfig": json.dumps({"t": 1}),
        }  # fmt: skip
        return {**about, "bucket": bucket}


# --- artifacts


def _artifact_type(server: FakeServer, given: dict) -> dict:
    name = given["name"].partition(":")[0]
    found = next((one for one in server.artifacts if one.name == name), None)
    about = found and {"artifactType": {"name": found.about["artifactTypeName"]}}
    return {"project": {"artifact": about}}


def _create(server: FakeServer, given: dict) -> dict:
    """A version; the same content as before is not made again, but for its aliases, as at W&B."""
    about = given["input"]
    same = [
        a for a in server.artifacts if (a.name, a.about["digest"]) == (about["artifactCollectionName"], about["digest"])
    ]
    made = same[-1] if same and same[-1].committed else FakeArtifact(f"artifact{len(server.artifacts)}", about)
    if made not in server.artifacts:
        server.artifacts.append(made)
    made.about |= about
    sequence = {"id": f"sequence-{made.name}", "latestArtifact": None}
    state = "COMMITTED" if made.committed else "PENDING"
    return {"createArtifact": {"artifact": {"id": made.id, "state": state, "artifactSequence": sequence}}}


def _manifest(server: FakeServer, given: dict) -> dict:
    about = given.get("input", given)
    place = f"{server.url}/manifest/{about.get('artifactID') or about.get('artifactManifestID')}"
    file = {"id": "F", "uploadUrl": place, "uploadHeaders": []}
    return {"artifactManifest": {"id": f"manifest-{about.get('artifactID')}", "file": file}}


def _files(server: FakeServer, given: dict) -> dict:
    nodes = []
    for file in given["input"]["artifactFiles"]:
        artifact = _by_id(server, file["artifactID"])
        place = f"/artifact/{artifact.id}/{file['name']}"
        artifact.files[file["name"]] = place
        about = {"storagePath": f"wandb_artifacts/{artifact.id}/{file['name']}", "uploadHeaders": []}
        about |= {"uploadUrl": server.url + quote(place), "uploadMultipartUrls": None, "artifact": {"id": artifact.id}}
        nodes.append({"node": about})
    return {"createArtifactFiles": {"files": {"edges": nodes}}}


def _commit(server: FakeServer, given: dict) -> dict:
    artifact = _by_id(server, given["artifactID"])
    artifact.committed = True
    return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.about["digest"]}}}


def _by_id(server: FakeServer, name: str) -> FakeArtifact:
    return next(one for one in server.artifacts if one.id == name)


def _fragment(artifact: FakeArtifact) -> dict:
    """What the client reads of a version."""
    project = {"id": "P", "internalId": base64.b64encode(b"Project:v1:p:me").decode(), "name": "p"}
    project["entity"] = {"name": "me"}
    collection = {"__typename": "ArtifactSequence", "id": f"sequence-{artifact.name}", "name": artifact.name}
    collection["project"] = project
    aliases = [
        {"__typename": "ArtifactAlias", "id": f"alias{n}", "alias": a, "artifactCollection": collection}
        for n, a in enumerate(artifact.aliases)
    ]
    return {
        "__typename": "Artifact", "id": artifact.id, "artifactSequence": collection, "versionIndex": 0,
        "artifactType": {"name": artifact.about["artifactTypeName"]}, "description": artifact.about.get("description"),
        "metadata": artifact.about.get("metadata"), "ttlDurationSeconds": -1, "ttlIsInherited": True, "tags": [],
        "historyStep": None, "state": "COMMITTED", "size": 1, "digest": artifact.about["digest"],
        "digestAlgorithm": "MANIFEST_MD5", "commitHash": "c", "fileCount": 1, "createdAt": "2026-01-01T00:00:00Z",
        "updatedAt": None, "aliases": aliases,
    }  # fmt: skip


def _link(server: FakeServer, given: dict) -> dict:
    about = given["input"]
    artifact = _by_id(server, about["artifactID"])
    artifact.links.append(about)
    version = _fragment(artifact)
    collection = {**version["artifactSequence"], "name": about["artifactPortfolioName"]}
    member = {"__typename": "ArtifactCollectionMembership", "id": "M", "versionIndex": 0, "aliases": []}
    member |= {"createdAt": version["createdAt"], "artifactCollection": collection, "artifact": version}
    return {"result": {"versionIndex": 0, "artifactMembership": member}}


_ARTIFACTS = {
    "ArtifactType": _artifact_type,
    "CreateArtifact": _create,
    "CreateArtifactManifest": lambda server, given: {"createArtifactManifest": _manifest(server, given)},
    "UpdateArtifactManifest": lambda server, given: {"updateArtifactManifest": _manifest(server, given)},
    "CreateArtifactFiles": _files,
    "CommitArtifact": _commit,
    "ArtifactByID": lambda server, given: {"artifact": _fragment(_by_id(server, given["id"]))},
    "LinkArtifact": _link,
    "FetchOrgInfoFromEntity": lambda server, given: {
        "entity": {"organization": {"name": "org", "orgEntity": {"name": "org-entity"}}, "user": None}
    },
}
