"""The command line: what it prints where, and the status that it ends with."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bundlefmt.cli import COMMANDS, main
from tests.conftest import DEMO, FIXTURES, VECTORS
from tools.alterations import edited

BAD = VECTORS / "bad"
REFUSALS: dict[str, dict[str, str]] = json.loads((BAD / "errors.json").read_text())
TEXT = DEMO / "README.md"
PROMPT = ["--prompt", "ROMEO:", "--max-new-tokens", "4"]
PLAN = ["--memory", "1GiB", "--mode", "exact"]
CACHE = tempfile.TemporaryDirectory()  # device profiles, for as long as these tests take
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
ENVIRONMENT["XDG_CACHE_HOME"] = CACHE.name

Result = subprocess.CompletedProcess[str]


def python(*args: str | Path, path: Path | None = None, **options: object) -> Result:
    """A Python process of its own, its output caught unless `options` say otherwise."""
    caught = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.run(
        [sys.executable, "-P", *map(str, args)],
        text=True,
        timeout=120,
        check=False,
        env=ENVIRONMENT | ({} if path is None else {"PYTHONPATH": str(path)}),
        **{**caught, **options},
    )


def bundlefmt(*args: str | Path, **options: object) -> Result:
    """`python -m bundlefmt ...`"""
    return python("-m", "bundlefmt", *args, **options)


def is_one_line(text: str) -> bool:
    """Whether the text is one line without control characters."""
    return text.endswith("\n") and text[:-1].isprintable() and len(text) > 1


# Commands on the demo model; {demo} is its bundle file, {copy} one that may change, {traces} its
# trace, {tmp} an empty folder.
WORK: dict[str, list[str]] = {
    "pack": ["pack", str(DEMO), "-o", "{tmp}/new.bundle"],
    "pack, dry": ["pack", str(DEMO), "-o", "{tmp}/new.bundle", "--dry-run"],
    "inspect": ["inspect", "{demo}"],
    "verify": ["verify", "{demo}"],
    "verify, quick": ["verify", "{demo}", "--quick"],
    "unpack": ["unpack", "{demo}", "-o", "{tmp}/files"],
    "run, dense": ["run", "{demo}", *PROMPT],
    "run, exact": ["run", "{demo}", *PROMPT, "--mode", "exact", "--backend", "buffered"],
    "run, with a draft": ["run", "{demo}", *PROMPT, "--draft", "{demo}", "--draft-tokens", "2"],
    "trace": ["trace", "{demo}", "--text", str(TEXT), "-o", "{tmp}/traces", "--max-tokens", "9"],
    "reorder": ["reorder", "{demo}", "--traces", "{traces}", "-o", "{tmp}/ordered.bundle"],
    "train-predictors": ["train-predictors", "{copy}", "--traces", "{traces}", "--rank", "4"],
    "eval": ["eval", "{demo}", "--text", str(DEMO / "README.md"), "--max-tokens", "20"],
    "bench": ["bench", "{demo}", "--threads", "2", "--backend", "buffered"],
    "bench, device": ["bench", "--dir", "{tmp}", "--size", "1M", "--chunk-size", "4K,16K"],
    "calibrate": ["calibrate", "{tmp}", "--size", "64M", "--seconds", "0"],
    "plan": ["plan", "{demo}", *PLAN],
    "plan, traced": ["plan", "{demo}", *PLAN, "--traces", "{traces}"],
    "doctor": ["doctor", "--dir", "{tmp}"],
    "demo": ["demo"],
}


def filled(args: list[str], demo: Path, tmp: Path) -> list[str]:
    """The arguments with their places filled in."""
    copy, traces = tmp / "copy.bundle", demo.with_suffix(".traces")
    if "{copy}" in args:
        shutil.copy(demo, copy)
    return [arg.format(demo=demo, copy=copy, traces=traces, tmp=tmp) for arg in args]


def tried(work: str) -> pytest.ParameterSet | str:
    """A test's parameter: the work, skipped where it needs what is not installed."""
    if work == "train-predictors" and find_spec("torch") is None:
        reason = "needs PyTorch: pip install '.[train]'"
        return pytest.param(work, marks=pytest.mark.skip(reason=reason))
    return work


@pytest.mark.parametrize("work", list(map(tried, WORK)))
@pytest.mark.usefixtures("demo_traces")
def test_every_command_tells_a_person_how_it_went(
    demo_bundle: Path, tmp_path: Path, work: str
) -> None:
    done = bundlefmt(*filled(WORK[work], demo_bundle, tmp_path))
    assert (done.returncode, done.stderr) == (0, "")  # no progress bar in a pipe either
    assert len(done.stdout.strip().splitlines()) >= 1
    assert not done.stdout.lstrip().startswith("{")


@pytest.mark.parametrize("work", list(map(tried, WORK)))
@pytest.mark.usefixtures("demo_traces")
def test_json_is_one_object_and_nothing_else(demo_bundle: Path, tmp_path: Path, work: str) -> None:
    done = bundlefmt(*filled(WORK[work], demo_bundle, tmp_path), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert isinstance(json.loads(done.stdout), dict)
    assert done.stdout.startswith("{") and done.stdout.endswith("}\n")


def test_every_command_is_tried() -> None:
    assert {args[0] for args in WORK.values()} == set(COMMANDS)


def test_what_the_commands_report_is_so(demo_bundle: Path, tmp_path: Path) -> None:
    found = json.loads(bundlefmt("inspect", demo_bundle, "--json").stdout)
    assert (found["layers"], found["neurons"]) == (5, 5120)
    assert found["file_bytes"] == demo_bundle.stat().st_size
    verified = json.loads(bundlefmt("verify", demo_bundle, "--json").stdout)
    assert verified["ok"] is True
    unpacked = json.loads(bundlefmt("unpack", demo_bundle, "-o", tmp_path, "--json").stdout)
    assert unpacked["identical"] is True
    for path in (tmp_path / name for name in unpacked["files"]):
        assert path.read_bytes() == (DEMO / path.name).read_bytes()


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    assert bundlefmt("pack", DEMO, "-o", tmp_path / "new.bundle", "--dry-run").returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_pack_writes_beside_its_source_unless_told_where(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "llama" / "model.safetensors", tmp_path)
    assert bundlefmt("pack", "model.safetensors", cwd=tmp_path).returncode == 0
    assert (tmp_path / "model.bundle").is_file()


def test_run_prints_the_prompt_then_the_text(demo_bundle: Path) -> None:
    work = ["run", demo_bundle, *PROMPT]
    report = json.loads(bundlefmt(*work, "--json").stdout)
    assert bundlefmt(*work).stdout.startswith(f"ROMEO:{report['text']}")


# Help.


@pytest.mark.parametrize("args", [[], *([command] for command in COMMANDS)])
def test_help_is_there_for_every_command(args: list[str]) -> None:
    done = bundlefmt(*args, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: bundlefmt")
    if not args:
        assert all(re.search(rf"\n    {command}\s", done.stdout) for command in COMMANDS)


def test_the_version_is_the_packages() -> None:
    import bundlefmt as package

    assert bundlefmt("--version").stdout == f"bundlefmt {package.__version__}\n"


# Errors: one line on standard error; 2 for the caller's fault, 1 for the file's or the device's.

MISUSE: dict[str, list[str]] = {
    "no such file, inspect": ["inspect", "{tmp}/missing.bundle"],
    "no such file, verify": ["verify", "{tmp}/missing.bundle"],
    "no such file, unpack": ["unpack", "{tmp}/missing.bundle", "-o", "{tmp}/files"],
    "no such file, run": ["run", "{tmp}/missing.bundle", *PROMPT],
    "no such file, eval": ["eval", "{tmp}/missing.bundle", "--text", str(DEMO / "README.md")],
    "no such text": ["eval", "{demo}", "--text", "{tmp}/missing.txt"],
    "no such file, bench": ["bench", "{tmp}/missing.bundle"],
    "no such checkpoint": ["pack", "{tmp}/missing.safetensors"],
    "a folder, inspect": ["inspect", "{tmp}"],
    "a folder without weights": ["pack", "{tmp}", "-o", "{tmp}/new.bundle"],
    "already there": ["pack", str(DEMO), "-o", "{demo}"],
    "unpacked already": ["unpack", "{demo}", "-o", str(DEMO)],
    "no folder to write to": ["pack", str(DEMO), "-o", "{tmp}/missing/new.bundle"],
    "no folder to measure": ["bench", "--dir", "{tmp}/missing"],
    "no folder to look at": ["doctor", "--dir", "{tmp}/missing"],
    "no such file, plan": ["plan", "{tmp}/missing.bundle", "--memory", "1GiB"],
    "a plan in no memory": ["plan", "{demo}", "--memory", "1M"],
    "a plan on no trace": ["plan", "{demo}", *PLAN, "--traces", "{tmp}"],
    "nothing to calibrate": ["calibrate", "{tmp}/missing"],
    "too small to calibrate": ["calibrate", "{tmp}", "--size", "1M"],
    "calibrated on too small a file": ["calibrate", "{demo}"],
    "calibrated in the past": ["calibrate", "{tmp}", "--size", "64M", "--seconds", "-1"],
    "no threads": ["bench", "{demo}", "--threads", "0"],
    "no threads to run with": ["run", "{demo}", *PROMPT, "--threads", "0"],
    "no depth": ["bench", "{demo}", "--queue-depth", "0"],
    "an empty batch": ["bench", "{demo}", "--batch", "0"],
    "more than all adjacent": ["bench", "{demo}", "--adjacent", "1.5"],
    "a device of neurons": ["bench", "--dir", "{tmp}", "--adjacent", "0.5"],
    "a picture of no kind": ["bench", "{demo}", "--plot", "{tmp}/rates.txt"],
    "a picture in no folder": ["bench", "{demo}", "--plot", "{tmp}/missing/rates.png"],
    "chunks of peers": ["bench", "{demo}", "--peers", "--chunk-size", "4K"],
    "a picture of peers": ["bench", "{demo}", "--peers", "--plot", "{tmp}/rates.png"],
    "peers at two depths": ["bench", "{demo}", "--peers", "--queue-depth", "1,2"],
    "chunk too large": ["bench", "--dir", "{tmp}", "--size", "1M", "--chunk-size", "2M"],
    "chunk of nothing": ["bench", "--dir", "{tmp}", "--size", "1M", "--chunk-size", "0"],
    "no such part": ["pack", str(DEMO), "-o", "{tmp}/new.bundle", "--resident", "gate"],
    "a negative temperature": ["run", "{demo}", *PROMPT, "--temperature", "-1"],
    "no such draft": ["run", "{demo}", *PROMPT, "--draft", "{tmp}/missing.bundle"],
    "a draft for chance": ["run", "{demo}", *PROMPT, "--draft", "{demo}", "--temperature", "1"],
    "a top-p of two": ["run", "{demo}", *PROMPT, "--top-p", "2"],
    "no such text to trace": ["trace", "{demo}", "--text", "{tmp}/missing.txt"],
    "no text to trace": ["trace", "{demo}", "--text", "/dev/null", "-o", "{tmp}/traces"],
    "no tokens of a text": ["trace", "{demo}", "--text", str(TEXT), "--max-tokens", "0"],
    "no folder for a trace": ["trace", "{demo}", "--text", str(TEXT), "-o", "{tmp}/missing/traces"],
    "no such trace": ["train-predictors", "{demo}", "--traces", "{tmp}/missing"],
    "no such trace to order by": ["reorder", "{demo}", "--traces", "{tmp}/missing"],
    "ordered already": ["reorder", "{demo}", "--traces", "{traces}", "-o", "{demo}"],
    "fewer than no tokens": ["run", "{demo}", "--prompt", "A", "--max-new-tokens", "-1"],
}


@pytest.mark.parametrize("misuse", MISUSE)
def test_misuse_is_one_line_and_status_2(
    demo_bundle: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    misuse: str,
) -> None:
    before = demo_bundle.read_bytes()
    assert main(filled(MISUSE[misuse], demo_bundle, tmp_path)) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"bundlefmt {MISUSE[misuse][0]}: ")
    assert is_one_line(err)
    assert list(tmp_path.iterdir()) == []
    assert demo_bundle.read_bytes() == before


SAID: list[tuple[list[str], str]] = [  # what a command says of what was typed
    (
        ["run", "{demo}", *PROMPT, "--max-new-tokens", "-1"],
        "--max-new-tokens: out of range: expected 0..2147483647, found -1",
    ),
    (
        ["run", "{demo}", *PROMPT, "--compute-threads", "0"],
        "--compute-threads: out of range: expected 1..1024, found 0",
    ),
    (["run", "{demo}", "--prompt", ""], "--prompt: no text to continue"),
    (
        ["run", "{demo}", *PROMPT, "--timeline", "{tmp}/token.png"],
        "{tmp}/token.png: unknown kind of picture: expected .svg, found .png",
    ),
    (
        ["run", "{demo}", *PROMPT, "--memory", "1G", "--window", "3"],
        "--window: policy lfu takes no window: expected none, found 3",
    ),
    (
        ["run", "{demo}", *PROMPT, "--memory", "1G", "--policy", "window"],
        "--window: policy window takes a window: expected a number of tokens, found none",
    ),
    (
        ["run", str(DEMO), *PROMPT],
        f"{DEMO}: a folder, not a bundle file: `bundlefmt pack` makes one of a checkpoint",
    ),
    (
        ["pack", "{demo}", "-o", "{tmp}/new.bundle"],
        "{demo}: a bundle file already: `bundlefmt unpack` writes back the checkpoint that it was "
        "made of: expected safetensors",
    ),
    (
        ["unpack", "{demo}", "-o", str(DEMO)],
        f"{DEMO}/config.json: already there: remove it, or choose another name",
    ),
    (
        ["trace", "{demo}", "--text", str(TEXT), "--max-tokens", "0", "-o", "{tmp}/traces"],
        "--max-tokens: out of range: expected 1 or more, found 0",
    ),
]


@pytest.mark.parametrize(("command", "said"), SAID)
def test_misuse_is_told_in_the_words_that_were_typed(
    command: list[str],
    said: str,
    demo_bundle: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(filled(command, demo_bundle, tmp_path)) == 2
    (line,) = filled([said], demo_bundle, tmp_path)
    assert capfd.readouterr().err == f"bundlefmt {command[0]}: {line}\n"


@pytest.mark.parametrize("misuse", MISUSE)
def test_misuse_puts_nothing_on_standard_output(
    demo_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], misuse: str
) -> None:
    main(filled(MISUSE[misuse], demo_bundle, tmp_path))
    assert capfd.readouterr().out == ""


# What the argument parser itself refuses.
MISSPELT: dict[str, list[str]] = {
    "no command": [],
    "unknown command": ["frobnicate"],
    "unknown option": ["inspect", "{demo}", "--frobnicate"],
    "missing file": ["inspect"],
    "missing prompt": ["run", "{demo}"],
    "unknown dtype": ["pack", str(DEMO), "-o", "{tmp}/new.bundle", "--dtype", "f64"],
    "unknown alignment": ["pack", str(DEMO), "-o", "{tmp}/new.bundle", "--align", "1000"],
    "unknown mode": ["run", "{demo}", *PROMPT, "--mode", "sparse"],
    "unknown backend": ["run", "{demo}", *PROMPT, "--backend", "tape"],
    "bad size": ["bench", "--dir", "{tmp}", "--size", "lots"],
    "bad unit": ["bench", "--dir", "{tmp}", "--chunk-size", "4K,16X"],
    "bad share": ["bench", "{demo}", "--adjacent", "half"],
    "unknown order": ["bench", "{demo}", "--order", "backwards"],
    "bad count": ["bench", "{demo}", "--threads", "1,,2"],
    "bad number": ["run", "{demo}", "--prompt", "A", "--max-new-tokens", "few"],
}


@pytest.mark.parametrize("misuse", MISSPELT)
def test_a_misspelt_command_line_is_status_2(
    demo_bundle: Path, tmp_path: Path, misuse: str
) -> None:
    done = bundlefmt(*filled(MISSPELT[misuse], demo_bundle, tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("misuse", MISSPELT)
def test_a_misspelt_command_line_is_one_line(
    demo_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], misuse: str
) -> None:
    with pytest.raises(SystemExit):
        main(filled(MISSPELT[misuse], demo_bundle, tmp_path))
    assert is_one_line(capsys.readouterr().err)


def test_misuse_in_a_process_of_its_own_is_one_line_and_status_2(
    demo_bundle: Path, tmp_path: Path
) -> None:
    for args in (["inspect", tmp_path / "missing"], ["pack", DEMO, "-o", demo_bundle]):
        done = bundlefmt(*args, "--json")
        assert (done.returncode, done.stdout) == (2, "")
        assert is_one_line(done.stderr)


@pytest.mark.parametrize("vector", sorted(REFUSALS))
def test_a_bad_file_is_one_line_and_status_1(
    vector: str, capfd: pytest.CaptureFixture[str]
) -> None:
    path = BAD / f"{vector}.bundle"
    assert main(["verify", str(path)]) == 1
    out, err = capfd.readouterr()
    assert is_one_line(out + err)
    assert str(path) in out + err
    assert REFUSALS[vector]["field"] in out + err
    assert main(["verify", str(path), "--json"]) == 1
    out, err = capfd.readouterr()
    assert json.loads(out)["ok"] is False
    assert err == ""
    if REFUSALS[vector]["refused_by"] == "open":
        assert main(["inspect", str(path)]) == 1
        out, err = capfd.readouterr()
        assert out == ""
        assert is_one_line(err)


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "{cut}", "--json"],
        ["verify", "{cut}"],
        ["unpack", "{cut}", "-o", "{tmp}/files"],
        ["run", "{cut}", *PROMPT, "--json"],
        ["bench", "{cut}", "--json"],
    ],
    ids=lambda args: args[0],
)
def test_a_truncated_file_is_one_line_and_status_1(
    demo_bundle: Path, tmp_path: Path, command: list[str]
) -> None:
    cut = tmp_path / "cut.bundle"
    cut.write_bytes(demo_bundle.read_bytes()[:-4096])
    done = bundlefmt(*(arg.format(cut=cut, tmp=tmp_path) for arg in command))
    assert done.returncode == 1
    assert is_one_line(done.stdout + done.stderr)
    assert "cut short" in done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["cut.bundle"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty", b""),
        ("pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        ("text", b"this is no weights file, and was never one\n" * 9),
    ],
)
def test_a_checkpoint_that_is_none_is_one_line_and_status_1(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert main(["pack", str(path)]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert is_one_line(err)
    assert str(path) in err
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_damaged_bundle_ends_a_run_with_one_line(
    demo_bundle: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(bundlefmt("inspect", demo_bundle, "--json").stdout)
    data = bytearray(demo_bundle.read_bytes())
    data[found["groups"][2]["offset"] + 76 * found["groups"][2]["stride"]] ^= 1
    damaged = tmp_path / "damaged.bundle"
    damaged.write_bytes(data)
    for args in (["run", str(damaged), *PROMPT, "--json"], ["bench", str(damaged), "--json"]):
        assert main(args) == 1
        out, err = capfd.readouterr()
        assert out == ""
        assert is_one_line(err)
        assert "layer 2, neuron 76" in err
    assert main(["bench", str(damaged), "--no-verify", "--backend", "buffered"]) == 0


# What a pack says.


def test_a_pack_says_what_it_made_of_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = load_file(FIXTURES / "llama" / "model.safetensors")
    tensors |= {"score.weight": tensors.pop("lm_head.weight")}
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((FIXTURES / "llama" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "strange"}))
    refused = bundlefmt("pack", folder, "--dry-run")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert is_one_line(refused.stderr)
    assert "--family llama" in refused.stderr
    done = bundlefmt("pack", folder, "--dry-run", "--family", "llama")
    assert done.returncode == 0
    said = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert said["family"] == "llama, silu"
    assert said["bundles"].endswith("52.6 % of the weights")
    assert said["unused"].endswith("in 1 tensor: score.weight")
    assert said["runs"].startswith("no: ")
    assert is_one_line(done.stderr)
    assert "no output head" in done.stderr


# Hostile names.

ESCAPE = "\x1b[2Jgone\n\x7f\u202e"
ACT = f"act{ESCAPE}"


@pytest.fixture
def hostile_bundle(tmp_path: Path) -> Path:
    """A model whose names try to drive the terminal, under such a name."""
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = load_file(FIXTURES / "llama" / "model.safetensors")
    tensors[f"tensor{ESCAPE}"] = np.zeros(3, dtype=np.float32)
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(FIXTURES / "llama" / "config.json", folder)
    path = tmp_path / "evil\x1b[31m.bundle"
    done = bundlefmt("pack", folder, "-o", path)
    assert done.returncode == 0
    assert all(line.isprintable() for line in done.stdout.split("\n"))
    acts = edited(lambda header: [group.update(activation=ACT) for group in header["groups"]])
    path.write_bytes(acts(path.read_bytes()))
    return path


def test_inspect_escapes_control_characters(hostile_bundle: Path) -> None:
    shown = bundlefmt("inspect", hostile_bundle)
    assert shown.returncode == 0
    assert all(line.isprintable() for line in shown.stdout.split("\n"))
    assert r"act\x1b[2Jgone\n\x7f" in shown.stdout
    raw = bundlefmt("inspect", hostile_bundle, "--json").stdout
    assert all(line.isprintable() and line.isascii() for line in raw.split("\n"))
    found = json.loads(raw)
    assert f"tensor{ESCAPE}" in [tensor["name"] for tensor in found["tensors"]]
    assert {group["activation"] for group in found["groups"]} == {ACT}


@pytest.mark.parametrize("command", [["verify"], ["run", *PROMPT], ["unpack", "-o", "{tmp}/x"]])
def test_no_command_lets_control_characters_through(
    hostile_bundle: Path, tmp_path: Path, command: list[str]
) -> None:
    name, *options = (arg.format(tmp=tmp_path) for arg in command)
    done = bundlefmt(name, hostile_bundle, *options)
    assert "Traceback" not in done.stderr
    assert all(line.isprintable() for line in (done.stdout + done.stderr).split("\n"))


def test_an_error_escapes_control_characters(tmp_path: Path) -> None:
    done = bundlefmt("inspect", tmp_path / f"missing{ESCAPE}")
    assert done.returncode == 2
    assert is_one_line(done.stderr)


# Pipes and terminals.


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("work", ["inspect", "verify", "doctor", "run, dense", "bench"])
def test_a_reader_that_has_gone_gives_no_traceback(
    demo_bundle: Path, tmp_path: Path, work: str, unbuffered: bool
) -> None:
    for extra in ([], ["--json"]):
        reading, writing = os.pipe()
        os.close(reading)
        options = ["-u"] if unbuffered else []
        args = filled(WORK[work], demo_bundle, tmp_path)
        done = python(*options, "-m", "bundlefmt", *args, *extra, stdout=writing)
        os.close(writing)
        assert done.stderr == ""


@pytest.mark.parametrize("args", [["--help"], ["pack", "--help"], ["--version"]])
def test_a_reader_of_help_that_has_gone_gives_no_traceback(args: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = bundlefmt(*args, stdout=writing)
    os.close(writing)
    assert done.stderr == ""


def test_a_reader_that_takes_one_byte_gives_no_traceback(demo_bundle: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "bundlefmt", "inspect", str(demo_bundle), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as process:
        head = subprocess.run(
            ["head", "-c", "1"], stdin=process.stdout, capture_output=True, check=True
        )
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert head.stdout == b"{"


def test_a_terminal_sees_progress_and_a_pipe_does_not(tmp_path: Path) -> None:
    work = ["pack", DEMO, "-o", tmp_path / "new.bundle", "--force"]
    terminal, end = pty.openpty()
    try:
        done = bundlefmt(*work, stderr=end)
        os.close(end)
        shown = os.read(terminal, 65536).decode()
    finally:
        os.close(terminal)
    assert done.returncode == 0
    assert "packing" in shown
    assert re.search(r"\d", done.stdout) and "packing" not in done.stdout
    assert bundlefmt(*work).stderr == ""


# Imports.


@pytest.fixture
def lures(tmp_path: Path) -> Path:
    """A folder of modules under the names of heavy packages, so that none has to be there."""
    for name in ("torch", "transformers", "mlx", "jax"):
        (tmp_path / f"{name}.py").touch()
    return tmp_path


HEAVY = {"torch", "transformers", "mlx", "jax", "numpy", "ml_dtypes", "rich", "tokenizers"}


def _imported(code: str, lures: Path) -> set[str]:
    done = python("-c", f"{code}\nimport sys; print(*sys.modules, file=sys.stderr)", path=lures)
    assert done.returncode == 0
    return set(done.stderr.split())


def test_importing_the_package_imports_nothing_heavy(lures: Path) -> None:
    modules = _imported("import bundlefmt", lures)
    assert "bundlefmt" in modules
    assert not modules & HEAVY


def test_help_imports_nothing_heavy(lures: Path) -> None:
    code = "from bundlefmt.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    modules = _imported(code, lures)
    assert "bundlefmt.cli.pack" in modules
    assert not modules & HEAVY


def test_running_a_model_imports_no_framework(demo_bundle: Path, lures: Path) -> None:
    code = (
        "from bundlefmt.cli import main\n"
        f"main(['run', {str(demo_bundle)!r}, '--prompt', 'A', '--max-new-tokens', '2', '--json'])"
    )
    modules = _imported(code, lures)
    assert "numpy" in modules
    assert not modules & {"torch", "transformers", "mlx", "jax"}


def test_a_function_of_the_package_is_one_whatever_was_imported_before() -> None:
    code = (
        "import importlib, pkgutil, bundlefmt\n"
        "apart = ('bundlefmt.__main__', 'bundlefmt.integrations.')\n"
        "for found in pkgutil.walk_packages(bundlefmt.__path__, 'bundlefmt.'):\n"
        "    if not found.name.startswith(apart): importlib.import_module(found.name)\n"
        "print(*(n for n in bundlefmt.__all__ if not callable(getattr(bundlefmt, n))))"
    )
    done = python("-c", code)
    assert (done.stdout.split(), done.stderr) == (["__version__"], "")
