"""Speculative decoding changes how fast a text comes, and nothing in the text."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import bundlefmt
from bundlefmt.cli import main
from bundlefmt.errors import UsageError
from bundlefmt.runtime.generate import Model
from tests.conftest import DEMO, FIXTURES, without_sanitizers
from tests.test_memory import PLENTY, least_memory, with_random_predictors

PROMPT = [50, 60, 70, 80, 90]
NEW = 24
Tensors = dict[str, NDArray[Any]]

pytestmark = pytest.mark.usefixtures("steady_process")


def repacked(
    source: Path, folder: Path, edit: Callable[[Tensors], Tensors] = dict, **changes: Any
) -> Path:
    """A checkpoint with other tensors and values in its config, packed."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("reference.npz"))
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    path = folder.with_suffix(".bundle")
    bundlefmt.pack(folder, path)
    return path


def first_layers(tensors: Tensors, count: int = 3) -> Tensors:
    numbers = {name: re.search(r"layers\.(\d+)\.", name) for name in tensors}
    return {name: t for name, t in tensors.items() if not (n := numbers[name]) or int(n[1]) < count}


def with_tokens_mixed_up(tensors: Tensors) -> Tensors:
    return {name: t[::-1].copy() if "embed_tokens" in name else t for name, t in tensors.items()}


@pytest.fixture(scope="module")
def target(demo_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, with predictors."""
    path = Path(shutil.copy(demo_bundle, tmp_path_factory.mktemp("target")))
    with_random_predictors(path)
    return path


@pytest.fixture(scope="module")
def drafts(target: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model itself, its first layers, and one that takes each token for another."""
    folder = tmp_path_factory.mktemp("drafts")
    return {
        "itself": target,
        "shallow": repacked(DEMO, folder / "shallow", first_layers, num_hidden_layers=3),
        "confused": repacked(DEMO, folder / "confused", with_tokens_mixed_up),
    }


def spoken(
    model: Model, draft: Model, ids: list[int] = PROMPT, new: int = NEW, draft_tokens: int = 4
) -> list[int]:
    """A text made with a draft, of which the model's account is right."""
    made = model.generate(ids, new, draft=draft, draft_tokens=draft_tokens)
    stats = model.draft_stats
    assert stats.made == max(len(made) - 1, 0)  # the first token comes out of the prompt's pass
    assert stats.accepted <= stats.proposed <= draft_tokens * stats.passes
    if len(made) == new:
        assert stats.accepted + stats.passes == stats.made
    return made


@pytest.mark.parametrize("memory", [None, "some", "window", PLENTY])
@pytest.mark.parametrize("name", ["itself", "shallow", "confused"])
@pytest.mark.parametrize("mode", ["dense", "exact", "predict"])
def test_the_text_is_the_one_without_a_draft(
    mode: str, name: str, memory: Any, target: Path, drafts: dict[str, Path]
) -> None:
    options: dict[str, Any] = {"mode": mode, "tokens": 64}
    if memory == "window":
        options |= {"policy": "window", "window": 3}
    if isinstance(memory, str):
        memory = least_memory(target, **options) + (1 << 20)
    with bundlefmt.load_model(target, memory=memory, **options) as model:
        expected = model.generate(PROMPT, NEW)
    with (
        bundlefmt.load_model(drafts[name], memory=PLENTY) as draft,
        bundlefmt.load_model(target, memory=memory, **options) as model,
    ):
        assert spoken(model, draft) == expected
        stats = model.draft_stats
        if name == "confused":
            assert stats.accepted_rate < 0.1
        elif name == "itself" and mode != "predict":
            assert stats.accepted_rate == 1
            assert stats.passes == 5  # 23 tokens, five a pass


@pytest.mark.parametrize("draft_tokens", [1, 2, 15])
@pytest.mark.parametrize("new", [0, 1, 2, 3, 17, 18])
def test_no_more_is_proposed_than_is_wanted(
    draft_tokens: int, new: int, target: Path, drafts: dict[str, Path]
) -> None:
    for name in ("itself", "shallow"):
        with (
            bundlefmt.load_model(drafts[name]) as draft,
            bundlefmt.load_model(target, mode="exact") as model,
        ):
            expected = model.generate(PROMPT, new)
            assert spoken(model, draft, new=new, draft_tokens=draft_tokens) == expected
            if name == "itself":  # each token is proposed, or the one that a pass adds
                stats = model.draft_stats
                assert stats.proposed + stats.passes == max(new - 1, 0)


def test_a_text_may_fill_the_context(target: Path, drafts: dict[str, Path]) -> None:
    ids = np.random.default_rng(3).integers(3, 1000, 245).tolist()
    for name in ("itself", "shallow"):
        with (
            bundlefmt.load_model(drafts[name]) as draft,
            bundlefmt.load_model(target) as model,
        ):
            assert spoken(model, draft, ids, 12) == model.generate(ids, 12)
            with pytest.raises(UsageError, match="context"):
                model.generate(ids, 13, draft=draft)


@pytest.mark.parametrize("context", [4, 5, 6, 12, 40])
def test_a_draft_of_a_shorter_context_proposes_while_it_can(context: int, tmp_path: Path) -> None:
    short = repacked(FIXTURES / "llama", tmp_path / "short", max_position_embeddings=context)
    with (
        bundlefmt.load_model(short) as draft,
        bundlefmt.load_model(repacked(FIXTURES / "llama", tmp_path / "model")) as model,
    ):
        assert spoken(model, draft) == model.generate(PROMPT, NEW)
        assert (model.draft_stats.proposed > 0) == (context > len(PROMPT))


@pytest.mark.parametrize("end", range(6))
def test_a_text_ends_where_it_ends_without_a_draft(end: int, tmp_path: Path) -> None:
    """Whatever the place of the last token among the proposals."""
    with bundlefmt.load_model(repacked(FIXTURES / "llama", tmp_path / "whole")) as model:
        decoded = model.generate(PROMPT, 16)
    path = repacked(FIXTURES / "llama", tmp_path / "model", eos_token_id=decoded[end])
    expected = decoded[: decoded.index(decoded[end]) + 1]
    with bundlefmt.load_model(path) as draft, bundlefmt.load_model(path) as model:
        assert spoken(model, draft, new=16) == model.generate(PROMPT, 16) == expected
    with (
        bundlefmt.load_model(tmp_path / "whole.bundle") as draft,  # which goes on
        bundlefmt.load_model(path) as model,
    ):
        assert spoken(model, draft, new=16) == expected
        assert model.draft_stats.accepted <= model.draft_stats.made


@pytest.mark.parametrize("case", ["opt", "llama", "falcon", "mistral"])
def test_tokens_that_were_dropped_leave_no_trace(case: str, tmp_path: Path) -> None:
    bundlefmt.pack(FIXTURES / case, tmp_path / "model.bundle")
    with bundlefmt.load_model(tmp_path / "model.bundle", memory=PLENTY) as model:
        expected = model.logits([*PROMPT, 3, 4, 5])
        seen = model.decoder.new_cache()
        hidden = [model.decoder.forward(PROMPT, seen)]
        for kept, dropped in (([3], [9, 8, 7]), ([], [6]), ([4, 5], [])):
            found = model.decoder.forward(kept + dropped, seen)
            model.decoder.drop(len(dropped), seen)
            hidden.append(found[: len(kept)])
        found = model.decoder.logits(np.concatenate(hidden))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["exact", "predict"])
def test_a_window_forgets_the_neurons_of_dropped_tokens(mode: str, target: Path) -> None:
    options: dict[str, Any] = {"memory": PLENTY, "mode": mode, "policy": "window", "window": 2}
    options["ahead"] = False  # a guess may bring others
    held = []
    for dropped in ([], [9, 8, 7]):
        with bundlefmt.load_model(target, **options) as model:
            seen = model.decoder.new_cache()
            for token in PROMPT:
                model.decoder.forward([token], seen)
            model.decoder.forward([100, 101, *dropped], seen)
            model.decoder.drop(len(dropped), seen)
            model.decoder.forward([102], seen)
            held.append([cache.neurons.tolist() for cache in model.caches if cache])
    assert held[0] == held[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_tokens": 0}, r"draft_tokens.*expected 1\.\.15"),
        ({"draft_tokens": 16}, r"draft_tokens.*expected 1\.\.15"),
        ({"temperature": 0.5}, "temperature"),
    ],
    ids=str,
)
def test_what_cannot_be_drafted_is_refused(
    options: dict[str, Any], message: str, target: Path
) -> None:
    with (
        bundlefmt.load_model(target) as model,
        pytest.raises(UsageError, match=message),
    ):
        model.generate(PROMPT, 4, draft=model, **options)


def test_a_draft_of_other_tokens_is_refused_with_both_names(
    target: Path, small_bundle: Path, tmp_path: Path
) -> None:
    with (
        bundlefmt.load_model(target) as model,
        bundlefmt.load_model(small_bundle) as draft,
        pytest.raises(UsageError, match=rf"{small_bundle.name}.*vocabulary.*{target.name}"),
    ):
        model.generate(PROMPT, 4, draft=draft)
    swapped = tmp_path / "swapped"
    shutil.copytree(DEMO, swapped)
    tokenizer = json.loads((swapped / "tokenizer.json").read_text())
    tokens = tokenizer["model"]["vocab"]
    tokens["A"], tokens["B"] = tokens["B"], tokens["A"]
    (swapped / "tokenizer.json").write_text(json.dumps(tokenizer))
    bundlefmt.pack(swapped, tmp_path / "swapped.bundle")
    with pytest.raises(UsageError, match=rf"swapped\.bundle.*other tokens.*{target.name}"):
        bundlefmt.run(target, "ROMEO:", 4, draft=tmp_path / "swapped.bundle")


def test_the_command_says_what_the_draft_brought(
    target: Path, drafts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    work = ["run", str(target), "--prompt", "ROMEO:", "--max-new-tokens", "20", "--mode", "exact"]
    alone = bundlefmt.run(target, "ROMEO:", 20, mode="exact")
    assert alone.draft is None
    assert main([*work, "--draft", str(drafts["shallow"]), "--draft-tokens", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == alone.text
    draft = found["draft"]
    assert draft["path"] == str(drafts["shallow"])
    assert draft["accepted"] + draft["passes"] == found["new_tokens"] - 1 == 19
    assert draft["accepted_rate"] == draft["accepted"] / draft["proposed"]
    assert draft["tokens_per_pass"] == 19 / draft["passes"]
    assert 0 < draft["seconds"] < found["seconds"]
    assert main([*work, "--draft", str(target)]) == 0
    assert "15 of 15 tokens accepted (100.0 %), 4.75 per pass" in capsys.readouterr().out


@without_sanitizers("they keep memory of their own")
def test_the_process_keeps_within_its_limit_with_its_draft(target: Path) -> None:
    command = [sys.executable, "-P", "-m", "bundlefmt", "run", str(target), "--prompt", "ROMEO:"]
    command += ["--mode", "exact", "--json"]

    def least(*draft: str) -> int:
        refused = subprocess.run(
            [*command, *draft, "--memory", "1M"], capture_output=True, text=True, env=os.environ
        )
        return int(re.findall(r"\((\d+) bytes\): --memory", refused.stderr)[0])

    draft = ("--draft", str(target))
    with bundlefmt.open(target) as file:
        neurons = sum(group.bundles.length for group in file.groups)
    memory = least(*draft)
    assert memory - least() > neurons  # and its tensors, keys and values
    memory += 2 << 20
    done = subprocess.run(
        [*command, *draft, "--memory", str(memory)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["peak_memory"] <= memory
