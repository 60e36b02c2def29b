"""`tlx serve`: a trained model over HTTP."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from tlx.base.errors import UserError
from tlx.cli.predict import Device, Trusted, Which, chosen
from tlx.cli.words import path

_PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
_PACKAGES |= {"prometheus_client": "prometheus-client"}
_RUN = "A run's folder, a checkpoint, a model.safetensors, or what tlx export --to onnx wrote."
_HOST = "127.0.0.1 is this machine alone, 0.0.0.0 whoever reaches it."
_BATCH = "Pictures at once, at most: those that wait go through the network together."
_FIXED = "Always full batches: a picture's numbers are those of tlx predict --batch N to the bit, whoever else asks."
_WAIT = "Milliseconds that a batch waits for pictures that are being decoded."
_QUEUE = "Pictures in the server at once; who comes then is told to come again (503)."
_TIMEOUT = "Seconds for a request: its upload (408) and its answer (504)."
_GRACE = "Seconds, when asked to stop, for what has begun."


def serve(
    run: Annotated[Path, typer.Argument(metavar="RUN|FILE.onnx", help=_RUN, parser=path)],
    host: Annotated[str, typer.Option(help=_HOST)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes one that is free.")] = 8000,
    batch: Annotated[int, typer.Option(min=1, max=1024, help=_BATCH)] = 8,
    fixed: Annotated[bool, typer.Option("--fixed-batch", help=_FIXED)] = False,
    wait_ms: Annotated[float, typer.Option(min=0, max=1000, help=_WAIT)] = 5.0,
    queue: Annotated[int, typer.Option(min=1, help=_QUEUE)] = 64,
    max_mb: Annotated[float, typer.Option(min=0.001, help="MB of a request (413).")] = 20.0,
    max_megapixels: Annotated[float, typer.Option(min=0.001, help="Millions of pixels of a picture (413).")] = 50.0,
    timeout: Annotated[float, typer.Option(min=0.1, help=_TIMEOUT)] = 30.0,
    grace: Annotated[int, typer.Option(min=1, help=_GRACE)] = 20,
    top: Annotated[int | None, typer.Option(min=1, help="Classes to tell of each picture.")] = None,
    which: Which = "best",
    device: Device = None,
    trusted: Trusted = False,
) -> None:
    """Answer pictures over HTTP, as tlx predict does, with a page to drop them on.

    POST /predict, /model, /healthz, /readyz, /metrics (Prometheus). No password: a proxy in front of it has those.
    """
    checkpoint = chosen(which)
    absent = [name for module, name in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if absent:
        what = f"serving takes {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} not installed"
        raise UserError(what, todo='pip install "tlx[serve]"')
    from tlx.serve.network import network_of
    from tlx.serve.server import bound
    from tlx.serve.server import run as answer
    from tlx.serve.service import Batches, Limits, Service

    with bound(host, port) as socket:
        network = network_of(run, which=checkpoint, device=device, trusted=trusted).telling(top)
        batches = Batches(batch, wait_ms / 1000, fixed)
        network.warm_up(batches.sizes)
        limits = Limits(int(max_mb * (1 << 20)), int(max_megapixels * 1e6), queue, timeout)
        answer(Service(network, batches, limits), socket, grace_s=grace)
