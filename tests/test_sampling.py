"""How a token is chosen, and what is said when the predictions are not numbers."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import bundlefmt
from bundlefmt.cli import main
from bundlefmt.errors import FormatError, UsageError
from bundlefmt.runtime.sampling import Sampling, choose, likeliest
from tests.conftest import DEMO

LOGITS = np.array([0.5, 3.0, -1.0, 2.9], dtype=np.float32)
NOT_NUMBERS = "the model's predictions are not numbers"


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [0, 0.0, np.float32(0), 1e-300, 5e-324, Fraction(1, 10**9)])
def test_no_or_nearly_no_temperature_takes_the_likeliest(temperature: Any) -> None:
    assert choose(LOGITS, Sampling(temperature), random()) == 1


def test_shares_are_those_of_the_softmax() -> None:
    chance = random()
    made = [choose(LOGITS, Sampling(0.7), chance) for _ in range(4000)]
    shares = np.exp(LOGITS / 0.7) / np.exp(LOGITS / 0.7).sum()
    assert np.bincount(made, minlength=4) / 4000 == pytest.approx(shares, abs=0.03)


@pytest.mark.filterwarnings("error")
def test_any_temperature_that_is_a_number_chooses_a_token() -> None:
    for temperature in (1e-320, 1e-38, 1.0, 1e38, 1e308, np.float16(2), np.int64(3)):
        assert choose(
            LOGITS, Sampling(temperature, np.float32(0.9), np.int64(5)), random()
        ) in range(4)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"temperature": None}, "temperature"),
        ({"temperature": 1j}, "temperature"),
        ({"temperature": np.array([1.0, 2.0])}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"top_p": math.inf}, "top_p"),
        ({"top_p": "x" * 100_000}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"seed": False}, "seed"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 10**30}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"max_new_tokens": "4"}, "max_new_tokens"),
        ({"max_new_tokens": None}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
    ],
)
def test_what_cannot_be_sampled_is_the_callers_fault(
    options: dict[str, Any], field: str, demo_bundle: Path
) -> None:
    with bundlefmt.load_model(demo_bundle) as model:
        for call in (
            lambda: model.generate([50, 60], **{"max_new_tokens": 2, **options}),
            lambda: bundlefmt.run(demo_bundle, "A", **options),
        ):
            with pytest.raises(UsageError, match=f"{field}: out of range") as caught:
                call()
            assert len(str(caught.value)) < 200


@pytest.mark.parametrize("option", [["--seed", "-1"], ["--temperature", "inf"], ["--top-p", "nan"]])
def test_such_an_option_is_one_line_and_status_2(
    option: list[str], demo_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(demo_bundle), "--prompt", "A", *option]) == 2
    said = capfd.readouterr()
    assert said.out == "" and said.err.count("\n") == 1


@pytest.mark.parametrize(
    "row", [[1.0, math.nan, 2.0], [math.nan] * 3, [1.0, math.inf, 2.0], [-math.inf] * 3]
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_without_a_likeliest_token_are_refused(row: list[float], temperature: float) -> None:
    logits = np.array(row, dtype=np.float32)
    with pytest.raises(FormatError, match=NOT_NUMBERS):
        choose(logits, Sampling(temperature), random())
    with pytest.raises(FormatError, match=NOT_NUMBERS):
        likeliest(np.stack([LOGITS[:3], logits]))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_token_that_is_ruled_out_is_not_chosen(temperature: float) -> None:
    logits = np.array([-math.inf, 1.0, -math.inf], dtype=np.float32)
    assert {choose(logits, Sampling(temperature), random(seed)) for seed in range(20)} == {1}


@pytest.fixture(scope="module")
def broken_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with NaN in its last norm."""
    return broken(tmp_path_factory.mktemp("broken"), "decoder.final_layer_norm.weight", np.nan)


def broken(folder: Path, end: str, number: float, dtype: Any = None) -> Path:
    """The demo model with one number all over the tensors whose names end so."""
    shutil.copytree(DEMO, folder / "model")
    tensors = load_file(folder / "model/model.safetensors")
    if dtype is not None:
        tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    for name in tensors:
        if name.endswith(end):
            tensors[name] = np.full_like(tensors[name], number)
    save_file(tensors, folder / "model/model.safetensors")
    bundlefmt.pack(folder / "model", folder / "model.bundle")
    return folder / "model.bundle"


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize(
    "end", ["fc1.weight", "fc2.weight", "fc2.bias", "q_proj.weight", "embed_tokens.weight"]
)
def test_numbers_that_overflow_are_told_of_once_without_warnings(
    end: str, dtype: Any, tmp_path: Path
) -> None:
    model = broken(tmp_path, end, np.inf, dtype)
    (tmp_path / "text").write_text("ROMEO: Good morrow")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in (
            lambda: bundlefmt.run(model, "ROMEO: Good", 3),
            lambda: bundlefmt.evaluate(model, tmp_path / "text"),
        ):
            with pytest.raises(FormatError, match=NOT_NUMBERS):
                call()


@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_a_model_that_does_not_predict_numbers_says_so_in_one_line(
    broken_bundle: Path, temperature: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("ROMEO: Good morrow")
    for command in (
        ["run", str(broken_bundle), "--prompt", "A", "--temperature", temperature],
        ["eval", str(broken_bundle), "--text", str(tmp_path / "text")],
    ):
        assert main(command) == 1
        said = capfd.readouterr().err
        assert said.count("\n") == 1
        assert f"{broken_bundle}: logits: {NOT_NUMBERS}: found nan" in said


def test_a_draft_that_does_not_predict_numbers_is_named(
    demo_bundle: Path, broken_bundle: Path
) -> None:
    for model, draft in ((demo_bundle, broken_bundle), (broken_bundle, demo_bundle)):
        with pytest.raises(FormatError, match=NOT_NUMBERS) as caught:
            bundlefmt.run(model, "A", 8, draft=draft)
        assert caught.value.file is not None
        assert Path(caught.value.file) == broken_bundle


@pytest.mark.parametrize("context", [1, 0, -3])
def test_a_model_that_sees_no_two_tokens_is_not_scored(tmp_path: Path, context: int) -> None:
    shutil.copytree(DEMO, tmp_path / "model")
    config = json.loads((DEMO / "config.json").read_text())
    config["max_position_embeddings"] = context
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    bundlefmt.pack(tmp_path / "model", tmp_path / "model.bundle")
    with pytest.raises(bundlefmt.BundleError, match="config") as caught:
        bundlefmt.evaluate(tmp_path / "model.bundle", DEMO / "README.md")
    assert str(caught.value).isprintable()
