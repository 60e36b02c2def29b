"""The store where ranks meet: how they tell rank 0 what each has found, before they can compute together."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tlx.base.errors import TlxError
from tlx.doctor.findings import named

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


@dataclass(frozen=True)
class Wire:
    """The store where ranks meet, and how long to wait there."""

    store: Store
    rank: int
    size: int
    limit: timedelta

    @classmethod
    def join(cls, wait_s: float) -> Wire:
        """As training does, without comparing what the ranks were given: what they found comes first.

        Raises:
            TlxError: not all ranks joined in time.
        """
        from tlx.ranks.rendezvous import rendezvous_store

        limit = timedelta(seconds=wait_s)
        return cls(*rendezvous_store(limit), limit)

    def to_main(self, topic: str, value: Any) -> list[Any] | None:
        """Every rank's value by rank, on rank 0; None elsewhere.

        Raises:
            TlxError: a rank did not join so far.
        """
        import torch.distributed as dist

        self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        if self.rank:
            return None
        try:
            self.store.wait([f"{topic}/{rank}" for rank in range(self.size)], self.limit)
        except dist.DistError as error:
            raise TlxError(f"{named(self.missing(topic))} said nothing within {self.limit.seconds} s") from error
        return list(self.said(topic).values())

    def from_main(self, topic: str, value: Any = None) -> Any:
        """Rank 0's value, everywhere."""
        if self.rank == 0:
            self.store.set(topic, json.dumps(value))
            return value
        return json.loads(self.store.get(topic))

    def missing(self, topic: str) -> list[int]:
        """Ranks that have said nothing on a topic."""
        return [rank for rank in range(self.size) if not self.store.check([f"{topic}/{rank}"])]

    def said(self, topic: str) -> dict[int, Any]:
        """What ranks have said on a topic so far."""
        absent = set(self.missing(topic))
        return {r: json.loads(self.store.get(f"{topic}/{r}")) for r in range(self.size) if r not in absent}

    def part(self) -> None:
        """Nobody needs rank 0's store any more."""
        self.store.set(f"bye/{self.rank}", "")
        if self.rank == 0:
            with suppress(RuntimeError):  # a rank that has died needs it no more
                self.store.wait([f"bye/{rank}" for rank in range(self.size)], timedelta(seconds=10))
