"""What people have in place of a file of weights is named, with what to do; nothing of it is unpickled."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from safetensors.torch import save_file

from tlx import models
from tlx.base.errors import TlxError, UserError
from tlx.models.weights import files as weights
from tlx.models.weights.formats import reason
from tlx.models.weights.local_weights import header
from tlx.runs.checkpoint import understood

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 11448352\n"
PAGE = b"\n<!DOCTYPE html>\n<html lang=en><head>\n<title>Sign in to the network</title></head></html>"


def packed(names: list[str]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for name in names:
            file.writestr(name, b"x")
    return data.getvalue()


def tarred() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as file:
        file.addfile(tarfile.TarInfo("weights.pth"))
    return data.getvalue()


def of_numpy() -> bytes:
    data = io.BytesIO()
    np.savez(data, kernel=np.zeros(2))
    return data.getvalue()


ACCIDENTS = {
    "nothing": (b"", "it is empty (0 bytes)", "download it again"),
    "git lfs": (LFS, "it is a pointer of Git LFS for 11,448,352 bytes, not the weights", "git lfs pull"),
    "git annex": (b"/annex/objects/SHA256E-s4--ab.pth\n", "it is a pointer of git-annex", "git annex get"),
    "a page": (PAGE, 'it is a web page (HTML) ("Sign in to the network")', "/resolve/"),
    "a page behind a comment": (b"<!-- saved\nby a tool -->\n<!-- -->" + PAGE, "it is a web page (HTML)", "/resolve/"),
    "a pickle in letters": (pickle.dumps({"w": [1.0]}, protocol=0), "it is a pickle that torch.save did", "state_dict"),
    "a list so": (pickle.dumps([1.0], protocol=0), "it is a pickle that torch.save did not write", "state_dict"),
    "text": (
        b"Entry \x1b[31mnot\x1b[0m found\n",
        r'it is a text file, which begins with "Entry \x1b[31mnot',
        "file of",
    ),
    "json": (b'{"error": "Repository not found"}', "it is a text file", "name the file of weights itself"),
    "gzip": (gzip.compress(bytes(99)), "it is compressed with gzip", "gunzip"),
    "tar": (tarred(), "it is a tar archive", "unpack it"),
    "numpy": (of_numpy(), "it is a NumPy archive (.npz)", "convert it"),
    "torchscript": (packed(["net/data.pkl", "net/constants.pkl"]), "it is a TorchScript program", "torch.jit.load"),
    "zip": (
        packed(["photos/1.jpg"]),
        "it is a zip archive that torch.save did not write; it holds photos/1.jpg",
        "unp",
    ),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(9), "it is an HDF5 file, as Keras writes it", "convert it"),
    "noise": (bytes(range(200, 232)), "it begins with c8 c9 ca cb cc cd ce cf", "download it again"),
}


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        weights.read(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: cannot be read as weights: ")
    assert "weights_only" not in text
    assert "\x1b" not in text
    assert "\n  -> " in text
    return text


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin", ""])
@pytest.mark.parametrize("name", ACCIDENTS)
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, name: str, suffix: str) -> None:
    content, what, todo = ACCIDENTS[name]
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    text = refusal(path)
    assert what in text.partition("\n")[0]
    assert todo in text.partition("\n")[2]


def test_whoever_looks_at_the_header_first_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(LFS)
    for look in (header, lambda file: models.load("toys:small", classes=3, weights=str(file), empty=True)):
        with pytest.raises(UserError, match=r"w\.safetensors: cannot be read as weights: it is a pointer of Git LFS"):
            look(path)


def test_a_format_under_the_other_ones_name(tmp_path: Path) -> None:
    state = dict(toys.small(3).state_dict())
    torch.save(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.safetensors", _use_new_zipfile_serialization=False)
    for name in ("a", "b"):
        text = refusal(tmp_path / f"{name}.safetensors")
        assert "it is a file of torch.save under the name of a safetensors file" in text
        assert f"rename it to {name}.pth" in text
    save_file(state, tmp_path / "c.pth")
    assert "it is a safetensors file under the name of a torch file\n  -> rename it to c.safetensors" in refusal(
        tmp_path / "c.pth"
    )
    (tmp_path / "c.pth").rename(tmp_path / "c")  # a name that says nothing
    assert weights.read(tmp_path / "c").keys() == state.keys()


class Options:
    """What a training script may save beside its weights."""


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle of old", "pickle of now"])
def test_pickled_objects_are_named_and_not_made(tmp_path: Path, kind: str) -> None:
    path, content = tmp_path / "w.pth", {"model": dict(toys.small(3).state_dict()), "args": Options()}
    if kind.startswith("pickle"):
        path.write_bytes(pickle.dumps({"args": Options()}, protocol=2 if kind.endswith("old") else 4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    text = refusal(path)
    assert f"it holds a pickled {__name__}.Options, and only tensors and plain data are read" in text
    assert 'torch.save(model.state_dict(), "weights.pth")' in text


def test_a_pickled_network_is_named_by_its_own_class(tmp_path: Path) -> None:
    torch.save(toys.small(3), tmp_path / "w.pth")
    assert "it holds a pickled toys.Small and 6 more, and only tensors" in refusal(tmp_path / "w.pth")


def test_names_in_a_pickle_are_shown_escaped(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"\x80\x02c\x1b[31mevil\nThing\n.")
    assert r"it holds a pickled \x1b[31mevil.Thing, and" in refusal(tmp_path / "w.pth")


def test_a_pickle_of_tensors_that_torch_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"w": [1.0]}))
    assert "it is a pickle that torch.save did not write" in refusal(tmp_path / "w.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".legacy.pth"])
def test_a_file_that_was_cut_off(tmp_path: Path, suffix: str) -> None:
    path, state = tmp_path / f"w{suffix}", dict(toys.small(3).state_dict())
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pth")
    path.write_bytes(path.read_bytes()[:-1000])
    text = refusal(path)
    assert "it is damaged" in text
    assert "download it again" in text


def test_advice_to_unpickle_is_never_passed_on() -> None:
    said = (
        "Weights only load failed. This file can still be loaded, to do so you have two options, \x1b[1mdo those "
        "steps only if you trust the source of the checkpoint\x1b[0m.\n\t(1) Re-running `torch.load` with "
        "`weights_only` set to `False` will likely succeed.\n\tWeightsUnpickler error: Unsupported operand 149. "
        "Please file an issue.\n"
    )
    assert reason(pickle.UnpicklingError(said)) == "Unsupported operand 149"
    assert reason(pickle.UnpicklingError("")) == "UnpicklingError"
    with (
        pytest.raises(TlxError, match=r"step-1: .* \(UnpicklingError: Unsupported operand 149\)"),
        understood(Path("step-1")),
    ):
        raise pickle.UnpicklingError(said)


def test_a_folder_whose_name_begins_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration has filled in what `~` stands for; what is left of it is a name."""
    from tlx.models.weights.fetch import fetch
    from tlx.plan.config import parse
    from tlx.train.components import backbone_of

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "~x"
    folder.mkdir()
    state = dict(toys.small(3).state_dict())
    torch.save(state, folder / "w.pth")
    backbone = {"name": "toys:small", "weights": "./~x/w.pth"}
    config = parse({"run": "r", "data": {"train": "t", "batch": 4}, "backbone": backbone})
    found = backbone_of(config, 3).module.state_dict()
    assert torch.equal(found["features.0.0.weight"], state["features.0.0.weight"])
    save_file({"w": torch.zeros(1)}, folder / "timm--test_vit.r160_in1k.safetensors")
    (fetched,) = fetch(["timm/test_vit"], Path("~x"))
    assert fetched.kept
    assert fetched.path == Path("~x/timm--test_vit.r160_in1k.safetensors")
