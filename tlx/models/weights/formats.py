"""What a file of weights is, by its first bytes, and what people have in its place, told before any library reads it.

A name does not say what a file is: a pointer of Git LFS, a web page or an archive may lie under ``.safetensors``. What
is refused here is refused with what it is and how to get the weights; nothing is unpickled.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from tlx.base.errors import UserError
from tlx.base.terminal import escaped

Format = Literal["safetensors", "torch"]

NOT_READ = "cannot be read as weights"
"""What every refusal of a file begins with."""

SAFETENSORS, TORCH = (".safetensors",), (".pth", ".pt", ".bin", ".ckpt", ".tar")
"""Suffixes of names of weights."""

_HEAD = 4096
_LONGEST_HEADER = 100_000_000  # bytes; safetensors takes no longer one
_PICKLE_READ = 64 << 20  # bytes of a pickle that are looked through for the names of its classes
_PICKLES = 5  # in a file that torch.save wrote before it wrote zip files
_LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # the pickled number 0x1950a86a20f9469cfc6c
_AGAIN = "copy or download it again"
_SAVE = 'where it was made, save the weights alone: torch.save(model.state_dict(), "weights.pth")'

_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "it is compressed with gzip", "unpack it: gunzip FILE"),
    (b"BZh", "it is compressed with bzip2", "unpack it: bunzip2 FILE"),
    (b"\xfd7zXZ\x00", "it is compressed with xz", "unpack it: unxz FILE"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd", "unpack it: unzstd FILE"),
    (b"7z\xbc\xaf\x27\x1c", "it is a 7z archive", "unpack it and name the file of weights in it"),
    (b"Rar!", "it is a rar archive", "unpack it and name the file of weights in it"),
    (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file, as Keras writes it", "convert it to PyTorch's names and layout first"),
    (b"\x93NUMPY", "it is a NumPy array", "convert it to a state dict first"),
    (b"GGUF", "it is a GGUF file of a language model", "name a file of PyTorch weights"),
)
"""First bytes -> what the file is, what to do."""

_COMMENTS = re.compile(r"(\s|<!--.*?-->)*", re.DOTALL)
_OLD_PICKLE = re.compile(r"\(?[dl]p\d+\s|c[\w.]+\n\w+\n|\(i[\w.]+\n")
"""How a pickle of protocol 0 begins, which is text: a dict, a list, something of a module."""

_PLAIN = re.compile(
    r"collections\.(OrderedDict|defaultdict|Counter)|argparse\.Namespace|_codecs\.encode"
    r"|(builtins|__builtin__)\.(set|frozenset|bytearray|complex|slice|range)"
    r"|torch\.[A-Za-z0-9_]+|torch\.(_utils|_tensor|storage|nn\.parameter|serialization)\.\w+"
)
"""Names that a pickle of tensors and plain data holds."""


def format_of(path: Path) -> Format:
    """Which of the two formats that are read a file has.

    Raises:
        UserError: another one, none, or one that its name denies; with what the file is.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise UserError(f"{NOT_READ}: {error.strerror or error}", where=str(path)) from error
    found = _format(head)
    if found is None:
        what, todo = _instead(head, path)
        raise _refusal(path, what, todo)
    if head.startswith(b"PK"):
        _verify_archive(path)
    if found == "torch" and path.suffix in SAFETENSORS:
        name = escaped(path.with_suffix(".pth").name)
        raise _refusal(path, "it is a file of torch.save under the name of a safetensors file", f"rename it to {name}")
    if found == "safetensors" and path.suffix in TORCH:
        name = escaped(path.with_suffix(".safetensors").name)
        raise _refusal(path, "it is a safetensors file under the name of a torch file", f"rename it to {name}")
    return found


def refused(path: Path, error: BaseException) -> UserError:
    """The error for a file in a known format that its library does not read.

    Args:
        error: what the library raised.
    """
    classes = [] if path.suffix in SAFETENSORS else [name for name in _globals(path) if not _PLAIN.fullmatch(name)]
    if classes:
        more = f" and {len(classes) - 1} more" if len(classes) > 1 else ""
        what = f"it holds a pickled {escaped(classes[0])[:100]}{more}, and only tensors and plain data are read"
        return _refusal(path, what, _SAVE)
    if path.suffix not in SAFETENSORS and _is_bare(path):
        return _refusal(path, "it is a pickle that torch.save did not write", _SAVE)
    return _refusal(path, f"it is damaged ({reason(error)})", f"{_AGAIN}; or {_SAVE}")


def reason(error: BaseException) -> str:
    """What a library says, in one line: without colours, and without advice to unpickle the file."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip().removeprefix("WeightsUnpickler error:").strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not re.search("weights_only|Weights only|Check the documentation", line)]
    said = (kept or [type(error).__name__])[0]
    return escaped(re.sub(r"\. Please .*", "", said))[:300]


def _refusal(path: Path, what: str, todo: str) -> UserError:
    return UserError(f"{NOT_READ}: {what}", where=str(path), todo=todo)


def _format(head: bytes) -> Format | None:
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return "torch"
    length = int.from_bytes(head[:8], "little")
    return "safetensors" if head[8:9] == b"{" and length <= _LONGEST_HEADER else None


def _instead(head: bytes, path: Path) -> tuple[str, str]:
    """What a file is that is of neither format, and what to do."""
    if not head:
        return "it is empty (0 bytes)", _AGAIN
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"^size (\d{1,15})", head, re.MULTILINE)
        stands = f" for {int(size[1]):,} bytes" if size else ""
        return f"it is a pointer of Git LFS{stands}, not the weights", "run `git lfs pull` in the clone that it is from"
    if head.startswith(b"/annex/objects/"):
        return "it is a pointer of git-annex, not the weights", "run `git annex get FILE` in the clone that it is from"
    for magic, what, todo in _MAGIC:
        if head.startswith(magic):
            return what, todo
    if head[257:262] == b"ustar":
        return "it is a tar archive", "unpack it and name the file of weights in it"
    text = _text(head)
    if text is None:
        return f"it is no safetensors file and no file of torch.save (it begins with {head[:8].hex(' ')})", _AGAIN
    if _OLD_PICKLE.match(text):
        return "it is a pickle that torch.save did not write", _SAVE
    start = _COMMENTS.sub("", text.lower(), count=1)
    if start.startswith(("<!doctype html", "<html", "<head", "<?xml", "<!--")):
        title = re.search(r"<title[^>]*>\s*(.{1,80}?)\s*<", text, re.IGNORECASE)
        page = f' ("{escaped(title[1])}")' if title else ""
        todo = "download the file itself: an address of the hub has /resolve/ in it, not /blob/"
        return f"it is a web page (HTML){page}, not the weights", todo
    line = escaped(text.splitlines()[0][:60]) if text else ""
    return f'it is a text file, which begins with "{line}"', "name the file of weights itself, or download it again"


def _text(head: bytes) -> str | None:
    """The bytes as text; None where they are none. A letter may be cut in two at their end."""
    try:
        text = head.decode("utf-8-sig", "strict" if len(head) < _HEAD else "ignore")
    except UnicodeDecodeError:
        return None
    is_text = all(c.isprintable() or c in "\t\r\n\x0c\x1b" for c in text) and len(text) > len(head) // 4
    return text.strip() if is_text else None


def _verify_archive(path: Path) -> None:
    """
    Raises:
        UserError: an archive that torch.save did not write, or the beginning of one.
    """
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except Exception as error:  # zipfile's own, and whatever the fields of a damaged file lead to
        size = path.stat().st_size
        raise _refusal(path, f"it is damaged or cut off: its {size:,} bytes are no whole archive", _AGAIN) from error
    inside = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in inside:
        todo = 'where it was made: torch.save(torch.jit.load("FILE").state_dict(), "weights.pth")'
        raise _refusal(path, "it is a TorchScript program, which is code", todo)
    if names and all(name.endswith(".npy") for name in names):
        raise _refusal(path, "it is a NumPy archive (.npz)", "convert it to a state dict of PyTorch first")
    if "data.pkl" not in inside:
        first = escaped(", ".join(names[:3])[:100]) or "nothing"
        todo = "unpack it and name the file of weights in it"
        raise _refusal(path, f"it is a zip archive that torch.save did not write; it holds {first}", todo)


def _is_bare(path: Path) -> bool:
    """Whether a file is a pickle without the number that torch.save began its own with, before it wrote archives."""
    with path.open("rb") as file:
        head = file.read(len(_LEGACY))
    return head[:1] == b"\x80" and head != _LEGACY


def _globals(path: Path) -> list[str]:
    """Names of classes and functions that the pickles in a torch file ask for, in their order; nothing is loaded."""
    found: dict[str, None] = {}
    try:
        for pickle in _pickles(path):
            for name in _asked_for(pickle):
                found[name] = None
    except Exception:  # a damaged pickle, of which what came before its damage is known
        return list(found)
    return list(found)


def _pickles(path: Path) -> Iterator[io.BytesIO]:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            several = io.BytesIO(file.read(_PICKLE_READ))
        for _ in range(_PICKLES):  # they lie one behind the other
            yield several
        return
    with zipfile.ZipFile(path) as file:
        for part in file.infolist():
            stored = part.compress_type == zipfile.ZIP_STORED and part.file_size <= _PICKLE_READ
            if part.filename.endswith("data.pkl") and stored:
                yield io.BytesIO(file.read(part))


def _asked_for(pickle: io.BytesIO) -> Iterator[str]:
    texts: list[str] = []
    memo: dict[int, str | None] = {}
    top: str | None = None  # of the stack, where it is a text
    for operation, argument, _ in pickletools.genops(pickle):
        name = operation.name
        if name == "GLOBAL" and isinstance(argument, str):
            yield argument.replace(" ", ".", 1)
        elif name == "STACK_GLOBAL":
            yield ".".join(texts[-2:])
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" or not isinstance(argument, int) else argument] = top
            continue
        top = memo.get(argument) if name in ("BINGET", "LONG_BINGET") and isinstance(argument, int) else None
        if isinstance(argument, str) and "UNICODE" in name:
            top = argument
        if top is not None:
            texts = [*texts[-1:], top]


def listed(names: Sequence[str]) -> str:
    """The first few of names that come from a file, escaped."""
    return escaped(", ".join(names[:4]))[:400] + (" ..." if len(names) > 4 else "")
