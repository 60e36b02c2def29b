"""Equal weights are equal files, whatever order the library wrote its metadata in."""

from __future__ import annotations

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from tlx.base.tensor_header import settle, settled

NAMED = '{"name": "f\u00fcr \u5c71 \\"\\n\\t\u0001\u007f/"}'
ABOUT = {"format": "pt", "tlx": NAMED, **{f"key{i}": "x" for i in range(6)}}


def test_two_files_of_the_same_are_equal_and_read_as_before(tmp_path):
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a.weight": torch.ones(3, dtype=torch.float16)}
    contents = []
    for number in range(4):
        file = tmp_path / f"{number}.safetensors"
        save_file(tensors, file, metadata=dict(reversed(ABOUT.items()) if number % 2 else ABOUT.items()))
        size = file.stat().st_size
        settle(file)
        assert file.stat().st_size == size
        contents.append(file.read_bytes())
    assert len({*contents, settled(save(tensors, metadata=ABOUT))}) == 1
    with safe_open(tmp_path / "0.safetensors", "pt") as opened:
        assert opened.metadata() == ABOUT
    loaded = load_file(tmp_path / "0.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_file_without_metadata_stays(tmp_path):
    save_file({"a": torch.zeros(2)}, file := tmp_path / "a.safetensors")
    before = file.read_bytes()
    settle(file)
    assert file.read_bytes() == before
