"""`tlx serve`: the rows of `tlx predict` over HTTP, and a sentence with a status for whatever strangers send."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from dataclasses import replace

import pytest
import requests
import torch
from commands import invoke
from composed import finished, raw_of
from images import encoded, make_folder, make_shards, make_target_shards, picture, png_chunk
from PIL import Image
from served import serving

import tlx
from tlx.base.errors import UserError
from tlx.serve import server as servers
from tlx.serve.network import network_of
from tlx.serve.service import Batches, Limits
from tlx.ship.export import Options, export

LIMITS = Limits(body_bytes=300_000, pixels=1_000_000, pictures=16, seconds=20)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("r")
    shards = make_shards(place / "s", classes=3, per_class={"train": 16, "val": 8}, size=48)
    backbone = {"name": "timm/test_resnet", "weights": "none"}
    phases = {"each": {"lr": 0.01, "duration": "2ep"}}
    return finished(raw_of(shards, place / "run", backbone=backbone, phases=phases, input={"size": 64}))


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("m")
    for split, seed in (("train", 0), ("val", 1)):
        make_target_shards(folder / "s" / split, samples=34, seed=seed)
    tasks = {"tags": "multilabel", "age": {"name": "regression", "target": "age"}}
    task = {"name": "multitask", "tasks": tasks, "weighting": "uncertainty"}
    return finished(raw_of(folder / "s", folder / "run", task=task))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Of many sizes, one turned by its camera, one grey, one with transparency."""
    folder = make_folder(tmp_path_factory.mktemp("p"), classes=3, per_class=3, size=(50, 91), seed=7)
    exif = Image.Exif()
    exif[274] = 6
    picture(1, size=(200, 301)).save(folder / "turned.jpg", exif=exif)
    picture(2, size=(70, 65)).convert("L").save(folder / "grey.png")
    picture(0, size=(70, 65)).convert("RGBA").save(folder / "clear.webp")
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def network(run):
    return network_of(run, device="cpu")


@pytest.fixture(scope="module")
def url(network):
    with serving(network, Batches(4), LIMITS) as (found, _):
        yield found


def ask(url, *files, **how):
    """Status and JSON for files: paths, or (name, bytes)."""
    given = [file if isinstance(file, tuple) else (file.name, file.read_bytes()) for file in files]
    answer = requests.post(f"{url}/predict", files=[("file", one) for one in given], timeout=60, **how)
    assert answer.headers["content-type"] == "application/json"
    return answer.status_code, answer.json()


def bare(rows):
    return [{name: value for name, value in row.items() if name != "file"} for row in rows]


# The rows of tlx predict


def test_rows_are_those_of_predict_to_the_bit(run, network, photos):
    """With full batches, whoever asks together: one by one, some at once, all at once."""
    lines = invoke("predict", run, *photos, "--json", "--batch", 4, "--workers", 0, "--device", "cpu").stdout
    wanted = [json.loads(line) for line in lines.splitlines()]
    assert len(wanted) == 12
    with serving(network, Batches(4, is_fixed=True), LIMITS) as (url, _):
        said = [ask(url, photo)[1]["predictions"][0] for photo in photos]
        status, all_at_once = ask(url, *photos)
        raw = requests.post(f"{url}/predict", data=photos[0].read_bytes(), timeout=60).json()["predictions"]
    assert bare(said) == bare(wanted)
    assert (status, bare(all_at_once["predictions"])) == (200, bare(wanted))
    assert [row["file"] for row in said] == [photo.name for photo in photos]
    assert raw == [{**wanted[0], "file": "picture"}]


def test_without_full_batches_they_are_so_to_rounding(url, run, photos):
    wanted = tlx.load(run, device="cpu").predict(photos)
    for told, row in zip(ask(url, *photos)[1]["predictions"], wanted, strict=True):
        assert told["label"] == row["label"]
        assert told["probability"] == pytest.approx(row["probability"], abs=1e-5)


def test_several_tasks(several, photos):
    wanted = tlx.load(several, device="cpu").predict(photos[:3], batch=2)
    with serving(network_of(several, device="cpu"), Batches(2, is_fixed=True)) as (url, _):
        assert bare(ask(url, *photos[:3])[1]["predictions"]) == bare(wanted)


@pytest.fixture(scope="module")
def graph(run, tmp_path_factory):
    """An export of the run, with its preprocessing."""
    pytest.importorskip("onnxruntime")
    file = tmp_path_factory.mktemp("o") / "a.onnx"
    export(run, file, Options("onnx", preprocess=True))
    return file


def same_of_graph(file, url, photos):
    network = network_of(file)
    network.warm_up([1, 2, 4])
    with serving(network, Batches(4)) as (other, _):
        given, wanted = (ask(one, *photos)[1]["predictions"] for one in (other, url))
        about = [requests.get(f"{one}/model", timeout=9).json() for one in (other, url)]
    for row, own in zip(given, wanted, strict=True):
        assert (row["file"], row["label"]) == (own["file"], own["label"])
        assert row["probability"] == pytest.approx(own["probability"], abs=1e-4)
    assert [one["outputs"] for one in about] == [["class0", "class1", "class2"]] * 2


def test_an_onnx_file_says_the_same(graph, url, photos):
    same_of_graph(graph, url, photos)


@pytest.mark.slow
def test_so_does_one_that_takes_normalised_pixels(run, url, photos, tmp_path):
    pytest.importorskip("onnxruntime")
    export(run, tmp_path / "b.onnx", Options("onnx"))
    same_of_graph(tmp_path / "b.onnx", url, photos)


def test_how_many_classes(network, several, photos):
    with serving(network.telling(1)) as (url, _):
        (row,) = ask(url, photos[0])[1]["predictions"]
        assert len(row["top"]) == 1
    with pytest.raises(UserError, match="a multitask tells no ranking of classes"):
        network_of(several, device="cpu").telling(2)


# What strangers send


def header_of(width, height):
    """A PNG that says how large it is, and holds nothing."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


BAD = {
    "cut": (encoded(picture(0, size=99))[:900], 422, "damaged: it ends too early"),
    "text": (b"hello, I am no picture", 422, "not a picture: it starts with b'hello, I'"),
    "url": (b'{"url": "http://127.0.0.1/x.jpg"}', 422, "not a picture"),
    "path": (b"/etc/passwd", 422, "not a picture"),
    "zeros": (b"\0" * 200_000, 422, "not a picture"),
    "pickle": (b"\x80\x04\x95c\x00\x00\x00cos\nsystem\n", 422, "not a picture"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", 422, "not a picture"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422, "not a picture"),
    "pixels": (encoded(Image.new("L", (1001, 1000)), "PNG"), 413, "1,001 x 1,000 pixels: more than the 1 million"),
    "bomb": (header_of(60_000, 60_000), 413, "a decompression bomb"),
    "beyond": (header_of(2**31 - 1, 2**31 - 1), 413, "a decompression bomb"),
    "large": (header_of(12_000, 12_000), 413, "12,000 x 12,000 pixels: more than the 1 million that"),
    "empty": (b"", 400, "the file is empty"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_a_sentence(url, name, photos):
    content, status, why = BAD[name]
    code, said = ask(url, (f"{name}.jpg", content))
    assert (code, why in said["error"], said["error"].startswith(f"{name}.jpg: ")) == (status, True, True), said
    assert "Traceback" not in json.dumps(said)
    assert list(said["predictions"][0]) == ["file", "error"]
    assert ask(url, photos[0])[0] == 200


def test_one_bad_picture_costs_the_others_nothing(url, photos):
    files = [photos[0], ("cut.jpg", BAD["cut"][0]), photos[1], ("empty.jpg", b"")]
    code, said = ask(url, *files)
    rows = said["predictions"]
    assert (code, list(said)) == (200, ["predictions"])
    assert [("label" in row, row.get("error")) for row in rows] == [
        (True, None), (False, "damaged: it ends too early"), (True, None), (False, "the file is empty"),
    ]  # fmt: skip
    assert ask(url, files[1], files[3])[0] == 422
    assert ask(url, *[files[3]] * 2)[0] == 400


def test_names_are_said_again_and_nothing_else(url, photos, tmp_path):
    for name in ("../../etc/passwd", "<script>alert(1)</script>.jpg", "a\u2028b ü 花.jpg", "http://x/y.jpg", "x" * 400):
        code, said = ask(url, (name, photos[0].read_bytes()))
        assert (code, said["predictions"][0]["file"]) == (200, name[:255])
    body = b'--b\r\nContent-Disposition: form-data; name="f"; filename="\xff\xfe\\"\r\n\r\n' + photos[0].read_bytes()
    kind = {"content-type": "multipart/form-data; boundary=b"}
    answer = requests.post(f"{url}/predict", data=body + b"\r\n--b--\r\n", headers=kind, timeout=20)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("kind", "body", "status", "why"),
    [
        ("multipart/form-data; boundary=b", b"no form", 400, "the form cannot be read"),
        ("multipart/form-data", b"--b--", 400, "the form cannot be read: Missing boundary"),
        ("multipart/form-data; boundary=b", b"", 400, "there is no file in this form"),
        ("multipart/form-data; boundary=b", b"--b\r\nX: y\r\n\r\nz\r\n--b--\r\n", 400, "the form cannot be read"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="url"\r\n\r\nhttp://127.0.0.1/a.jpg\r\n--b--\r\n',
            400,
            "no URL is fetched",
        ),
        ("image/jpeg", b"", 400, "the file is empty"),
        ("application/json", b'{"file": "/etc/passwd"}', 422, "not a picture"),
    ],
)
def test_a_bad_body_is_a_sentence(url, kind, body, status, why):
    answer = requests.post(f"{url}/predict", data=body, headers={"content-type": kind}, timeout=20)
    assert (answer.status_code, why in answer.json()["error"]) == (status, True), answer.text


def test_too_many_files(url, photos):
    code, said = ask(url, *[photos[0]] * 17)
    assert (code, said) == (413, {"error": "more than 16 files in one request"})


def test_too_many_bytes_whether_they_are_announced_or_not(url, photos):
    """The answer comes, though most of the body was never read."""
    whole = photos[0].read_bytes() + b"\0" * 4_000_000

    def chunks():
        for at in range(0, len(whole), 65536):
            yield whole[at : at + 65536]

    for body in (whole, chunks()):
        answer = requests.post(f"{url}/predict", data=body, timeout=20)
        assert answer.status_code == 413
        assert answer.json() == {"error": "more than the 0.286102 MB that a request may have here"}
    assert ask(url, photos[0])[0] == 200


def raw_http(url, data, *, close=False):
    """What comes back of bytes that are no client's."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(data)
        if close:
            connection.shutdown(socket.SHUT_WR)
        found = b""
        while part := connection.recv(65536):
            found += part
        return found


def test_what_is_no_http(url, photos):
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
    assert raw_http(url, b"\x16\x03\x01\x02\0garbage\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert raw_http(url, head + b"Content-Length: many\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert raw_http(url, head + b"X: " + b"y" * 20_000).startswith(b"HTTP/1.1 400")
    assert raw_http(url, head + b"Content-Length: 99999999999999999999999\r\n\r\n").startswith(b"HTTP/1.1 400")
    big = head + b"Content-Length: 9999999\r\nExpect: 100-continue\r\n\r\n"
    assert raw_http(url, big).startswith(b"HTTP/1.1 413")  # before a byte was sent
    assert raw_http(url, head + b"Content-Length: 500\r\n\r\nabc", close=True) == b""  # it has gone
    for path, status in (("predict", 405), ("nothing", 404), ("docs", 404)):
        answer = requests.get(f"{url}/{path}", timeout=20)
        assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert ask(url, photos[0])[0] == 200


def test_a_head_that_never_ends_is_hung_up(network, photos, monkeypatch):
    monkeypatch.setattr(servers, "_HEAD_S", 1.0)
    with serving(network) as (url, _):
        host, port = url.removeprefix("http://").split(":")
        for word in (b"", b"POST /predict HTTP/1.1\r\nHo"):
            with socket.create_connection((host, int(port)), timeout=20) as connection:
                connection.sendall(word)
                assert connection.recv(99) == b""
        assert ask(url, photos[0])[0] == 200


# Too much, too slow, faults


class Gate:
    """A network that waits until it may."""

    def __init__(self, network):
        self.open, self.asked = threading.Event(), threading.Event()

        def run(pixels, size):
            self.asked.set()
            assert self.open.wait(30)
            return network.run(pixels, size)

        self.network = replace(network, run=run)


def test_where_there_is_too_much_to_do_who_comes_is_told_so(network, photos):
    gate = Gate(network)
    with serving(gate.network, Batches(1), replace(LIMITS, pictures=3)) as (url, service):
        answers = []
        clients = [threading.Thread(target=lambda: answers.append(ask(url, photos[0])[0])) for _ in range(3)]
        for client in clients:
            client.start()
        while service.held < 3:
            time.sleep(0.01)
        late = requests.post(f"{url}/predict", files={"file": photos[0].read_bytes()}, timeout=20)
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        assert "there is too much to do here" in late.json()["error"]
        assert requests.get(f"{url}/healthz", timeout=20).status_code == 200
        gate.open.set()
        for client in clients:
            client.join(30)
        assert answers == [200] * 3
        assert service.held == 0
        assert ask(url, photos[0])[0] == 200


def test_slow_uploads_keep_no_picture_waiting(network, photos):
    with serving(network, Batches(1), replace(LIMITS, pictures=2)) as (url, service):
        host, port = url.removeprefix("http://").split(":")
        slow = [socket.create_connection((host, int(port))) for _ in range(8)]
        for number, connection in enumerate(slow):
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx")
            if number == 6:
                while service.uploads < 7:
                    time.sleep(0.01)
                assert ask(url, photos[0])[0] == 200
        while service.uploads < 8:
            time.sleep(0.01)
        assert ask(url, photos[0])[0] == 503
        for connection in slow:
            connection.close()
        while service.uploads:
            time.sleep(0.01)
        assert ask(url, photos[0])[0] == 200


def test_what_takes_too_long(network, photos):
    gate = Gate(network)
    with serving(gate.network, Batches(1), replace(LIMITS, seconds=0.5)) as (url, service):
        code, said = ask(url, photos[0])
        assert (code, said) == (504, {"error": "the answer took more than 0.5 s"})
        gate.open.set()

        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n"
        said = raw_http(url, head + b"the beginning of a picture")
        assert said.startswith(b"HTTP/1.1 408")
        assert b'{"error": "the upload took more than 0.5 s"}' in said
        assert service.held == 0
        assert ask(url, photos[0])[0] == 200


def test_a_fault_of_the_network_is_said_without_a_trace(network, photos, capfd):
    def fails(pixels, size):
        raise RuntimeError("a secret of the machine")

    broken = replace(network, run=fails)
    with serving(broken, Batches(1)) as (url, _):
        code, said = ask(url, photos[0])
        assert (code, said) == (500, {"error": "a fault of the server, which it has logged"})
        assert requests.get(f"{url}/readyz", timeout=20).status_code == 503
        assert requests.get(f"{url}/healthz", timeout=20).status_code == 200
    assert "a secret of the machine" in capfd.readouterr().err


def test_json_has_no_nan(network, photos):
    broken = replace(network, run=lambda pixels, size: torch.full((len(pixels), 3), torch.nan))
    with serving(broken) as (url, _):
        assert ask(url, photos[0])[1]["predictions"][0]["probability"] is None


# The other routes


def test_metrics_tell_what_was_asked(network, photos):
    with serving(network, Batches(4), LIMITS) as (url, _):
        ask(url, *photos[:3], ("empty.jpg", b""))
        ask(url, ("bad.jpg", b"no"))
        requests.get(f"{url}/elsewhere/<name>", timeout=20)
        text = requests.get(f"{url}/metrics", timeout=20).text
    for line in (
        'tlx_requests_total{route="/predict",status="200"} 1.0',
        'tlx_requests_total{route="/predict",status="422"} 1.0',
        'tlx_requests_total{route="other",status="404"} 1.0',
        'tlx_pictures_total{outcome="answered"} 3.0',
        'tlx_pictures_total{outcome="refused"} 2.0',
        'tlx_request_seconds_count{route="/predict"} 2.0',
        "tlx_batch_pictures_sum 3.0",
        "tlx_pictures_held 0.0",
    ):
        assert line in text.splitlines(), line


def test_what_is_served_is_said_and_nothing_of_the_machine(url, run):
    said = requests.get(f"{url}/model", timeout=20).json()
    assert (said["network"], said["task"]) == ("timm/test_resnet", "classification")
    assert (said["outputs"], said["input"]["size"]) == (["class0", "class1", "class2"], [64, 64])
    assert said["limits"] == {"bytes": 300_000, "pixels": 1_000_000, "files": 16, "seconds": 20}
    assert str(run.parent) not in json.dumps({**said, "provenance": {**said["provenance"], "run": ""}})


def test_the_page_runs_its_own_script_alone(url):
    answer = requests.get(url, timeout=20)
    policy = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/]+='", policy["script-src"])
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", answer.text)
    assert "innerHTML" not in answer.text
    assert "onclick" not in answer.text


# Mistakes


def test_mistakes_are_one_message(run, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError, match=rf"--port {port}: nothing can be served there: Address already in use\n.*0 takes"
        ):
            servers.bound("127.0.0.1", port)
    with pytest.raises(UserError, match="there is no such address"):
        servers.bound("no-such-host.invalid", 0)
    for words, why in (
        ((tmp_path,), "neither a run's folder nor a checkpoint"),
        ((tmp_path / "gone",), "there is no such file or folder"),
        ((tmp_path / "gone.onnx",), "there is no such file"),
        ((run, "--which", "third"), '"third" is no checkpoint'),
        ((run, "--device", "cuda:77"), "cannot compute there"),
    ):
        done = invoke("serve", *words, "--port", 0)
        assert isinstance(done.exception, UserError)
        assert why in str(done.exception)
    from tlx.cli import serve as command

    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    done = invoke("serve", run)
    assert str(done.exception) == (
        "serving takes fastapi, uvicorn, python-multipart, prometheus-client, which are not installed\n"
        '  -> pip install "tlx[serve]"'
    )


def test_an_onnx_file_that_does_not_say_what_it_is(graph, tmp_path):
    import onnx

    (tmp_path / "no.onnx").write_bytes(b"no graph")
    with pytest.raises(UserError, match=r"no\.onnx: it is no ONNX file that can be used"):
        network_of(tmp_path / "no.onnx")
    proto = onnx.load(graph)
    said = {one.key: one.value for one in proto.metadata_props}
    about = json.loads(said["tlx"])
    cases = {
        "nothing": ({}, "does not say which classes and which input"),
        "other": ({"tlx": json.dumps({**about, "input": {**about["input"], "size": [32, 32]}})}, "says that it takes"),
        "code": ({"tlx": json.dumps({**about, "task": {"name": "os:system"}})}, "names a part by path"),
    }
    for name, (props, why) in cases.items():
        del proto.metadata_props[:]
        onnx.helper.set_model_props(proto, props)
        onnx.save(proto, tmp_path / f"{name}.onnx")
        with pytest.raises(UserError, match=why):
            network_of(tmp_path / f"{name}.onnx")
    with pytest.raises(UserError, match="computed on the CPU here"):
        network_of(graph, device="cuda:0")
    narrow = replace(network_of(graph), run=lambda pixels, size: torch.zeros(len(pixels), 2))
    with pytest.raises(UserError, match=r"shape \(1, 2\), and it says that they are 3"):
        narrow.warm_up([1])
