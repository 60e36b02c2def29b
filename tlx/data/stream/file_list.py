"""Pictures in files of their own, or in memory, for predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tlx.base.terminal import escaped
from tlx.data.stream.reader import MACHINES, ReadError


@dataclass(frozen=True)
class FileList:
    """Files in an order; a sample's id is its place in it.

    Attributes:
        location: what people call all of them.
    """

    paths: Sequence[str]
    location: str

    def __len__(self) -> int:
        return len(self.paths)

    def describe(self, sample: int) -> str:
        """A file's path, for people."""
        return escaped(self.paths[sample])

    def read(self, sample: int) -> bytes:
        """
        Raises:
            ReadError: it is not there, or cannot be read.
        """
        try:
            with open(self.paths[sample], "rb") as file:
                return file.read()
        except OSError as error:
            if error.errno in MACHINES:
                raise
            raise ReadError(f"the file cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ReadError("no file can have this name") from error


@dataclass(frozen=True)
class InMemory:
    """Encoded pictures in memory; a sample's id is its place among them.

    Attributes:
        location: what people call all of them.
    """

    contents: Sequence[bytes]
    location: str

    def __len__(self) -> int:
        return len(self.contents)

    def describe(self, sample: int) -> str:
        return escaped(self.location)

    def read(self, sample: int) -> bytes:
        return self.contents[sample]
