"""A process on a terminal that is emulated: what a person would see of it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence

import pyte


class Screen:
    """Starts a command whose terminal has so many columns and lines, and keeps what it shows.

    Args:
        own: variables that a person has set for the terminal, such as TERM.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        *,
        columns: int,
        lines: int = 40,
        own: Mapping[str, str] | None = None,
    ) -> None:
        self.shown = b""
        self._screen = pyte.HistoryScreen(columns, lines, history=2000, ratio=1.0)
        self._stream = pyte.ByteStream(self._screen)
        self._master, slave = pty.openpty()
        self.resize(columns, lines)
        told = ("TERM", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
        env = {k: v for k, v in env.items() if k not in told} | {"TERM": "xterm-256color", **(own or {})}
        self.process = subprocess.Popen(
            command, env=env, stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)

    def resize(self, columns: int, lines: int) -> None:
        """The window is drawn larger or smaller."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self._screen.resize(lines, columns)
        if hasattr(self, "process"):
            os.kill(self.process.pid, signal.SIGWINCH)

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def until(self, is_there: Callable[[str], bool], *, timeout_s: float = 60) -> str:
        """Takes what comes until the visible lines hold something; these."""
        deadline = time.monotonic() + timeout_s
        while not is_there(self.text) and self.take():
            assert time.monotonic() < deadline, self.text
        return self.text

    def ended(self, *, timeout_s: float = 120) -> str:
        """Takes what comes to the end of the process; everything that is left, also what has scrolled away."""
        deadline = time.monotonic() + timeout_s
        while self.take():
            assert time.monotonic() < deadline, self.text
        self.process.wait(10)
        os.close(self._master)
        return self.whole

    @property
    def text(self) -> str:
        """The visible lines."""
        return "\n".join(line.rstrip() for line in self._screen.display).rstrip()

    @property
    def whole(self) -> str:
        """With the lines that have scrolled away."""
        gone = ["".join(row[x].data for x in range(self._screen.columns)) for row in self._screen.history.top]
        return "\n".join([*(line.rstrip() for line in gone), self.text])

    def take(self, wait_s: float = 0.05) -> bool:
        """Takes what there is; whether there may be more."""
        if not select.select([self._master], [], [], wait_s)[0]:
            return self.process.poll() is None
        try:
            new = os.read(self._master, 1 << 16)
        except OSError:  # the other end is closed
            return False
        self.shown += new
        self._stream.feed(new)
        return bool(new)
