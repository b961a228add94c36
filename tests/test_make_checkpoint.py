"""Made checkpoints are such as their families': they pack, and they run."""

from __future__ import annotations

from pathlib import Path

import pytest

import bundlefmt
from tools import make_checkpoint

FAMILIES = {
    "opt-6.7b": ("opt", "relu", ["up", "down"]),
    "falcon-7b": ("falcon", "relu", ["up", "down"]),
    "persimmon-8b": ("persimmon", "relu2", ["up", "down"]),
    "phi-2": ("phi", "relu", ["up", "down"]),
    "llama-2-7b": ("llama", "fatrelu", ["gate", "up", "down"]),
}


@pytest.mark.parametrize("name", make_checkpoint.MODELS)
def test_every_shape_packs_and_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make_checkpoint.MODELS[name]._replace(vocab=512, head=32)
    monkeypatch.setitem(make_checkpoint.MODELS, name, small)
    make_checkpoint.make(tmp_path / "model", layers=2, d_model=64, ffn=160, model=name)

    planned = bundlefmt.pack(tmp_path / "model", tmp_path / "model.bundle", dry_run=True)
    assert (planned.family, planned.activation) == FAMILIES[name][:2]
    assert not (tmp_path / "model.bundle").exists()

    bundlefmt.pack(tmp_path / "model", tmp_path / "model.bundle")
    with bundlefmt.load_model(tmp_path / "model.bundle") as model:
        assert [part.name for part in model.file.groups[1].parts] == FAMILIES[name][2]
        assert model.logits([5, 6, 7]).shape == (3, 512)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("opt-6.7b", 6.66),
        ("falcon-7b", 6.92),
        ("persimmon-8b", 9.4),
        ("phi-2", 2.78),
        ("llama-2-7b", 6.74),
    ],
)
def test_the_shapes_are_the_true_ones(name: str, parameters: float) -> None:
    tensors = make_checkpoint.shapes(make_checkpoint.MODELS[name])
    found = sum(map(make_checkpoint.nbytes, tensors.values())) / 2
    assert found / 1e9 == pytest.approx(parameters, abs=0.01)
