"""Parts of a page are made one by one: what fails, or comes too late, is left out and told."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from tlx.base.errors import TlxError

Made = TypeVar("Made")

LEAST_S = 20.0
SHARE = 0.05
"""Of the time of a training."""


def limit(training_s: float | None) -> float:
    """Seconds that the report at the end of a training may take."""
    return max(LEAST_S, SHARE * (training_s or 0.0))


@dataclass
class Parts:
    """
    Attributes:
        seconds: of the whole report; infinity for as long as it takes.
        more: the command that leaves nothing out for want of time.
        left_out: what is missing, and why.
        took: seconds by part.
    """

    seconds: float
    more: str
    left_out: list[str] = field(default_factory=list)
    took: dict[str, float] = field(default_factory=dict)
    begun: float = field(default_factory=time.monotonic)

    @property
    def until(self) -> float:
        """When the time is over, of `time.monotonic`."""
        return self.begun + self.seconds

    def make(self, what: str, make: Callable[[], Made | None], *, needs_s: float = 0.0) -> Made | None:
        """A part; None where it has nothing to show, cannot be made, or is begun too late.

        Args:
            what: a noun, for people.
            needs_s: time that must be left. Parts of 0 are made in any case.
        """
        if needs_s and time.monotonic() + needs_s > self.until:
            self.left_out.append(f"{what}: the {self.seconds:.0f} s of the report were over; {self.more} draws it")
            return None
        start = time.monotonic()
        try:
            return make()
        except ImportError as error:
            name = (error.name or str(error)).partition(".")[0]
            self.left_out.append(f"{what}: {name} is not installed: pip install 'tlx[report]'")
        except TlxError as error:
            self.left_out.append(f"{what}: {error}")
        except Exception as error:  # a page without a part is better than none
            why = " ".join(str(error).split())[:300]
            self.left_out.append(f"{what}: it could not be made ({type(error).__name__}{f': {why}' if why else ''})")
        finally:
            self.took[what] = time.monotonic() - start
        return None
