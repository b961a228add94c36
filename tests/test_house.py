"""The package agrees with itself, its README and its command line."""

from __future__ import annotations

import re

import pytest

import bundlefmt
from bundlefmt.checkpoints.families import FAMILIES
from bundlefmt.cli import (
    COMMANDS,
    arguments,
    bench,
    calibrate,
    pack,
    reorder,
    run,
    train_predictors,
)
from bundlefmt.convert.plan import DTYPES
from bundlefmt.flash.predictor import RANK, RECALL
from bundlefmt.layout.planner import ALIGNMENTS
from bundlefmt.measurement.calibration import SECONDS
from bundlefmt.measurement.reads import DEFAULT_BATCH, ORDERS
from bundlefmt.measurement.target import DEFAULT_SIZE
from bundlefmt.ordering import GAP
from bundlefmt.prediction import EPOCHS
from bundlefmt.runtime.config import _DECODERS
from bundlefmt.runtime.memory import POLICIES
from bundlefmt.runtime.selection import MODES
from bundlefmt.runtime.speculative import DRAFT_TOKENS
from bundlefmt.storage.backends import CHOICES, DEFAULT_QUEUE_DEPTH, DEFAULT_THREADS
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_command_line_offers_what_the_package_has() -> None:
    # Written out in the commands, so that --help need not import NumPy.
    assert pack.DTYPES == DTYPES
    assert pack.ALIGNMENTS == ALIGNMENTS
    assert run.MODES == MODES
    assert arguments.POLICIES == POLICIES
    assert run.DRAFT_TOKENS == DRAFT_TOKENS
    assert arguments.BACKENDS == CHOICES
    assert arguments.THREADS == DEFAULT_THREADS
    assert arguments.QUEUE_DEPTH == DEFAULT_QUEUE_DEPTH
    assert arguments.BATCH == DEFAULT_BATCH
    assert arguments.ORDERS == ORDERS
    assert bench.SIZE == calibrate.SIZE == DEFAULT_SIZE
    assert calibrate.SECONDS == SECONDS
    assert (train_predictors.RANK, train_predictors.RECALL) == (RANK, RECALL)
    assert train_predictors.EPOCHS == EPOCHS
    assert reorder.GAP == GAP


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_a_function_and_in_the_readme(command: str) -> None:
    function = "evaluate" if command == "eval" else command  # `eval` is a builtin
    assert callable(getattr(bundlefmt, function.replace("-", "_")))
    assert f"bundlefmt {command}" in README


def test_every_public_name_is_there() -> None:
    for name in bundlefmt.__all__:
        assert getattr(bundlefmt, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        bundlefmt.no_such_name  # noqa: B018 - looking it up is the test


def test_the_readme_names_every_family_and_every_model_that_runs() -> None:
    said = re.sub(r"[^a-z0-9]", "", README.lower())
    aliases = {"phi": "phi2", "gpt_neox": "gptneox", "qwen3_moe": "qwen3moe"}
    for family in FAMILIES:
        assert aliases.get(family.name, family.name) in said, family.name
    for model_type in _DECODERS:
        assert model_type in said, model_type


@pytest.mark.parametrize(("text", "expected"), [("0", 0), ("0.25", 0.25), ("25%", 0.25), ("1", 1)])
def test_shares_are_read_as_people_write_them(text: str, expected: float) -> None:
    assert arguments.parse_share(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4096", 4096), ("4K", 4096), ("16KiB", 16384), ("1.5M", 3 << 19), ("7GiB", 7 << 30)],
)
def test_sizes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert arguments.parse_size(text) == expected
