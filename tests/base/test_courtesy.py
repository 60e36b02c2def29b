"""What a training shows is a courtesy: it goes on without a reader, a terminal, room for its log, or letters."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import forked
import pytest
from commands import command, environment, last_step, rows, status, write_config
from composed import two_phases

from tlx.base import terminal
from tlx.base.console import Console
from tlx.base.terminal import BestEffort, as_courtesy, encodable, hand_over, say, unread
from tlx.cli import main as cli
from tlx.doctor.findings import Finding, Section
from tlx.doctor.shown import Output
from tlx.runs.stop import StopRequest


class Gone(io.StringIO):
    """A stream that takes nothing while `error` is set."""

    def __init__(self, error=errno.EPIPE):
        super().__init__()
        self.error = error

    def write(self, text):
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return super().write(text)


def row(step, **more):
    return {"step": step, "epoch": step / 10, "phase": "fine_tuning", "train/loss": 0.5, **more}


# --- one stream


def test_what_a_stream_does_not_take_is_kept_in_a_file_and_the_loss_is_said_once(tmp_path, capsys):
    file, stream = tmp_path / "console.txt", BestEffort(Gone())
    stream.write("before the folder is known\n")
    stream.instead = file
    stream.write("a \x1b[1mline\x1b[0m with \u00fc\n")
    stream.write("\x1b[2K a frame of a bar")
    stream.write("another\n")
    loss = f"warning: standard output cannot be written (Broken pipe); what it would show is kept in {file}\n"
    assert file.read_text("utf-8") == loss + "before the folder is known\na line with \u00fc\nanother\n"
    assert capsys.readouterr().err == "warning: standard output cannot be written (Broken pipe)\n"


def test_a_log_goes_on_when_its_disk_has_room_again(tmp_path):
    full = Gone(errno.ENOSPC)
    stream = BestEffort(full)
    stream.instead = tmp_path / "no folder" / "console.txt"  # which is on a full disk as well
    stream.write("lost\n")
    full.error = 0
    stream.write("shown\n")
    assert full.getvalue() == "shown\n"
    assert not stream.failed
    full.error = errno.ENOSPC
    stream.instead = tmp_path / "console.txt"
    stream.write("later\n")
    assert stream.instead.read_text().splitlines()[1:] == ["lost", "later"], "it waits until it can be kept"


def test_both_streams_gone_is_told_in_the_file_alone(tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Gone(errno.EIO))
    as_courtesy()
    terminal.keep_in(tmp_path / "console.txt")
    say("a note", error=True)
    say("a result")
    print("of a backbone of the user's")
    assert (tmp_path / "console.txt").read_text().splitlines() == [
        f"warning: standard error cannot be written (Input/output error); what it would show is kept in "
        f"{tmp_path / 'console.txt'}",
        "a note",
        f"warning: standard output cannot be written (Input/output error); what it would show is kept in "
        f"{tmp_path / 'console.txt'}",
        "a result",
        "of a backbone of the user's",
    ]


def test_a_bar_ends_with_its_terminal_and_the_rows_go_to_the_file(tmp_path, monkeypatch):
    class Tty(Gone):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    out, file = Tty(0), tmp_path / "console.txt"
    console = Console(100, True, file=out, instead=file)
    console.row(row(10))
    assert "10/100" in out.getvalue()
    out.error = errno.EIO
    console.note("phase fine_tuning")
    console.row(row(20, **{"val/top1": 0.5}))
    console.row(row(30))
    console.close()
    said = file.read_text()
    assert "phase fine_tuning" in said
    assert "val/top1 0.5" in said
    assert "\x1b" not in said


def test_a_line_in_a_narrow_encoding_is_escaped_and_no_end_of_the_console():
    raw = io.BytesIO()
    console = Console(10, True, file=io.TextIOWrapper(raw, encoding="ascii"))
    console.note("run \u00fc")
    console.note("goes on")
    assert raw.getvalue() == b"run \\xfc\ngoes on\n"
    assert encodable("\u00fc\udc80", io.TextIOWrapper(io.BytesIO(), encoding="latin-1")) == "\u00fc\\udc80"


def test_what_a_program_reads_is_utf8_whatever_the_terminal_has(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    hand_over("runs/\u00fc\udcff")
    assert raw.getvalue() == b"runs/\xc3\xbc\xff\n"


def test_a_broken_pipe_of_something_else_is_no_reader_that_has_gone(monkeypatch):
    inlet, outlet = os.pipe()
    with os.fdopen(outlet, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert not unread(BrokenPipeError(errno.EPIPE, "Broken pipe"))
        os.close(inlet)
        assert unread(BrokenPipeError(errno.EPIPE, "Broken pipe"))
        as_courtesy()
        assert not unread(BrokenPipeError(errno.EPIPE, "Broken pipe"))


def test_a_command_whose_other_pipe_breaks_shows_its_trace(monkeypatch, capsys, tmp_path):
    def broken(folder):
        raise BrokenPipeError(errno.EPIPE, "of a connection")

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # typer replaces them
    monkeypatch.setattr("tlx.runs.run_status.status_text", broken)
    monkeypatch.setattr(sys, "argv", ["tlx", "status", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert capsys.readouterr().err.endswith("BrokenPipeError: [Errno 32] of a connection\n")


@pytest.mark.parametrize(
    ("encoding", "code", "said"),
    [
        ("iso8859-1", 2, "error: runs/\\u0142: the locale's encoding, iso8859-1, lacks letters of this name\n"),
        ("utf-8", 1, "Traceback"),
    ],
)
def test_a_letter_that_the_locale_lacks_is_told(monkeypatch, capsys, encoding, code, said):
    def fail(**_):
        raise UnicodeEncodeError(encoding, "runs/\u0142", 5, 6, "not in it")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == code
    assert capsys.readouterr().err.startswith(said)


# --- a closed terminal


def test_a_closed_terminal_asks_a_training_to_stop_where_its_launcher_ends(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        for launched, reason in ((True, "SIGHUP"), (False, None)):
            stop = StopRequest(tmp_path, launched=launched)
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.asked(look=False) == launched
            assert stop.reason == reason
            stop.close()
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# --- whole trainings


def training(shards, folder, *, steps=150):
    """With an evaluation every 50 steps and a backbone that prints; its configuration."""
    phases = {"each": {"lr": 0.02}, "feature_extraction": {"duration": 50}, "fine_tuning": {"duration": steps - 50}}
    raw = two_phases(shards, folder / "run", phases=phases)
    speaking = {"name": "toys:speaking", "weights": "none"}
    every = {"track": {"every": 1}, "evaluate": {"every": 50}, "checkpoint": {"every": 50}}
    return write_config(folder / "c.yaml", {**raw, **every, "backbone": speaking})


def run_to(out, config, *, ranks=1):
    """`tlx train` whose standard output and error are the file `out`: the process."""
    words, env = ["train", str(config)], environment()
    if ranks == 1:
        made = forked.context().Process(
            target=forked.alone, args=("forked:command_line", words, env, (str(out), str(out)))
        )
    else:
        torchrun = ["--standalone", f"--nproc-per-node={ranks}"]
        given = ("forked:command_line", words, torchrun, ranks, env, (str(out), str(out)))
        made = forked.context().Process(target=forked.agent, args=given)
    made.start()
    return made


def ended(process, run):
    """That it has come to its end, in peace."""
    process.join(120)
    if process.exitcode is None:
        process.kill()
    assert process.exitcode == 0
    assert status(run)["status"] == "done"
    assert max(r["step"] for r in rows(run)) == 150


def kept(run):
    said = (run / "console.txt").read_text()
    assert said.startswith("warning: standard ")
    assert "the network speaks" in said
    return said


@pytest.mark.slow
def test_a_reader_that_has_enough_does_not_end_a_training(shards, tmp_path):
    reader_of_one_line(shards, tmp_path, ranks=1)


@pytest.mark.slow
def test_nor_one_under_a_launcher(shards, tmp_path):
    reader_of_one_line(shards, tmp_path, ranks=2)


def reader_of_one_line(shards, tmp_path, *, ranks):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    lines = []

    def head() -> None:
        with pipe.open() as file:
            lines.append(file.readline())

    reader = threading.Thread(target=head)
    reader.start()
    process = run_to(pipe, training(shards, tmp_path), ranks=ranks)
    ended(process, tmp_path / "run")
    reader.join()
    assert lines[0]
    assert "Broken pipe" in kept(tmp_path / "run")
    assert "phase fine_tuning: steps 50 to 150" in kept(tmp_path / "run")


def test_a_log_on_a_full_disk_does_not_end_a_training(shards, tmp_path):
    ended(run_to("/dev/full", training(shards, tmp_path)), tmp_path / "run")
    said = kept(tmp_path / "run")
    assert "No space left on device" in said
    assert "phase feature_extraction: steps 0 to 50" in said
    assert "step 150/150" in said
    assert "150 steps, 1,200 samples seen" in said, "the summary"


def test_a_terminal_that_is_closed_does_not_end_a_training(shards, tmp_path):
    run = tmp_path / "run"
    process, shown = in_a_terminal_that_is_closed(training(shards, tmp_path), run)
    ended(process, run)
    assert b"feature_extraction" in shown
    assert "Input/output error" in kept(run)
    assert "phase fine_tuning: steps 50 to 150" in kept(run)


@pytest.mark.slow
def test_a_launcher_whose_terminal_is_closed_leaves_a_training_that_goes_on_later(shards, tmp_path):
    run = tmp_path / "run"
    process, _ = in_a_terminal_that_is_closed(training(shards, tmp_path, steps=20_000), run, ranks=2)
    process.join(120)
    assert (status(run)["status"], status(run)["why"]) == ("resumable", "stopped by SIGHUP")
    assert status(run)["step"] == max(r["step"] for r in rows(run))


def in_a_terminal_that_is_closed(config, run, *, ranks=1):
    """A training whose kernel sends SIGHUP to its session at step 20 or so, and refuses what is written from then on:
    the process, and what it had shown."""
    master, slave = pty.openpty()
    process, shown = run_to(os.ttyname(slave), config, ranks=ranks), b""
    deadline = time.monotonic() + 120
    while last_step(run) < 20:
        assert process.exitcode is None, shown
        assert time.monotonic() < deadline, shown
        shown += os.read(master, 1 << 16) if select.select([master], [], [], 0.01)[0] else b""
    os.close(master)
    os.close(slave)
    return process, shown


# --- commands whose output is their purpose


def shell(script, **env):
    return subprocess.run(
        ["bash", "-c", script], env=environment(**env), capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def named(tmp_path):
    """A run folder whose name has a letter beyond ASCII, in which nothing is yet: whoever looks needs no torch."""
    folder = tmp_path / "\u00fc"
    folder.mkdir()
    return folder


def test_a_reader_that_has_enough_ends_a_command_as_it_ends_git_and_a_full_disk_is_told(named):
    tlx = " ".join(command("status", named))
    done = shell(f"{tlx} | true; echo ${{PIPESTATUS[0]}}; {tlx} --folder | true; echo ${{PIPESTATUS[0]}}")
    assert (done.stdout, done.stderr) == ("141\n141\n", "")
    done = shell(f"{tlx} > /dev/full; echo $?; {tlx} >&-; echo $?")
    assert done.stdout == "2\n0\n"
    assert done.stderr == (
        "error: standard output: No space left on device\n  -> free some room, or use another disk\n"
    )


POSIX = {"LC_ALL": "C", "PYTHONUTF8": "0"}
ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize("env", [POSIX, ASCII, POSIX | ASCII], ids=["names", "terminal", "both"])
def test_a_run_may_be_named_with_any_letter_in_a_posix_locale(named, env):
    words = command("status", named, "--folder")
    done = subprocess.run(words, env=environment(**env), capture_output=True, timeout=60, check=False)
    assert (done.stdout.decode(), done.stderr) == (f"{named}\n", b"")
    done = subprocess.run(words[:-1], env=environment(**env), capture_output=True, timeout=60, check=False)
    shown = str(named).replace("\u00fc", "\\xfc") if env.get("PYTHONIOENCODING") else str(named)
    assert (done.stdout.decode(), done.stderr) == (f"{shown}: no training has begun here\n", b"")


@pytest.mark.slow
@pytest.mark.parametrize("env", [POSIX, ASCII], ids=["names", "terminal"])
def test_a_run_of_any_name_is_trained_in_a_posix_locale(shards, tmp_path, env):
    config = write_config(tmp_path / "c.yaml", two_phases(shards, tmp_path / "\u00fc"))
    done = subprocess.run(
        command("train", config), env=environment(**env), capture_output=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "\u00fc")["status"] == "done"
    assert done.stderr == b""


def test_a_bar_of_many_files_ends_with_its_terminal_and_not_the_work(monkeypatch):
    from tlx.data.build.progress import in_processes

    class Tty(Gone):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Tty(errno.EIO))
    with contextlib.redirect_stdout(io.StringIO()):
        assert list(in_processes(abs, [-1, -2, -3], jobs=1, title="adding")) == [1, 2, 3]


def test_a_reader_that_has_enough_leaves_nothing_undone(monkeypatch, tmp_path):
    from tlx.cli import weights as cli_weights
    from tlx.models.weights.fetch import Fetched

    done = []

    def fetched(names, folder, *, tag):
        for name in names:
            done.append(name)
            yield Fetched(tmp_path / name, name, True)

    monkeypatch.setattr("tlx.models.weights.fetch.fetch", fetched)
    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    cli_weights.fetch(["a", "b", "c"], tmp_path, None)
    assert done == ["a", "b", "c"]


def test_the_doctor_leaves_a_broken_pipe_to_the_command():
    shown = Output(as_json=False, silent=False, file=Gone())
    with pytest.raises(BrokenPipeError):
        shown.add(Section("a", [Finding("b", "ok", "c")]))


def test_files_are_read_in_an_encoding_that_the_code_names():
    """ruff sees the calls whose object it knows; here are the others."""
    found = []
    for path in (Path(terminal.__file__).parent).rglob("*.py"):
        for line in path.read_text("utf-8").splitlines():
            if ".read_text()" in line or (".write_text(" in line and "encoding" not in line):
                found.append(f"{path.name}: {line.strip()}")
    assert not found
