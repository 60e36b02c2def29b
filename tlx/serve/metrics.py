"""What the server counts, for Prometheus. A registry of its own: two servers in a process do not disturb each other."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """
    Attributes:
        requests: by route and status.
        pictures: by outcome: answered, refused.
        seconds: of a request, by route, from its head to the end of its answer.
    """

    def __init__(self, most: int) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("tlx_requests", "Requests.", ["route", "status"], registry=self.registry)
        self.pictures = Counter("tlx_pictures", "Pictures.", ["outcome"], registry=self.registry)
        self.seconds = Histogram(
            "tlx_request_seconds", "Seconds of a request.", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self._network = Histogram(
            "tlx_network_seconds", "Seconds of a batch in the network.", buckets=_SECONDS, registry=self.registry
        )
        sizes = [size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if size < most]
        self._batches = Histogram(
            "tlx_batch_pictures", "Pictures of a batch.", buckets=(*sizes, most), registry=self.registry
        )
        ProcessCollector(registry=self.registry)

    def batch(self, count: int, seconds: float) -> None:
        self._batches.observe(count)
        self._network.observe(seconds)

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A number that is looked up whenever somebody asks."""
        Gauge(name, about, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
