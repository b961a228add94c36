"""What becomes of a command's output and of interrupts, as a shell sees it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest

from bundlefmt.cli import main, verify
from tests.conftest import DEMO
from tests.test_cli import ENVIRONMENT, Result, is_one_line

COMMAND = f"{sys.executable} -P -m bundlefmt"
# Blanks of several widths, joiners, what no Latin encoding has, and what drives a terminal.
TEXT = "日本\u3000語 می\u200cرود 👩\u200d👩 Bonjour\xa0! \x1b[2J\x07\x9b2K"


def shell(line: str, *, stdout: int = subprocess.PIPE, **variables: str) -> Result:
    """A shell's command line; `bundlefmt` stands for this one."""
    return subprocess.run(
        ["bash", "-c", line.replace("bundlefmt", COMMAND, 1)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        timeout=120,
        check=False,
        encoding="utf-8",
        errors="surrogateescape",
        env=ENVIRONMENT | {"LC_ALL": "C.UTF-8"} | variables,
    )


@pytest.fixture
def run(demo_bundle: Path) -> str:
    return f"bundlefmt run {demo_bundle} --max-new-tokens 1 --prompt '{TEXT}'"


# Text.


def test_a_file_or_pipe_gets_the_text_itself(run: str) -> None:
    assert shell(run).stdout.startswith(TEXT)


def test_a_terminal_gets_all_but_what_could_drive_it(run: str) -> None:
    terminal, end = pty.openpty()
    try:
        shell(run, stdout=end)
        os.close(end)
        shown = os.read(terminal, 65536).decode()
    finally:
        os.close(terminal)
    assert shown.startswith("日本\u3000語 می\u200cرود 👩\u200d👩 Bonjour\xa0! \\x1b[2J\\x07\\x9b2K")


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({"PYTHONIOENCODING": "ascii"}, r"\u65e5\u672c"),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, r"\u65e5\u672c"),
    ],
)
def test_what_an_encoding_lacks_is_escaped(run: str, variables: dict[str, str], shown: str) -> None:
    done = shell(run, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(shown)


def test_a_warning_is_one_line(
    demo_bundle: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "run", lambda args: warnings.warn("two\nlines", stacklevel=1) or 0)
    assert main(["verify", str(demo_bundle)]) == 0
    assert capfd.readouterr().err == "bundlefmt verify: warning: two\\nlines\n"


# Standard output and error that cannot be written.

CLOSED = "bundlefmt: standard output cannot be written: Bad file descriptor\n"
FULL = "bundlefmt: standard output cannot be written: No space left on device\n"
SHORT = "--prompt A --max-new-tokens 1"
MISSING = "bundlefmt inspect: nowhere: cannot open: No such file or directory\n"


@pytest.mark.parametrize(
    ("line", "status", "said"),
    [
        (f"run DEMO {SHORT} >&-", 1, CLOSED),
        ("inspect DEMO >&-", 1, CLOSED),
        (f"run DEMO {SHORT} >/dev/full", 1, FULL),
        ("inspect DEMO --json >/dev/full", 1, "bundlefmt inspect: No space left on device\n"),
        ("--version >/dev/full", 1, FULL),
        ("inspect nowhere >/dev/full", 2, MISSING),
        ("inspect nowhere 2>&-", 2, ""),
        ("inspect DEMO >&- 2>&- <&-", 1, ""),
        ("no-such-command 2>&-", 2, ""),
        (f"run DEMO {SHORT} | true; exit ${{PIPESTATUS[0]}}", (0, 1), ""),
        ("inspect DEMO --json | head -c 1; exit ${PIPESTATUS[0]}", (0, 1), ""),
        ("inspect nowhere 2>&1 >/dev/null | true; exit ${PIPESTATUS[0]}", 2, ""),
    ],
)
def test_output_that_cannot_be_written_is_one_line_or_none(
    demo_bundle: Path, line: str, status: int | tuple[int, ...], said: str
) -> None:
    done = shell(f"bundlefmt {line.replace('DEMO', str(demo_bundle))}")
    assert done.stderr == said
    assert done.returncode in (status if isinstance(status, tuple) else (status,))


def test_a_closed_standard_output_is_not_written_into_a_file(tmp_path: Path) -> None:
    """A file that is opened next would get its number."""
    made = tmp_path / "made.bundle"
    assert shell(f"bundlefmt pack {DEMO} -o {made} >&-").returncode == 1
    assert shell(f"bundlefmt verify {made}").returncode == 0


# Interrupts. A hook in the process sends it the signal at a given moment, since no clock could.

HOOK = """
import atexit, os, signal, sys

moments = os.environ["MOMENTS"].split("|")

def interrupt(event, args):
    if moments and f"{event} {args[0] if args else ''}".startswith(moments[0]):
        moments.pop(0)
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
atexit.register(lambda: sys.audit("the end"))
"""


@pytest.fixture
def hooked(tmp_path: Path) -> Path:
    folder = tmp_path / "hook"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(textwrap.dedent(HOOK))
    return folder


def interrupted(hooked: Path, line: str, *moments: str) -> Result:
    """A command that gets SIGINT at these moments, one after the other."""
    return shell(line, PYTHONPATH=str(hooked), MOMENTS="|".join(moments))


@pytest.mark.parametrize(
    "moments",
    [
        ["import bundlefmt.cli.interrupts"],
        ["import json"],
        ["import bundlefmt.cli.parser"],
        ["import bundlefmt.errors", "import bundlefmt.cli.bench", "import bundlefmt.cli.run"],
        ["import numpy"],
        ["import tokenizers.decoders", "import bundlefmt.runtime"],
        ["import bundlefmt.native._core"],
        ["open DEMO"],
    ],
)
def test_an_interrupt_at_any_moment_is_one_line_and_status_130(
    hooked: Path, demo_bundle: Path, moments: list[str]
) -> None:
    moments = [moment.replace("DEMO", str(demo_bundle)) for moment in moments]
    done = interrupted(hooked, f"bundlefmt run {demo_bundle} {SHORT}", *moments)
    assert done.stderr == "bundlefmt run: interrupted\n"
    assert done.returncode == 130


@pytest.mark.parametrize(
    "moments",
    [
        ["open {out}"],
        ["os.link {out}"],
        ["os.link {out}", "os.remove"],  # again, while that is removed
    ],
)
def test_an_interrupt_leaves_nothing_behind(
    hooked: Path, tmp_path: Path, moments: list[str]
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    named = [moment.format(out=folder) for moment in moments]
    done = interrupted(hooked, f"bundlefmt pack {DEMO} -o {folder}/x.bundle", *named)
    assert done.stderr == "bundlefmt pack: interrupted\n"
    assert done.returncode == 130
    assert list(folder.iterdir()) == []


def test_an_interrupt_when_all_is_done_changes_nothing(hooked: Path, demo_bundle: Path) -> None:
    done = interrupted(hooked, f"bundlefmt verify {demo_bundle}", "the end")
    assert (done.returncode, done.stderr) == (0, "")
    assert "ok" in done.stdout


def test_an_interrupt_that_the_shell_ignores_is_ignored(hooked: Path, demo_bundle: Path) -> None:
    line = f"trap '' INT; bundlefmt verify {demo_bundle}"
    done = interrupted(hooked, line, "import numpy")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_program_that_calls_main_keeps_its_own_handler(demo_bundle: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)
    assert main(["verify", str(demo_bundle)]) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM)) == before


LOST = {
    # Python prints it and goes on.
    "in a finaliser": """
class Thing:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)

thing = Thing()
del thing
""",
    # As C code may that calls Python.
    "in code that drops every error": """
with contextlib.suppress(BaseException):
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(1)
""",
    # The module makes another error of it, as NumPy may.
    "in an import": "import broken",
}
BROKEN = """
import os, signal

try:
    os.kill(os.getpid(), signal.SIGINT)
    whole = True
except BaseException:
    raise ImportError("broken")
"""


@pytest.mark.parametrize("case", LOST)
def test_a_lost_interrupt_comes_again(tmp_path: Path, case: str) -> None:
    code = f"""
import contextlib, os, signal, sys, threading
from bundlefmt.cli.interrupts import Interrupts

try:
    with Interrupts(lasting=True):
{textwrap.indent(LOST[case], " " * 8)}
        threading.Event().wait(60)
except KeyboardInterrupt:
    sys.exit(3)
"""
    (tmp_path / "lost.py").write_text(code)
    (tmp_path / "broken.py").write_text(BROKEN)
    done = shell(f"cd {tmp_path}; {sys.executable} lost.py")
    assert (done.returncode, done.stderr) == (3, "")


def test_an_interrupt_within_an_import_that_calls_main_is_heard(
    hooked: Path, tmp_path: Path, demo_bundle: Path
) -> None:
    code = f"from bundlefmt.cli import main\nmain(['run', '{demo_bundle}', '--prompt', 'A'])\n"
    (tmp_path / "caller.py").write_text(code)
    line = f"cd {tmp_path}; {sys.executable} -c 'import caller'"
    done = interrupted(hooked, line, f"open {demo_bundle}")
    assert is_one_line(done.stderr)
