"""Files that others publish: from the caches of torch.hub and of the Hugging Face hub, else from their servers.

What is in a cache is used without asking anybody. Where no server answers, that is known within a second.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse

import huggingface_hub as hub
import torch

from tlx.base.errors import UserError
from tlx.base.files import scratch
from tlx.base.hub import hub_error, line_of
from tlx.base.location import scrubbed, without_credentials
from tlx.base.reachable import reachable

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Files of a hub repository that may hold its weights, the better one first."""

_ALONE = "no server is asked: where they are wanted there may be no network"
_alone: ContextVar[bool] = ContextVar("alone", default=False)
_ANSWER_S = 5.0
_STALLED_S = 60.0


class NotHere(UserError):
    """A file is neither in a cache nor to be had from here.

    Attributes:
        looked: where it would be.
        why: what keeps it from being downloaded.
    """

    def __init__(self, looked: Path, why: str) -> None:
        self.looked, self.why = looked, why
        super().__init__(f"not on this machine, and {why}", where=str(looked))


def from_hub(repository: str, names: Sequence[str] = WEIGHTS, revision: str | None = None) -> Path:
    """The first of the files `names` that a hub repository (``OWNER/REPO``) has, in the hub's cache.

    Raises:
        NotHere: not in the cache, and no server answers (or HF_HUB_OFFLINE is set).
        UserError: no such repository, revision or file, no access, or the download fails; nothing stays behind.
    """
    found = cached(repository, names, revision)
    if found is not None:
        return found
    server, folder = hub.constants.ENDPOINT, f"models--{repository.replace('/', '--')}"
    looked = Path(hub.constants.HF_HUB_CACHE) / folder / "snapshots" / (revision or "*") / names[0]
    if _alone.get():
        raise NotHere(looked, _ALONE)
    if hub.constants.HF_HUB_OFFLINE:
        raise NotHere(looked, "HF_HUB_OFFLINE forbids to ask a server")
    if not reachable(server):
        raise NotHere(looked, f"{without_credentials(server)} does not answer")
    try:
        return _download(repository, names, revision, looked)
    except NotHere:
        raise
    except Exception as error:  # of the hub's own HTTP client too, which changes from release to release
        where = f"{without_credentials(server)}/{repository}" + (f" at {revision}" if revision else "")
        raise hub_error(error, where) from error


def from_url(url: str) -> Path:
    """The file at `url`, in torch.hub's cache; compared with the hash in its name, if there is one.

    Raises:
        NotHere: not in the cache, and no server answers.
        UserError: the file in the cache is damaged, or the download fails; nothing stays behind.
    """
    path = torch_cache(url)
    if path.is_file():
        if not _as_named(path):
            raise UserError("damaged: its hash is not the one in its name", where=str(path), todo="delete it")
        return path
    if _alone.get():
        raise NotHere(path, _ALONE)
    if not reachable(url):
        raise NotHere(path, f"{urlparse(url).hostname} does not answer")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with scratch(path) as beside:
            with _stalled_sockets_fail():
                torch.hub.download_url_to_file(url, str(beside), _named_hash(path), progress=True)
                whole = _named_hash(path) or beside.stat().st_size == _length(url)
            if not whole:
                raise OSError("the connection ended before the file did")
            os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, URLError) and not isinstance(error, HTTPError):
            raise NotHere(path, f"{urlparse(url).hostname} cannot be asked ({error.reason})") from error
        why = f"cannot be downloaded: {scrubbed(line_of(error), url)}"
        raise UserError(why, where=without_credentials(url), todo="try again later") from error
    return path


@contextmanager
def without_network() -> Iterator[None]:
    """In here only what is on this machine counts: no server is asked, and what is missing raises NotHere."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def cached(repository: str, names: Sequence[str] = WEIGHTS, revision: str | None = None) -> Path | None:
    """The first of the files `names` of a repository that the hub's cache holds."""
    for name in names:
        found = hub.try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(found, str):
            return Path(found)
    return None


def is_repository(name: str) -> bool:
    """Whether the hub allows such a name."""
    from huggingface_hub.errors import HFValidationError  # with an HTTP client, which plans do not wait for

    try:
        hub.hf_hub_url(name, WEIGHTS[0])
    except HFValidationError:
        return False
    return True


def torch_cache(url: str) -> Path:
    """Where torch.hub keeps what it downloads from `url`."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name


def _download(repository: str, names: Sequence[str], revision: str | None, looked: Path) -> Path:
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    for name in names:
        url = hub.hf_hub_url(repository, name, revision=revision)
        try:  # asked once and briefly: the download itself would ask for minutes
            hub.get_hf_file_metadata(url, timeout=_ANSWER_S)
        except EntryNotFoundError:
            continue
        except HfHubHTTPError:
            raise
        except Exception as error:  # a proxy that refuses, a firewall that answers in place of the server
            server = hub.constants.ENDPOINT
            why = f"{without_credentials(server)} cannot be asked ({scrubbed(line_of(error), server)})"
            raise NotHere(looked, why) from error
        path = Path(hub.hf_hub_download(repository, name, revision=revision))
        _check_blob(path)
        return path
    raise EntryNotFoundError(f"this repository has no {' or '.join(names)}")


def _check_blob(path: Path) -> None:
    """A large file of the hub is a link to one that is named by its hash, which the hub's client does not compare."""
    blob = path.parent / os.readlink(path) if path.is_symlink() else path
    if re.fullmatch("[a-f0-9]{64}", blob.name) and _sha256(blob) != blob.name:
        path.unlink()
        blob.unlink()
        raise OSError("what arrived has another hash than the server announced")


def _as_named(path: Path) -> bool:
    return _sha256(path).startswith(_named_hash(path) or "")


def _named_hash(path: Path) -> str | None:
    """The hash that torch.hub's names carry: ``resnet50-11ad3fa6.pth``."""
    found = re.search(r"-([a-f0-9]{8,})\.", path.name)
    return found[1] if found else None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _length(url: str) -> int:
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD")) as answer:
        return int(answer.headers.get("Content-Length", -1))


@contextmanager
def _stalled_sockets_fail() -> Iterator[None]:
    """torch.hub waits for ever on a connection that went dead."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALLED_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
