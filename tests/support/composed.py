"""Runs in this process, composed as `tlx train` composes them: a test can look into one and break it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tlx.plan.config import Config, parse
from tlx.ranks.rendezvous import join_ranks
from tlx.runs.run_folder import Claim, RunFolder
from tlx.train import command as training
from tlx.train.run import Run


def claimed(folder: RunFolder, config: Config, **how: Any) -> Claim:
    """The folder of a run, made this process's as a training does that has nothing else to look at."""
    claim = folder.look(config, **how)
    if claim.result is None:
        folder.claim(claim)
    return claim


def raw_of(shards: Path, run: Path | str, **over: Any) -> dict[str, Any]:
    """The configuration of a short training of one rank on the small network; it draws no report, unless it says so."""
    track = {"report": False, **over.pop("track", {})}
    return {
        "run": str(run),
        "data": {"train": str(shards / "train"), "val": str(shards / "val"), "batch": 8, "workers": 0},
        "input": {"size": 16},
        "backbone": {"name": "toys:small", "weights": "none"},
        "phases": {"each": {"lr": 0.02, "duration": "2ep"}},
        "world": {"device": "cpu"},
        "track": track,
        **over,
    }


def finished(raw: dict[str, Any]) -> Path:
    """The folder of a training that nothing happened to, for the fixture of a module."""
    with pytest.MonkeyPatch.context() as patched:
        patched.delenv("RANK", raising=False)
        training.train(parse(raw))
    return Path(raw["run"])


def composer(shards: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, **usual: Any) -> Callable[..., Run]:
    """Makes a run of one rank on the small network, as often as it is called; the same folder resumes.

    What a run would tell people is in its `notes`.

    Args:
        folder: the run's, where a call names no other one.
        usual: settings of the configuration, before those of a call.
    """
    monkeypatch.delenv("RANK", raising=False)

    def compose(run: Path | str = folder, **over: Any) -> Run:
        config = parse(raw_of(shards, run, **{**usual, **over}))
        alone = join_ranks(config)
        place = RunFolder(config.run)
        claimed(place, config)
        try:
            made = training.compose(config, alone, place)
            for name, text in made.files.items():
                (place.path / name).write_text(text)
        finally:
            place.release()
        made.stop.close()
        made.notes = []
        monkeypatch.setattr(made.journal.console, "note", made.notes.append)
        made.saver.say = made.notes.append
        return made

    return compose


def two_phases(shards, run, **over):
    """Two epochs of the head, then two of everything, at a constant rate; dropout, AdamW's moments, moving norms."""
    phases = {"each": {"lr": 0.02}, "feature_extraction": {"duration": "2ep"}, "fine_tuning": {"duration": "2ep"}}
    own = {
        "seed": 5,
        "backbone": {"name": "toys:small", "weights": "none", "args": {"dropout": 0.1}},
        "track": {"every": 1},
    }
    return raw_of(shards, run, **{**own, **over, "phases": {**phases, **over.get("phases", {})}})


def train(raw, **how):
    """As `tlx train` does."""
    return training.train(parse(raw), **how)


def weights(run):
    """Of the latest checkpoint."""
    return load_file(run / "checkpoints" / "latest" / "model.safetensors")


SMALLEST = {"run": "x", "data": {"train": "x", "batch": 1}, "backbone": {"name": "toys:small"}}


def smallest_config(**over):
    """What has no defaults, of data that nobody reads."""
    return parse({**SMALLEST, **over})
