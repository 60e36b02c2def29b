"""Weights, checkpoints and run folders from strangers: loaded, or refused in words; no code in them runs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import zipfile

import pytest
import torch
import toys
import yaml
from composed import claimed
from mutations import BOMB, GIB, apart, as_json, changed, kept, many, mutated, nested, odd, outcomes
from safetensors.torch import save_file
from written_runs import finish, write_run

from tlx.base.errors import TlxError, UserError
from tlx.models.weights import files as weights
from tlx.models.weights.filling import fill
from tlx.models.weights.local_weights import header
from tlx.models.weights.pretrained import choose
from tlx.plan.config import parse
from tlx.report.parts import Parts
from tlx.report.report import report
from tlx.report.run_page import html
from tlx.report.run_report import run_report
from tlx.report.run_text import cells
from tlx.runs import checkpoint
from tlx.runs.checkpoint import Checkpoints, Snapshot, optimizer_state, restore_optimizer, weights_of
from tlx.runs.history import read_history
from tlx.runs.metrics_file import read_rows
from tlx.runs.progress import Progress
from tlx.runs.run_folder import RunFolder


class Evil:
    """Its pickle touches a file when it is loaded."""

    def __init__(self, path, how="system"):
        self.path, self.how = str(path), how

    def __reduce__(self):
        if self.how == "system":
            return os.system, (f"touch {self.path}",)
        if self.how == "popen":
            return subprocess.Popen, (["touch", self.path],)
        return exec, (f"open({self.path!r}, 'w')",)


def net():
    torch.manual_seed(0)
    return toys.small(3)


def tensors():
    return {name: tensor.clone() for name, tensor in net().state_dict().items()}


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """Libraries come before the limit on memory, which they would exceed."""
    folder = tmp_path_factory.mktemp("first")
    torch.save(tensors(), folder / "w.pth")
    weights.read(folder / "w.pth")
    report([finish(write_run(folder / "run"))])


# Weights


def use(path):
    with contextlib.suppress(UserError):
        header(path)
    fill(net(), weights.opened(path), name="toys:small", heads=["fc"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".legacy.pt"])
@many(120, 833)
def test_damaged_weights(tmp_path, suffix, count):
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(tensors(), path)
    else:
        torch.save(tensors(), path, _use_new_zipfile_serialization=suffix == ".pth")
    good = path.read_bytes()
    use(path)

    def try_all():
        rng = random.Random(1)

        def one(data):
            path.write_bytes(data)
            use(path)

        return outcomes((mutated(rng, good, head=rng.choice((None, 600))) for _ in range(count)), one)

    kept(apart(try_all, memory=2 * GIB, seconds=600), "refused")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors"])
@pytest.mark.parametrize("how", ["system", "popen", "exec"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_no_code_in_weights_runs(tmp_path, suffix, how, kind):
    path, ran = tmp_path / f"w{suffix}", tmp_path / "ran"
    content = {**tensors(), "x": Evil(ran, how)}
    if kind == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match="cannot be read as weights"):
        weights.read(path)
    assert not ran.exists()


def safetensors_of(said, data=b""):
    text = said if isinstance(said, bytes) else json.dumps(said).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, start, stop):
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


SAFETENSORS = {
    "a header of 2 to the 60 bytes": struct.pack("<Q", 1 << 60) + b"{}",
    "a header of 90 MB that is not there": struct.pack("<Q", 90_000_000) + b"{}",
    "a tensor of 2 to the 60 bytes": safetensors_of({"w": entry([1 << 60], 0, 1 << 60)}),
    "a shape that is larger than its data": safetensors_of({"w": entry([1 << 40], 0, 4)}, bytes(4)),
    "a shape whose product overflows": safetensors_of({"w": entry([1 << 32, 1 << 32], 0, 0)}),
    "offsets that overlap": safetensors_of({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4)),
    "offsets that go back": safetensors_of({"w": entry([1], 4, 0)}, bytes(4)),
    "deep nesting": safetensors_of(b"[" * 100_000),
    "nothing": b"",
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors_that_claim_what_they_are_not(tmp_path, name):
    path = tmp_path / "w.safetensors"
    path.write_bytes(SAFETENSORS[name])

    def one():
        with pytest.raises(UserError):
            weights.read(path)

    apart(one)


def test_tensors_larger_than_their_file(tmp_path):
    """One number that says it is a trillion, by a stride of zero: whoever copies it takes four terabytes."""
    state = tensors()
    for name, tensor in {
        "repeated": torch.zeros(1).expand(10**12),
        "half": torch.zeros(1).half().expand(10**12),
        "sparse": torch.zeros(3, 3).to_sparse(),
        "empty": torch.empty(10**12, device="meta"),
    }.items():
        state["features.0.0.weight"] = tensor
        path = tmp_path / f"{name}.pth"
        torch.save(state, path)
        assert path.stat().st_size < 100_000

        def one(path=path):
            with pytest.raises(UserError, match=r"tensors without values of their own \(features.0.0.weight\)"):
                use(path)

        apart(one)
    state["features.0.0.weight"] = tensors()["features.0.0.weight"][:1].expand(8, 3, 3, 3)  # small ones are taken
    torch.save(state, tmp_path / "w.pth")
    use(tmp_path / "w.pth")


def compressed(content, path):
    """As torch.save never writes it, and torch.load would read it all the same."""
    plain = io.BytesIO()
    torch.save(content, plain)
    with zipfile.ZipFile(plain) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))


def test_compressed_weights_are_not_unpacked(saved, tmp_path):
    compressed({"w": torch.zeros(1 << 28, dtype=torch.uint8)}, tmp_path / "w.pth")
    assert (tmp_path / "w.pth").stat().st_size < 1 << 20
    shutil.copy(tmp_path / "w.pth", saved / "step-00000002" / "optimizer.pt")
    sign(saved / "step-00000002")

    def one():
        with pytest.raises(UserError, match="compressed"):
            weights.read(tmp_path / "w.pth")
        with pytest.raises(TlxError, match="compressed"):
            load_checkpoint(saved)

    apart(one, memory=128 << 20)


@pytest.mark.parametrize(
    "content",
    [{1: torch.zeros(1)}, {(1, "a"): torch.zeros(1)}, {None: 1}, [], None, 3, {"state_dict": {}}, {"a": {"b": 1}}],
)
def test_things_that_are_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError):
        use(tmp_path / "w.pth")


class Library:
    """As much of a source of networks as `choose` looks at."""

    name, ships_weights = "toys/small", False

    @staticmethod
    def tags():
        return ("a1",)


@pytest.mark.parametrize(
    "name",
    ["~nobody-has-this-name/x", "x\0y/z", "x" * 5000, "a/" * 3000, "hf-hub:../x", "hf-hub:a/b;touch ran", "", "."],
)
def test_odd_names_of_weights(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for work in (weights.read, lambda said: choose(Library, said).state(Library, {})):
        with pytest.raises(UserError):
            work(name)
    assert not list(tmp_path.iterdir())


# Run folders


@pytest.fixture
def run(tmp_path):
    return finish(write_run(tmp_path / "run"))


FILES = ("status.json", "result.json", "config.yaml", "metrics.jsonl", "plan.json")


def told(run, *, drawn):
    """As `tlx report` does; figures take seconds, and so are not always drawn."""
    with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO(), "utf-8")) as output:
        if drawn:
            report([run])
        else:
            history = read_history(run)
            html(run_report(history, history.name, Parts(0.0, ""), network=None)).encode()
            print(*cells(history, history.name), file=output)


@many(15, 500)
def test_damaged_files_of_a_run_in_a_report(run, count):
    good = {name: (run / name).read_bytes() for name in FILES}
    kinds = {name: json.loads(data) for name, data in good.items() if name.endswith(".json")}

    def case(rng):
        name = rng.choice(FILES)
        if rng.random() < 0.6 and name in kinds:
            return name, as_json(changed(rng, kinds[name]))
        if rng.random() < 0.6 and name == "metrics.jsonl":
            rows = [
                changed(rng, json.loads(line)) if rng.random() < 0.3 else json.loads(line)
                for line in good[name].splitlines()
            ]
            return name, b"\n".join(map(as_json, rows))
        return name, mutated(rng, good[name])

    def try_all():
        rng = random.Random(2)

        def one(case):
            for name, data in good.items():
                (run / name).write_bytes(data)
            (run / case[0]).write_bytes(case[1])
            told(run, drawn=rng.random() < (0.05 if count < 100 else 0.2))
            RunFolder(run).say("running")

        return outcomes((case(rng) for _ in range(count)), one)

    kept(apart(try_all, memory=2 * GIB, seconds=1800), "fine")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("result.json", b"[" * 10**5),
        ("metrics.jsonl", b"[" * 10**5 + b"\n"),
        ("metrics.jsonl", b'{"step": ' + b"9" * 10**6 + b"}\n"),
        ("metrics.jsonl", b'{"step": 1e308, "epoch": 1e-308, "phase": "\\ud800", "val/top1": 1e400}\n'),
        ("metrics.jsonl", b'{"step": 5, "epoch": 1e-320, "val/top1": 0.5}\n'),
        ("metrics.jsonl", b'{"step": 5, "phase": "a", "train/loss": 1e308}\n{"step": 6, "train/loss": -1e308}\n'),
        ("status.json", b'{"status": "\\ud800"}'),
        ("status.json", b'{"status": ' + b"9" * 10**6 + b"}"),
        ("config.yaml", BOMB.encode() + b"\nevaluate: {metric: *a24}\n"),
        ("config.yaml", b"evaluate: {metric: 2020-99-99}\n"),
        ("config.yaml", b"evaluate: &a {metric: *a}\n"),
        ("config.yaml", b"evaluate: {metric: " + b"9" * 5000 + b"}\n"),
        ("config.yaml", b"[" * 10**5),
        ("config.yaml", b"!!python/object/apply:os.system ['touch ran']"),
        ("config.yaml", b"\xff\xfe\0"),
    ],
    ids=range(15),
)
def test_hostile_files_of_a_run(run, monkeypatch, name, content):
    monkeypatch.chdir(run)
    (run / name).write_bytes(content)

    def one():
        (run / "result.json").unlink() if name != "result.json" else None
        told(run, drawn=name == "metrics.jsonl")
        return True

    assert apart(one, seconds=60)
    assert not (run / "ran").exists()
    if name == "metrics.jsonl":
        assert len(read_rows(run / name)) <= 2
        read_history(run)


def config(run):
    return parse(
        {
            "run": str(run),
            "data": {"train": "x", "batch": 2},
            "backbone": {"name": "toys:small"},
            "phases": {"each": {"lr": 1}},
        }
    )


@many(60, 333)
def test_damaged_files_of_a_run_that_is_gone_on_with(tmp_path, count):
    wanted = config(tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    claimed(folder, wanted)
    folder.say("running")
    folder.release()
    said = (tmp_path / "run" / "config.yaml").read_bytes()
    result = {"finished": False, "name": "x"}

    def try_all():
        rng = random.Random(3)

        def one(case):
            for name, data in {"config.yaml": said, "result.json": as_json(result), **case}.items():
                (tmp_path / "run" / name).write_bytes(data)
            again = RunFolder(tmp_path / "run")
            try:
                claimed(again, wanted)
                again.say("running")
            finally:
                again.release()

        def case():
            kind = rng.randrange(4)
            if kind == 0:
                return {"config.yaml": yaml.safe_dump(changed(rng, yaml.safe_load(said))).encode()}
            if kind == 1:
                return {"config.yaml": mutated(rng, said)}
            return {rng.choice(("result.json", "status.json")): as_json(changed(rng, {**result, "id": "x"}))}

        named = [{"config.yaml": BOMB.encode()}, {"config.yaml": b"a: &a [*a]"}, {"config.yaml": b"2020-99-99"}]
        named += [
            {"config.yaml": b"[" * 10**5},
            {"config.yaml": b"{1: 2, a: 3, [1, 2]: 4}"},
            {"status.json": b"[" * 10**5},
        ]
        named += [
            {"result.json": b"[" * 10**5},
            {"result.json": b"9" * 10**5},
            {"config.yaml": b"\xff"},
            {"config.yaml": b""},
        ]
        return outcomes([*named, *(case() for _ in range(count))], one)

    kept(apart(try_all, seconds=600))


# Checkpoints


def snapshot(step):
    model = net()
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "names": names}], lr=1e-3)
    model(torch.zeros(2, 3, 16, 16)).sum().backward()
    optimizer.step()
    state = {"step": step, "best": None, "progress": Progress(step=step).data(), "scaler": None, "metrics_bytes": 0}
    state |= {"identity": {"classes": ["a", "b"]}, "dealt": {}, "decoder": "x"}
    return Snapshot(weights_of(model), optimizer_state(optimizer), state, ema=weights_of(model))


@pytest.fixture
def saved(tmp_path):
    Checkpoints(tmp_path / "c").save(1, snapshot(1))
    Checkpoints(tmp_path / "c").save(2, snapshot(2))
    return tmp_path / "c"


def sign(path):
    """What a stranger can do, too: the hashes of what is there."""
    try:
        state = json.loads((path / "state.json").read_bytes())
        state["files"] = {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.iterdir()) if p.name != "state.json"
        }
        state.pop("sha256", None)
        (path / "state.json").write_text(json.dumps({**state, "sha256": checkpoint._hash_of(state)}))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass


def load_checkpoint(folder):
    """As a resume does, without a world."""
    path = Checkpoints(folder).newest(lambda _: None)
    assert path is not None
    taken = checkpoint.read(path)
    model = net()
    names = [name for name, _ in model.named_parameters()]
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "names": names}], lr=1e-3)
    with checkpoint.understood(path):
        model.load_state_dict(taken.model, strict=True)
        restore_optimizer(optimizer, taken.optimizer)
        Progress.of(taken.state["progress"])
        taken.state["identity"]["classes"]
    return path


@pytest.mark.parametrize("signed", [False, True])
@many(60, 400)
def test_damaged_checkpoints(saved, signed, count):
    newest = saved / "step-00000002"
    good = {p.name: p.read_bytes() for p in newest.iterdir()}
    state = json.loads(good["state.json"])

    def try_all():
        rng = random.Random(4)
        back = 0

        def one(case):
            nonlocal back
            for name, data in good.items():
                (newest / name).write_bytes(data)
            (newest / case[0]).write_bytes(case[1])
            if signed:
                sign(newest)
            back += load_checkpoint(saved).name != newest.name

        def case():
            name = rng.choice((*good, "state.json"))
            if name == "state.json" and rng.random() < 0.7:
                return name, as_json(changed(rng, state))
            return name, mutated(rng, good[name], head=rng.choice((None, 500)))

        seen = outcomes((case() for _ in range(count)), one)
        seen["gone back"] = back
        return seen

    kept(apart(try_all, memory=2 * GIB, seconds=900), "gone back", *(["fine", "refused"] if signed else ["fine"]))


@pytest.mark.parametrize("how", ["system", "popen", "exec"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_no_code_in_a_checkpoint_runs(saved, tmp_path, how, kind):
    newest, ran = saved / "step-00000002", tmp_path / "ran"
    for name in ("optimizer.pt", "model.safetensors", "ema.safetensors"):
        before = (newest / name).read_bytes()
        content = {"fc.weight": {"step": Evil(ran, how)}}
        if kind == "plain":
            (newest / name).write_bytes(pickle.dumps(content))
        else:
            torch.save(content, newest / name, _use_new_zipfile_serialization=kind == "zip")
        sign(newest)
        with pytest.raises(TlxError, match="not a checkpoint of this training"):
            load_checkpoint(saved)
        assert not ran.exists()
        (newest / name).write_bytes(before)


@pytest.mark.parametrize("name", SAFETENSORS)
def test_checkpoints_that_claim_what_they_are_not(saved, name):
    newest = saved / "step-00000002"
    (newest / "model.safetensors").write_bytes(SAFETENSORS[name])
    sign(newest)

    def one():
        with pytest.raises(TlxError):
            load_checkpoint(saved)

    apart(one)


@pytest.mark.parametrize("key", ["format", "files", "sha256", "progress", "identity", "step", "best", "metrics_bytes"])
def test_keys_that_are_missing_or_odd(saved, key):
    newest = saved / "step-00000002"
    good = json.loads((newest / "state.json").read_bytes())

    def try_all():
        rng = random.Random(5)

        def one(value):
            state = {k: v for k, v in good.items() if k != key} | ({key: value} if value is not KeyError else {})
            (newest / "state.json").write_bytes(as_json(state))
            if key not in ("files", "sha256"):
                sign(newest)
            load_checkpoint(saved)

        return outcomes([KeyError, nested(900), {"../../x": "0"}, *(odd(rng) for _ in range(20))], one)

    apart(try_all)


def test_names_in_a_checkpoint_lead_nowhere(saved, tmp_path):
    """A checkpoint's list of files, and its folder, name nothing outside of it."""
    newest = saved / "step-00000002"
    state = json.loads((newest / "state.json").read_bytes())
    (tmp_path / "secret").write_text("x")
    digest = hashlib.sha256(b"x").hexdigest()
    state["files"] = {"../../secret": digest, str(tmp_path / "secret"): digest}
    state.pop("sha256")
    (newest / "state.json").write_text(json.dumps({**state, "sha256": checkpoint._hash_of(state)}))
    assert Checkpoints(saved).newest(lambda _: None) == saved / "step-00000001"


def test_tensors_of_an_optimizer_larger_than_their_file(saved):
    newest = saved / "step-00000002"
    for value in (
        torch.zeros(1).expand(10**12),
        torch.zeros(1).expand(3, 32, 10**9),
        torch.empty(10**12, device="meta"),
    ):
        torch.save({"fc.weight": {"exp_avg": value}}, newest / "optimizer.pt")
        sign(newest)

        def one():
            with pytest.raises(TlxError):
                load_checkpoint(saved)

        apart(one)
    shutil.rmtree(saved)
