"""A server in a thread of this process, or as a process of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from commands import free_port, start

from tlx.serve.network import Network
from tlx.serve.server import bound, server_of
from tlx.serve.service import Batches, Limits, Service


@contextmanager
def serving(network: Network, batches: Batches = Batches(), limits: Limits = Limits()) -> Iterator[tuple[str, Service]]:  # noqa: B008
    """The address of a server in a thread."""
    service, begun, urls = Service(network, batches, limits), threading.Event(), []

    def tell(url: str) -> None:
        urls.append(url)
        begun.set()

    with bound("127.0.0.1", 0) as socket:
        server = server_of(service, socket, grace_s=5, begun=tell)
        thread = threading.Thread(target=server.run, args=([socket],))
        thread.start()
        try:
            assert begun.wait(30)
            yield urls[0], service
        finally:
            server.should_exit = True
            thread.join(30)
            service.close()


@contextmanager
def process(*words: object, port: int | None = None) -> Iterator[tuple[str, object]]:
    """The address of `tlx serve WORDS`, which answers, and its process."""
    import requests

    port = port or free_port()
    begun = start("serve", *words, "--port", port)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            assert begun.poll() is None, begun.communicate()[0][-3000:]
            assert time.monotonic() < until, "it does not answer"
            try:
                assert requests.get(f"{url}/readyz", timeout=60).status_code == 200
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        yield url, begun
    finally:
        begun.kill()
        begun.communicate()
