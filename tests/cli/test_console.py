"""A command's output and signals: `lumina_mgpt/console.py`."""

import io
import os
import signal
import subprocess
import sys

import pytest
from commands import environment

from lumina_mgpt import cli
from lumina_mgpt.console import SafeStream, printable, safe_output, stops_delayed
from lumina_mgpt.errors import InputError


def run(work, argv=()) -> int:
    return cli.run(work, cli.Parser(prog="test"), list(argv))


def program(body: str, **options) -> subprocess.CompletedProcess:
    """Runs a command whose work is `body`, in another process."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    code = f"import os, sys\nfrom lumina_mgpt import cli\ndef work(args):\n{lines}\n"
    code += "sys.exit(cli.run(work, cli.Parser(prog='test'), []))"
    return subprocess.run([sys.executable, "-c", code], timeout=60, **{"env": environment()} | options)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_characters_outside_the_encoding_are_escaped(encoding):
    """A Chinese prompt ended a run whose output was redirected on Windows."""
    done = program(
        "print('猫 done'); print('é', file=sys.stderr)",
        capture_output=True,
        env=environment(PYTHONIOENCODING=f"{encoding}:strict"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding) == "\\u732b done\n"


def test_a_closed_pipe_does_not_end_the_work(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    body = f"for n in range(9): print('x' * 9000, flush=True)\nopen({str(tmp_path / 'done')!r}, 'w').close()"
    done = program(body, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("closed", ["1", "2", "both"])
def test_closed_streams(tmp_path, closed):
    """With stderr closed, the next file that was opened received what libraries print."""
    numbers = {"both": (1, 2)}.get(closed) or (int(closed),)
    target = tmp_path / "done"
    body = f"file = open({str(target)!r}, 'w')\nprint('out'); print('err', file=sys.stderr)\n"
    body += "os.write(2, b'from a library')\nos.write(1, b'too')\nfile.write('result'); file.close()"
    done = program(
        body,
        preexec_fn=lambda: [os.close(number) for number in numbers],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert done.returncode == 0 and target.read_text() == "result"


def test_a_full_disk_behind_stdout():
    with open("/dev/full", "w") as full:
        done = program("print('x' * 99999)", stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 0 and done.stderr == b""


def test_a_safe_stream_never_raises():
    stream = io.StringIO()
    stream.close()
    safe = SafeStream(stream)
    assert safe.write("text") == 4 and not safe.isatty()
    safe.flush()
    assert SafeStream(None).write("text") == 4 and SafeStream(None).encoding == "utf-8"


def test_streams_are_restored():
    before = sys.stdout, sys.stderr
    with safe_output():
        assert isinstance(sys.stdout, SafeStream) and isinstance(sys.stderr, SafeStream)
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_run_the_clean_up(tmp_path, name, capsys):
    """SIGTERM left unfinished files behind, since only Ctrl-C ran the clean-up."""
    number = getattr(signal, name)
    before = signal.getsignal(number)

    def work(_) -> None:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("2 of 4 images are kept") from None
        finally:
            (tmp_path / "cleaned").touch()

    assert run(work) == 128 + number
    assert capsys.readouterr().err == f"stopped by {name}; 2 of 4 images are kept\n"
    assert (tmp_path / "cleaned").exists() and signal.getsignal(number) == before


def test_a_second_signal_does_not_interrupt_the_clean_up(tmp_path):
    """At the end of a terminal both the kernel and the shell send SIGHUP."""

    def work(_) -> None:
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
            (tmp_path / "cleaned").touch()

    assert run(work) == 128 + signal.SIGHUP and (tmp_path / "cleaned").exists()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_an_ignored_signal_stays_ignored():
    """`nohup` ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(lambda _: signal.raise_signal(signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_exit_statuses(capsys):
    def interrupted(_) -> None:
        raise KeyboardInterrupt

    assert run(lambda _: 7) == 7 and run(lambda _: None) == 0
    assert cli.run(interrupted, cli.Parser(), [], stopped="run it again") == 130
    assert "stopped by Ctrl-C; run it again" in capsys.readouterr().err
    assert run(lambda _: 0, ["--unknown"]) == 2


@pytest.mark.parametrize(
    "error, line",
    [
        (InputError("must be even, got 3; try 2", "width"), "--width must be even, got 3; try 2"),
        (
            InputError("needs a GPU; give device=cpu, quant=True", "attn"),
            "attn needs a GPU; give --device cpu, --quant",
        ),
        (InputError("must be a picture, got x", "panel"), "--image_path must be a picture, got x"),
        (InputError("a/device=3/x.png is missing, other=2; see n=4"), "a/device=3/x.png is missing, other=2; see -n 4"),
    ],
)
def test_errors_name_options_on_the_command_line(capsys, error, line):
    """The library names parameters; a command names its options."""
    parser = cli.Parser(prog="test", aliases={"panel": "--image_path"})
    for option in ("--width", "--device", "-n", "--image_path"):
        parser.add_argument(option)
    parser.add_argument("--quant", action="store_true")

    def work(_) -> None:
        raise error

    assert cli.run(work, parser, []) == 2 and capsys.readouterr().err == f"error: {line}\n"
    assert "--" not in str(error)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_for_the_end_of_a_block(number):
    """Ctrl-C between saving a picture and counting it made the last message wrong by one."""
    done, before = [], signal.getsignal(number)

    def work(_) -> None:
        with stops_delayed():
            signal.raise_signal(number)
            done.append("saved")
            done.append("counted")
        done.append("went on")

    assert run(work) == 128 + number
    assert done == ["saved", "counted"] and signal.getsignal(number) == before


def test_text_of_a_model_does_not_steer_the_terminal():
    assert printable("a\x1b[2J\x07b\r\x9bc\n\té東") == "a[2Jbc\n\té東"
