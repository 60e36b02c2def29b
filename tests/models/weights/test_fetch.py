"""`tlx weights fetch`, hub repositories, and what is said without internet: against a server on this machine."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from commands import tlx, write_config
from hub import Hub, serve
from images import make_shards
from safetensors import safe_open
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from tlx import models
from tlx.base.errors import UserError
from tlx.base.reachable import reachable
from tlx.cli.main import app
from tlx.models.weights import download
from tlx.models.weights import local_weights as shelf
from tlx.models.weights.fetch import fetch

TINY = "timm/test_resnet.r160_in1k"
FILE = "timm--test_resnet.r160_in1k.safetensors"


def tiny(seed: int = 1, **args: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return dict(timm.create_model("test_resnet", **args).state_dict())


def pickled(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches, and no proxy on the way to this machine."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(shelf.VARIABLE, raising=False)
    return tmp_path


@pytest.fixture
def server(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as hub:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


@pytest.fixture
def plain(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """torchvision's smallest network, published there."""
    torch.manual_seed(2)
    content = pickled(torchvision.models.squeezenet1_1(weights=None).state_dict())
    name = f"/squeezenet1_1-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    server.files[name] = content
    member = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    monkeypatch.setattr(member.value, "url", server.url + name)
    return server


def names_below(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file() or p.is_symlink())


def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a compute node: an address where nobody listens."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


def hanging(*_address: Any, **_more: Any) -> Any:
    """A name server that does not answer for a minute; what is asked gives up far earlier, on a busy machine too."""
    time.sleep(60)
    raise socket.gaierror("timed out")


def error(*names: str, to: Path, tag: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        list(fetch(names, to, tag=tag))
    return str(caught.value)


def test_one_file_under_a_name_that_can_be_foretold(server: Hub, caches: Path) -> None:
    server.put(TINY, "model.safetensors", save(tiny()))
    done = CliRunner().invoke(app, ["weights", "fetch", "timm/test_resnet", "--to", str(caches / "w")])
    assert done.exit_code == 0, done.output
    path = caches / "w" / FILE
    assert f"backbone: {{name: timm/test_resnet, weights: {path}}}" in done.output
    assert f"export TLX_WEIGHTS={caches / 'w'}" in done.output
    assert os.listdir(caches / "w") == [FILE]
    assert all(torch.equal(tensor, tiny()[name]) for name, tensor in load_file(path).items())
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    assert (about["name"], about["tag"], about["timm"]) == (TINY, "r160_in1k", timm.__version__)
    assert path.stat().st_mode & 0o777 == (caches / "w" / FILE).parent.stat().st_mode & 0o666  # others may read it
    before = path.stat().st_mtime_ns
    again = CliRunner().invoke(app, ["weights", "fetch", TINY, "--to", str(caches / "w")])
    assert "was there already, kept" in again.output
    assert path.stat().st_mtime_ns == before


def test_the_folder_is_looked_into_first(server: Hub, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put(TINY, "model.safetensors", save(tiny(1)))
    list(fetch([TINY], caches / "w"))
    no_server(monkeypatch)
    server.files.clear()
    given = tiny(1)
    monkeypatch.setenv(shelf.VARIABLE, f"{caches / 'empty'}{os.pathsep}{caches / 'w'}")
    shelf.put(caches / "w", TINY, given := tiny(5), {"tag": "r160_in1k"})  # other values than the library's cache has
    for weights in ("default", "r160_in1k", str(caches / "w"), str(caches / "w" / FILE)):
        found = models.load("timm/test_resnet", classes=3, weights=weights)
        assert torch.equal(found.module.state_dict()["conv1.0.weight"], given["conv1.0.weight"])
        assert found.loaded is not None
        assert found.loaded.where == str(caches / "w" / FILE)
        assert set(found.loaded.left) == set(found.loaded.new) == {"fc.weight", "fc.bias"}
        assert found.loaded.tensors == len(given) - 2
    monkeypatch.delenv(shelf.VARIABLE)
    cached = models.load("timm/test_resnet", classes=3)
    assert torch.equal(cached.module.state_dict()["conv1.0.weight"], tiny(1)["conv1.0.weight"])
    assert str(cached.loaded).startswith(f"weights: {len(given) - 2} tensors of {TINY}; not taken: fc.weight, fc.bias")


def test_a_fetched_file_brings_its_preprocessing(caches: Path) -> None:
    """Weights of one tag are often trained on other pixels than the default ones."""
    torch.manual_seed(0)
    state = dict(timm.create_model("resnet18").state_dict())
    path = shelf.put(caches, "timm/resnet18.tv_in1k", state, {"tag": "tv_in1k"})
    assert models.load("timm/resnet18", classes=3, weights="none").input.interpolation == "bicubic"
    assert models.load("timm/resnet18", classes=3, weights=str(path)).input.interpolation == "bilinear"


def test_timms_own_repositories_bring_their_preprocessing(caches: Path) -> None:
    for weights, interpolation in (("hf-hub:timm/resnet18.tv_in1k", "bilinear"), ("hf-hub:me/resnet18", "bicubic")):
        spec = models.load("timm/resnet18", classes=3, weights=weights, empty=True).input
        assert spec.interpolation == interpolation


def test_a_folder_without_these_weights(caches: Path) -> None:
    shelf.put(caches, "timm/resnet18.tv_in1k", {"a": torch.zeros(1)}, {"tag": "tv_in1k"})
    with pytest.raises(UserError) as caught:
        models.load("timm/resnet18", classes=3, weights=str(caches))
    default = models.source("timm/resnet18").tags()[0]
    assert f"no timm--resnet18.{default}.safetensors; there is timm--resnet18.tv_in1k.safetensors" in str(caught.value)
    assert f"tlx weights fetch timm/resnet18.{default} --to DIR" in str(caught.value)
    assert models.load("timm/resnet18", classes=3, weights=str(caches), empty=True)  # a plan needs no weights


def test_torchvision_with_a_tag(plain: Hub, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (got,) = fetch(["torchvision/squeezenet1_1.IMAGENET1K_V1"], caches / "w")
    assert got.path.name == "torchvision--squeezenet1_1.IMAGENET1K_V1.safetensors"
    assert [g.kept for g in fetch(["torchvision/squeezenet1_1"], caches / "w", tag="IMAGENET1K_V1")] == [True]
    (caches / "torch" / "hub" / "checkpoints").rename(caches / "gone")
    plain.files.clear()
    monkeypatch.setenv(shelf.VARIABLE, str(caches / "w"))
    found = models.load("torchvision/squeezenet1_1", classes=3)
    torch.manual_seed(2)
    given = torchvision.models.squeezenet1_1(weights=None).state_dict()
    assert torch.equal(found.module.state_dict()["features.0.weight"], given["features.0.weight"])


def test_mistakes_come_before_any_download(server: Hub, caches: Path) -> None:
    server.put(TINY, "model.safetensors", save(tiny()))
    to = caches / "w"
    assert 'no weights "r160_in2k"; did you mean "r160_in1k"?' in error(TINY, "timm/test_resnet.r160_in2k", to=to)
    assert "IMAGENET1K_V" in error("torchvision/resnet50.IMAGENET1K_V7", to=to)
    assert "did you mean" in error("timm/test_resnett", to=to)
    assert "has no pretrained weights" in error("timm/resnet50t", to=to)
    assert "has no tag" in error("hf-hub:a/b", to=to, tag="r160_in1k")
    assert "is no repository" in error("hf-hub:a", to=to)
    assert "is no repository" in error("hf-hub:a/b--c", to=to)
    assert "is no repository" in error("hf-hub:../../etc/passwd", to=to)
    assert "give one of them" in error(TINY, to=to, tag="r161_in1k")
    (caches / "file").write_text("")
    assert "cannot be written to" in error(TINY, to=caches / "file")
    assert "cannot be written to" in error(TINY, to=caches / "file" / "below")
    assert server.asked == []
    assert not to.exists()


def test_a_damaged_file_is_not_kept_in_silence(caches: Path) -> None:
    shelf.put(caches, TINY, tiny(), {"tag": "r160_in1k"})
    (caches / FILE).write_bytes((caches / FILE).read_bytes()[:-9])
    assert "cannot be read as weights: it is damaged" in error(TINY, to=caches)


def test_hub_repositories(server: Hub, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tiny(3, num_classes=7)
    server.put("me/trained", "model.safetensors", save(given))
    server.put("me/older", "pytorch_model.bin", pickled({f"module.{n}": t for n, t in tiny(4).items()}), "v1.0")
    for prefix in ("hf-hub:", "hf_hub:"):
        found = models.load("timm/test_resnet", classes=3, weights=f"{prefix}me/trained")
        assert torch.equal(found.module.state_dict()["conv1.0.weight"], given["conv1.0.weight"])
    assert found.input.mean == (0.5, 0.5, 0.5)
    older = models.load("timm/test_resnet", classes=3, weights="hf-hub:me/older@v1.0")
    assert torch.equal(older.module.state_dict()["conv1.0.weight"], tiny(4)["conv1.0.weight"])
    before = len(server.asked)
    models.load("timm/test_resnet", classes=3, weights="hf-hub:me/older@v1.0")
    assert len(server.asked) == before  # from the cache, without a question
    got = list(fetch(["hf-hub:me/trained", "hf-hub:me/older@v1.0"], caches / "w"))
    assert [g.path.name for g in got] == ["hf-hub--me--trained.safetensors", "hf-hub--me--older@v1.0.safetensors"]
    no_server(monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(caches / "other"))
    monkeypatch.setenv(shelf.VARIABLE, str(caches / "w"))
    carried = models.load("timm/test_resnet", classes=3, weights="hf-hub:me/trained")
    assert torch.equal(carried.module.state_dict()["conv1.0.weight"], given["conv1.0.weight"])


class Shell:
    """What a malicious file holds: unpickling it runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_nothing_that_is_downloaded_is_executed(plain: Hub, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain.put("me/evil", "pytorch_model.bin", pickled({"state_dict": Shell(caches / "executed")}))
    with pytest.raises(UserError, match="cannot be read as weights"):
        models.load("timm/test_resnet", classes=3, weights="hf-hub:me/evil")
    content = pickled(Shell(caches / "executed"))
    name = f"/squeezenet1_1-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    plain.files[name] = content
    member = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    monkeypatch.setattr(member.value, "url", plain.url + name)
    with pytest.raises(UserError, match=r"cannot be read as weights: it holds a pickled posix\.mkdir"):
        models.load("torchvision/squeezenet1_1", classes=3)
    assert not (caches / "executed").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_what_a_server_may_answer(server: Hub, caches: Path) -> None:
    server.put("me/empty", "README.md", b"nothing here")
    assert "has no model.safetensors or pytorch_model.bin" in error("hf-hub:me/empty", to=caches / "w")
    assert "no such revision" in error("hf-hub:me/empty@v2", to=caches / "w")
    assert "no such repository, or a private one" in error("hf-hub:me/nobody", to=caches / "w")
    assert "no such repository" in error(TINY, to=caches / "w")
    assert names_below(caches / "w") == []


@pytest.mark.parametrize("name", ["hub", "plain"])
@pytest.mark.parametrize("fault", ["short", "hash", "gone"])
def test_nothing_half_written(plain: Hub, caches: Path, monkeypatch: pytest.MonkeyPatch, name: str, fault: str) -> None:
    plain.put(TINY, "model.safetensors", save(tiny()))
    wanted = TINY if name == "hub" else "torchvision/squeezenet1_1"
    if fault == "short":
        plain.short, plain.cut = 1000, name == "plain"
    elif fault == "hash":
        plain.etag = "a" * 64
        plain.files.update({path: content[:-8] + bytes(8) for path, content in plain.files.items()})
    else:
        plain.files.clear()
    text = error(wanted, to=caches / "w")
    assert plain.url in text
    assert {"short": "cannot be downloaded", "hash": "hash", "gone": "no such" if name == "hub" else "404"}[
        fault
    ] in text
    assert names_below(caches / "w") == []
    kept = [p for folder in ("hub", "torch") for p in names_below(caches / folder)]
    assert not [p for p in kept if p.endswith((".pth", ".safetensors", ".incomplete", ".partial", ".tmp"))]
    assert list((caches / "hub").rglob("blobs/*")) == []


@pytest.fixture
def silent() -> Iterator[str]:
    """An address whose packets vanish: a queue of connections that is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        yield f"http://127.0.0.1:{full.getsockname()[1]}"
        for one in waiting:
            one.close()


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/squeezenet1_1", "hf-hub:me/trained"])
@pytest.mark.parametrize("how", ["refused", "silent", "offline", pytest.param("names", marks=pytest.mark.slow)])
def test_without_internet(caches: Path, monkeypatch: pytest.MonkeyPatch, silent: str, name: str, how: str) -> None:
    """Said at once, with the files that were looked for and the command to run elsewhere."""
    torchvisions = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    address = {"refused": "http://127.0.0.1:9", "silent": silent}.get(how, "http://hub.example")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    monkeypatch.setattr(torchvisions.value, "url", f"{address}/squeezenet1_1-b8a52dc0.pth")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", how == "offline")
    for variable in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    if how in ("names", "offline"):
        monkeypatch.setattr(socket, "getaddrinfo", hanging)
    monkeypatch.setenv(shelf.VARIABLE, str(caches / "w"))
    backbone, weights = ("timm/test_resnet", name) if name.startswith("hf-hub:") else (name, "default")
    models.source(backbone).tags()  # imports are not what is timed
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        models.load(backbone, classes=3, weights=weights)
    assert time.monotonic() - start < 20
    text = str(caught.value)
    full = {"timm/test_resnet": TINY, "torchvision/squeezenet1_1": f"{name}.IMAGENET1K_V1"}.get(name, name)
    assert f"tlx weights fetch {full} --to DIR" in text
    assert str(caches / "w" / shelf.file_name(full)) in text
    cached = {
        "timm/test_resnet": "hub/models--timm--test_resnet.r160_in1k/snapshots/*/model.safetensors",
        "torchvision/squeezenet1_1": "torch/hub/checkpoints/squeezenet1_1-b8a52dc0.pth",
        "hf-hub:me/trained": "hub/models--me--trained/snapshots/*/model.safetensors",
    }
    assert str(caches / cached[name]) in text
    assert "TLX_WEIGHTS=DIR" in text
    assert ("HF_HUB_OFFLINE" in text) == (how == "offline" and "torchvision" not in name)
    fetched = error(name, to=caches / "w")
    assert "cannot be fetched" in fetched
    assert names_below(caches / "w") == []


def test_a_server_that_never_finishes_its_answer(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something accepts the connection and says nothing: asked once, not for minutes."""
    monkeypatch.setattr(download, "_ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        start = time.monotonic()
        assert "cannot be asked" in error("hf-hub:me/trained", to=caches / "w")
        assert time.monotonic() - start < 20


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/squeezenet1_1"])
def test_a_proxy_that_refuses(caches: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """As on clusters that let some addresses through: the proxy answers, so that there seems to be a way."""
    with serve() as proxy:
        for variable in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(variable, proxy.url)
        huggingface_hub.close_session()
        monkeypatch.setattr(urllib.request, "_opener", None)  # both remember the proxies of their first question
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://hub.example")
        template = "https://hub.example/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        start = time.monotonic()
        with pytest.raises(UserError) as caught:
            models.load(name, classes=3)
        assert time.monotonic() - start < 20
        assert any(asked.startswith("CONNECT") for asked in proxy.asked)
    huggingface_hub.close_session()
    assert "cannot be asked" in str(caught.value)
    assert f"tlx weights fetch {name}." in str(caught.value)


@pytest.fixture
def failing() -> Iterator[str]:
    """The address of a server that is out of order."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_no_credentials_are_shown_of_a_server_that_fails(
    caches: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    url = f"http://joe:s3cret@{failing}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(UserError, match="cannot be downloaded") as of_hub:
        download.from_hub("me/trained")
    with pytest.raises(UserError, match="cannot be downloaded: HTTP Error 500") as of_url:
        download.from_url(f"http://{failing}/weights.pth?token=abcdef")
    for text in (str(of_hub.value), str(of_url.value)):
        assert failing in text
        assert not any(secret in text for secret in ("joe", "s3cret", "abcdef"))
    assert names_below(caches / "torch") == []


def test_a_dead_address_does_not_hide_one_that_answers(monkeypatch: pytest.MonkeyPatch, silent: str) -> None:
    """As where IPv6 leads nowhere: its addresses come first."""
    with socket.create_server(("127.0.0.1", 0)) as living:
        dead = ("127.0.0.1", int(silent.rpartition(":")[2]))
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", one) for one in (dead, dead, living.getsockname())]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_address, **_more: found)
        monkeypatch.setenv("no_proxy", "*")
        assert reachable("http://two.example", within_s=2.0)
        found.pop()
        assert not reachable("http://two.example", within_s=0.2)


@pytest.mark.parametrize("url", ["http://host:abc/", "https://..bad/", "http://[::1/", "http://", "host"])
def test_nothing_answers_at_what_is_no_url(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    traces: list[object] = []
    monkeypatch.setattr(threading, "excepthook", traces.append)
    monkeypatch.setenv("no_proxy", "*")
    assert not reachable(url)
    assert not traces


def test_a_download_is_written_under_this_machines_name(plain: Hub, caches: Path) -> None:
    """In a folder that machines share, numbers of processes meet."""
    written: list[str] = []
    wanted = torch.hub.download_url_to_file

    def watched(url: str, to: str, *words: Any, **more: Any) -> None:
        written.append(Path(to).name)
        wanted(url, to, *words, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "download_url_to_file", watched)
        path = download.from_url(plain.url + next(iter(plain.files)))
    assert written == [f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp"]
    assert names_below(path.parent) == [path.name]


@pytest.mark.slow
def test_the_command_with_the_hubs_own_variables(caches: Path) -> None:
    """HF_ENDPOINT and HF_HOME as a user sets them, in a process of its own; several names at once."""
    with serve() as hub:
        hub.put(TINY, "model.safetensors", save(tiny()))
        hub.put("me/trained", "model.safetensors", save(tiny(3)))
        told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(caches / "hf"), shelf.VARIABLE: str(caches / "w")}
        command = [sys.executable, "-m", "tlx", "weights", "fetch", TINY, "hf-hub:me/trained"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **told})
    assert done.returncode == 0, done.stderr
    assert names_below(caches / "w") == ["hf-hub--me--trained.safetensors", FILE]
    assert "export" not in done.stdout  # TLX_WEIGHTS names the folder already


@pytest.mark.slow
def test_one_rank_asks_for_all(caches: Path) -> None:
    """Two ranks train with weights of the hub: one download. Without a server: one question, one error, at once."""
    shards = make_shards(caches / "s", classes=3, per_class={"train": 8}, size=24)
    raw = {
        "run": str(caches / "run"),
        "data": {"train": str(shards / "train"), "batch": 4, "workers": 0},
        "input": {"size": 32},
        "backbone": {"name": "timm/test_resnet"},
        "phases": {"feature_extraction": {"duration": 1, "lr": 0.01}, "fine_tuning": {"duration": 1, "lr": 0.01}},
    }
    config = write_config(caches / "c.yaml", raw)
    with serve() as hub:
        missing = tlx("train", config, ranks=2, HF_ENDPOINT=hub.url, HF_HOME=str(caches / "hf"))
        assert missing.stderr.count("no such repository, or a private one") == 1, missing.stderr[-2000:]
        assert len([asked for asked in hub.asked if asked.startswith("HEAD")]) == 1
        assert not (caches / "run").exists()
        hub.put(TINY, "model.safetensors", save(tiny()))
        done = tlx("train", config, ranks=2, HF_ENDPOINT=hub.url, HF_HOME=str(caches / "hf"))
        assert done.returncode == 0, done.stderr[-2000:]
        assert len([asked for asked in hub.asked if asked.startswith("GET /timm")]) == 1
