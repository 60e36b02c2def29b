"""Files as strangers would make them: valid ones damaged in many ways, and what becomes of those who read them.

Work is done in a forked child under a limit on memory and time, so that a blow-up, a hang and a crash are failures of
the test that asked for it, not of the tests beside it.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import signal
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import psutil
import pytest

from tlx.base.errors import TlxError

GIB = 1 << 30
INTERESTING = (b"\0", b"\xff", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"../", b"/etc/passwd", b"%s%n")
WORDS = (b"-1", b"0", b"9" * 30, b"9" * 5000, b"1e999", b"NaN", b"Infinity", b"null", b"true", b"[", b"{", b'"', b"}")


def mutated(rng: random.Random, data: bytes, *, head: int | None = None) -> bytes:
    """Some bytes changed, missing, doubled, moved or added; `head`: more often within so many at the beginning."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        end = min(head, len(out)) if head and rng.random() < 0.7 else len(out)
        at, length = rng.randrange(max(end, 1)), rng.choice((1, 2, 8, 64, 512, 700))
        what = rng.randrange(9)
        if what == 0:
            out = out[: rng.randrange(len(out) + 1)]
        elif what == 1:
            del out[at : at + length]
        elif what == 2:
            out[at:at] = out[at : at + length]
        elif what == 3:
            source = rng.randrange(max(len(out), 1))
            out[at : at + length] = out[source : source + length]
        elif what == 4:
            piece = rng.choice(INTERESTING)
            out[at : at + len(piece)] = piece
        elif what == 5:
            out[at:at] = rng.choice(WORDS)
        elif what == 6:
            out[at : at + length] = rng.randbytes(length)
        elif at < len(out):
            out[at] ^= 1 << rng.randrange(8)
    return bytes(out)


def odd(rng: random.Random) -> Any:
    """A value that nobody expects, as JSON or YAML can say it."""
    return rng.choice(
        (
            *(None, True, False, 0, -1, 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400),
            *(0.5, -0.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
            *("", "x", "0", "../x", "/etc/passwd", "pipe:touch x {}", "http://[", "\0", "a\nb", "\x1b[31m", "\ud800"),
            *("x" * 5000, "ß漢字", "1e999", "nan", "$(touch x)", "{{7*7}}", "<script>", "\u202e", "~nobody/x"),
            *([], {}, [[]], [None], {"": None}, {"name": "x"}, [1, "a"], {"a": {"b": {"c": [1]}}}, nested(50)),
        )
    )


def nested(depth: int) -> Any:
    """Lists and mappings in each other."""
    value: Any = 1
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


def changed(rng: random.Random, value: Any) -> Any:
    """A copy of plain data with one to three places odd, gone, doubled or exchanged."""
    value = pickle.loads(pickle.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return odd(rng)
        node, key = rng.choice(places)
        what = rng.randrange(8)
        if what < 5:
            node[key] = odd(rng)
        elif what == 5:
            del node[key]
        elif what == 6:
            other, from_key = rng.choice(places)
            node[key] = pickle.loads(pickle.dumps(other[from_key])) if node is not other else odd(rng)
        elif isinstance(node, dict):
            node[str(rng.choice(("", "x", "name", "\0", "__class__", key)))] = node.pop(key)
        else:
            node.extend(node[:100])
    return value


def _places(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def as_json(value: Any) -> bytes:
    """With lone surrogates as escapes, and numbers that strict JSON has not."""
    sys.set_int_max_str_digits(0)
    try:
        return json.dumps(value).encode()
    finally:
        sys.set_int_max_str_digits(4300)


BOMB = "\n".join(
    ["a0: &a0 [x,x,x,x,x,x,x,x,x]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 25))]
)
"""The billion laughs: 9 to the power of 25 values in two kilobytes."""


def outcomes(cases: Iterable[Any], read: Callable[[Any], object], *clean: type[BaseException]) -> Counter[str]:
    """What `read` made of each case: "fine", or "refused" by one of the errors that it documents.

    Raises:
        AssertionError: it raised something else; with the case and how it came.
    """
    seen: Counter[str] = Counter()
    for case in cases:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(case)
            seen["fine"] += 1
        except BaseException as error:
            if not isinstance(error, clean or TlxError):
                raise AssertionError(f"{type(error).__name__} for {case!r:.2000}") from error
            said = str(error)
            seen["refused"] += 1
        else:
            continue
        assert said.strip(), f"an error without a word, for {case!r:.300}"
        assert len(said) < 100_000, f"an error of {len(said):,} characters, for {case!r:.300}"
    return seen


def apart(work: Callable[[], Any], *, memory: int = GIB, seconds: int = 120) -> Any:
    """What `work` returns, done in a child that may take `memory` bytes more than there are now.

    Raises:
        AssertionError: it failed, took too much memory or time, or was killed by a signal.
    """
    inside, outside = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads of libraries, idle here
        child = os.fork()
    if not child:
        os.close(inside)
        try:
            resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + memory,) * 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(seconds)
            said = (True, work())
        except BaseException:
            said = (False, traceback.format_exc())
        with os.fdopen(outside, "wb") as file:
            pickle.dump(said, file)
        os._exit(0)
    os.close(outside)
    with os.fdopen(inside, "rb") as file:
        told = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGALRM:
        raise AssertionError(f"not done after {seconds} s")
    assert status == 0, f"the process ended with {status}"
    good, said = pickle.loads(told)
    assert good, said
    return said


def many(quick, slow):
    return pytest.mark.parametrize("count", [quick, pytest.param(slow, marks=pytest.mark.slow)])


def kept(seen, *names):
    print(dict(seen))
    assert min(seen[name] for name in names or ("fine", "refused")) > 0, f"the cases tell little: {seen}"
