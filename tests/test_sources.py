"""The files of a checkpoint: which are taken, each opened once, none from outside its folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

import bundlefmt
from bundlefmt.checkpoints import foreign
from bundlefmt.errors import BundleError, FormatError, ReadError, UsageError
from tests.conftest import FIXTURES

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")

Change = Callable[[Path], None]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the `llama` fixture, with a tokenizer's file beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (WEIGHTS, "config.json"):
        shutil.copy(FIXTURES / "llama" / name, folder)
    (folder / "vocab.json").write_text("{}")
    return folder


def sharded(folder: Path, below: str = "") -> dict[str, str]:
    """Make the folder's weights two shards, in a folder `below`; returns the weight map."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    (folder / below).mkdir(exist_ok=True)
    weight_map = {name: f"{below}{SHARDS['layers.1' in name]}" for name in tensors}
    for shard in set(weight_map.values()):
        save_file({n: a for n, a in tensors.items() if weight_map[n] == shard}, folder / shard)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def packed_tensor(path: Path, name: str) -> bytes:
    with bundlefmt.open(path) as file:
        return bytes(file.tensor_bytes(name))


# A file that changes while it is packed


def written_over(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"~")


def written_over_and_backdated(path: Path) -> None:
    before = path.stat()
    written_over(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy2(path, other)
    other.replace(path)


def removed(path: Path) -> None:
    path.unlink()


def folder_swapped(path: Path) -> None:
    shutil.copytree(path.parent, path.parent.with_name("copy"))
    path.parent.rename(path.parent.with_name("old"))
    path.parent.with_name("copy").rename(path.parent)


@pytest.mark.parametrize(
    "change", [written_over, written_over_and_backdated, replaced, removed, folder_swapped]
)
@pytest.mark.parametrize("name", [WEIGHTS, SHARDS[1], INDEX, "config.json", "vocab.json"])
def test_a_file_that_changes_while_it_is_packed_is_noticed(
    name: str, change: Change, model: Path, tmp_path: Path
) -> None:
    if name in (*SHARDS, INDEX):
        sharded(model)
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        if not calls:
            change(model / name)
        calls.append(done)

    with pytest.raises(ReadError, match="changed while it was packed") as caught:
        bundlefmt.pack(model, tmp_path / "x.bundle", progress=progress)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if "bundle" in path.name]


def test_a_file_is_read_as_it_was_opened_even_when_its_name_passes_on(
    model: Path, tmp_path: Path
) -> None:
    """Were it opened anew for each tensor, the second half would be zeros."""
    seen: list[bytes] = []

    def progress(done: int, total: int) -> None:
        if not seen:
            zeros = model / "zeros"
            zeros.write_bytes(bytes((model / WEIGHTS).stat().st_size))
            zeros.replace(model / WEIGHTS)
        (partial,) = (path for path in tmp_path.iterdir() if path.suffix == ".partial")
        seen.append(partial.read_bytes())

    with pytest.raises(ReadError):
        bundlefmt.pack(model, tmp_path / "x.bundle", progress=progress)
    norm = load_file(FIXTURES / "llama" / WEIGHTS)["model.norm.weight"].tobytes()
    assert norm in seen[-1]


# Which weights are taken


def test_the_single_file_is_taken_before_an_index_as_transformers_does(
    model: Path, tmp_path: Path
) -> None:
    write_index(model, {"model.norm.weight": "gone-00001-of-00001.safetensors"})
    report = bundlefmt.pack(model, tmp_path / "x.bundle")
    assert [note for note in report.notes if WEIGHTS in note and INDEX in note]
    with bundlefmt.open(tmp_path / "x.bundle") as file:
        assert INDEX not in file.blob_names
        assert [source.name for source in file.header.sources] == [WEIGHTS]


def test_the_config_may_name_the_weights(model: Path, tmp_path: Path) -> None:
    shutil.copy(model / WEIGHTS, model / "other.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps(config | {"transformers_weights": "other.safetensors"})
    )
    bundlefmt.pack(model, tmp_path / "x.bundle")
    with bundlefmt.open(tmp_path / "x.bundle") as file:
        assert [source.name for source in file.header.sources] == ["other.safetensors"]


def test_shards_in_a_folder_below_are_packed_and_come_back_beside_their_index(
    model: Path, tmp_path: Path
) -> None:
    sharded(model, "sub/")
    bundlefmt.pack(model, tmp_path / "x.bundle")
    bundlefmt.unpack(tmp_path / "x.bundle", tmp_path / "out")
    for shard in SHARDS:
        assert (tmp_path / "out" / shard).read_bytes() == (model / "sub" / shard).read_bytes()
    bundlefmt.pack(tmp_path / "out", tmp_path / "y.bundle")  # its index leads to them
    x, y = tmp_path / "x.bundle", tmp_path / "y.bundle"
    assert packed_tensor(x, "model.norm.weight") == packed_tensor(y, "model.norm.weight")


def test_two_shards_of_one_file_name_are_refused(model: Path, tmp_path: Path) -> None:
    weight_map = sharded(model)
    for folder, shard in zip(("a", "b"), SHARDS, strict=True):
        (model / folder).mkdir()
        (model / shard).rename(model / folder / "w.safetensors")
    places = {SHARDS[0]: "a/w.safetensors", SHARDS[1]: "b/w.safetensors"}
    write_index(model, {name: places[shard] for name, shard in weight_map.items()})
    with pytest.raises(FormatError, match=r"b/w\.safetensors: two shards of one file name"):
        bundlefmt.pack(model, tmp_path / "x.bundle")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",  # a buffer of older versions
        "model.layers.2.self_attn.q_proj.weight",  # of a layer beyond the model's
        "model.layers.0.mlp.gate_proj.lora_A.weight",
        "score.weight",
    ],
)
def test_a_tensor_that_only_the_index_knows_and_nobody_needs_is_no_hindrance(
    name: str, model: Path, tmp_path: Path
) -> None:
    write_index(model, sharded(model) | {name: SHARDS[0]})
    report = bundlefmt.pack(model, tmp_path / "x.bundle")
    assert [note for note in report.notes if name in note]


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",  # untied
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    ],
)
def test_a_tensor_that_the_model_needs_and_no_shard_has_is_refused(
    name: str, model: Path, tmp_path: Path
) -> None:
    shard = model / sharded(model)[name]
    save_file({n: array for n, array in load_file(shard).items() if n != name}, shard)
    with pytest.raises(FormatError) as caught:
        bundlefmt.pack(model, tmp_path / "x.bundle", dry_run=True)
    assert name.removeprefix("model.") in str(caught.value)


def test_a_tied_head_need_not_be_there(model: Path, tmp_path: Path) -> None:
    shard = model / sharded(model)["lm_head.weight"]
    save_file({n: a for n, a in load_file(shard).items() if n != "lm_head.weight"}, shard)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert bundlefmt.pack(model, tmp_path / "x.bundle").head == "tied"


# Links


def outside(folder: Path, name: str) -> None:
    """Move a file out of the folder and leave a link."""
    path = folder.parent / f"outside-{Path(name).name}"
    (folder / name).rename(path)
    (folder / name).symlink_to(path)


@pytest.mark.parametrize("name", [WEIGHTS, SHARDS[0], INDEX, "config.json", "vocab.json"])
def test_a_link_that_leads_out_of_the_folder_is_refused(
    name: str, model: Path, tmp_path: Path
) -> None:
    if name in (*SHARDS, INDEX):
        sharded(model)
    outside(model, name)
    with pytest.raises(UsageError, match="leads out of the checkpoint's folder") as caught:
        bundlefmt.pack(model, tmp_path / "x.bundle")
    assert str(model / name) in str(caught.value)
    assert not (tmp_path / "x.bundle").exists()


def test_a_folder_below_that_is_a_link_out_is_refused(model: Path, tmp_path: Path) -> None:
    sharded(model, "sub/")
    (model / "sub").rename(tmp_path / "elsewhere")
    (model / "sub").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="leads out"):
        bundlefmt.pack(model, tmp_path / "x.bundle")


def test_links_within_the_folder_and_the_path_that_was_named_are_followed(
    model: Path, tmp_path: Path
) -> None:
    (model / "sub").mkdir()
    (model / WEIGHTS).rename(model / "sub" / "w")
    (model / WEIGHTS).symlink_to("sub/w")
    (tmp_path / "link").symlink_to(model)
    bundlefmt.pack(tmp_path / "link", tmp_path / "x.bundle")
    (tmp_path / "link.safetensors").symlink_to(model / "sub" / "w")
    bundlefmt.pack(tmp_path / "link.safetensors", tmp_path / "y.bundle")
    x, y = tmp_path / "x.bundle", tmp_path / "y.bundle"
    assert packed_tensor(x, "model.norm.weight") == packed_tensor(y, "model.norm.weight")


# The Hub's cache


@pytest.fixture
def snapshot(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The model as huggingface_hub keeps it; the current folder is another one."""
    repository = tmp_path / "hub" / "models--org--tiny"
    folder = repository / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for path in model.iterdir():
        path.rename(repository / "blobs" / f"blob-{path.name}")
        (folder / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    model.rmdir()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return folder


@pytest.mark.parametrize("given", ["folder", "file", "link"])
def test_a_model_in_the_hubs_cache_is_packed_into_the_current_folder(
    given: str, snapshot: Path, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(snapshot)
    source = {"folder": snapshot, "file": snapshot / WEIGHTS, "link": tmp_path / "link"}[given]
    before = sorted((tmp_path / "hub").rglob("*"))
    assert bundlefmt.pack(source).path == "tiny.bundle"
    assert sorted((tmp_path / "hub").rglob("*")) == before
    assert bundlefmt.verify("tiny.bundle").ok


def test_a_path_that_was_asked_for_is_obeyed(snapshot: Path, tmp_path: Path) -> None:
    bundlefmt.pack(snapshot, snapshot / "x.bundle")
    assert bundlefmt.verify(snapshot / "x.bundle").ok


@pytest.mark.parametrize("here", ["", "..", "../../..", "../../../.."])
def test_nothing_is_written_into_the_cache_by_default(
    here: str, snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(snapshot / here)
    inside = here != "../../../.."
    if inside:
        with pytest.raises(UsageError, match=r"in the Hub's cache.* give -o"):
            bundlefmt.pack(snapshot)
    else:
        assert bundlefmt.pack(snapshot).path == "tiny.bundle"


def test_a_link_from_a_snapshot_to_elsewhere_is_refused(snapshot: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (snapshot / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UsageError, match=r"vocab\.txt: leads out"):
        bundlefmt.pack(snapshot)


# What is no checkpoint

FOREIGN_FILES = {
    "model.gguf": (b"GGUF\3\0\0\0" + bytes(64), "a GGUF file"),
    "pytorch_model.bin": (b"PK\3\4\x14\0\0\0" + bytes(64), "PyTorch weights"),
    "model.pt": (b"\x80\2}q\0." + bytes(64), "PyTorch weights"),
    "consolidated.pth": (b"\x80\4\x95" + b"\1" * 64, "PyTorch weights"),
    "weights.npz": (b"PK\3\4\x14\0\0\0" + bytes(64), "NumPy arrays"),
    "tf_model.h5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "TensorFlow weights"),
}


@pytest.mark.parametrize("name", FOREIGN_FILES)
@pytest.mark.parametrize("whole_folder", [False, True])
def test_other_formats_are_named_with_what_to_do(
    name: str, whole_folder: bool, tmp_path: Path
) -> None:
    content, what = FOREIGN_FILES[name]
    (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=what) as caught:
        bundlefmt.pack(tmp_path if whole_folder else tmp_path / name, dry_run=True)
    assert re.search("save_pretrained|safetensors that|from the Hub", str(caught.value))


@pytest.mark.parametrize("given", ["", "adapter_model.safetensors"])
def test_an_adapter_is_no_model(given: str, model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    weights = load_file(model / WEIGHTS)["model.norm.weight"]
    save_file({"base_model.model.q.lora_A.weight": weights}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"LoRA adapter.*merge_and_unload"):
        bundlefmt.pack(adapter / given, dry_run=True)


def test_an_adapter_beside_a_model_is_left_out_and_said_so(model: Path, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (model / name).write_bytes(b"")
    report = bundlefmt.pack(model, tmp_path / "x.bundle")
    (note,) = report.notes
    assert "left out" in note
    assert "adapter_model.safetensors" in note


@pytest.mark.parametrize(
    ("path", "repository"),
    [
        ("org/name", "org/name"),
        ("hf://org/name", "org/name"),
        ("https://huggingface.co/org/name/", "org/name"),
        ("gpt2", None),
        ("/tmp/name", None),
        ("a/b/c", None),
    ],
)
def test_a_repository_on_the_hub_is_told_from_a_path(path: str, repository: str | None) -> None:
    assert foreign.hub_id(path) == repository


def test_a_repository_on_the_hub_has_to_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="hf download org/name --local-dir name"):
        bundlefmt.pack("org/name")


def test_a_repositorys_folder_of_the_cache_is_told_to_have_snapshots(snapshot: Path) -> None:
    with pytest.raises(UsageError, match="snapshots"):
        bundlefmt.pack(snapshot.parent.parent)


# What is no regular file


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_socket(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{here}/{path.name}")  # paths of sockets are short
    os.close(here)


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [a_pipe, a_folder, a_socket, a_link_to_nothing, a_link_to_itself])
@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "vocab.json"])
def test_what_is_no_regular_file_is_refused_and_never_waited_for(
    name: str, make: Change, model: Path, tmp_path: Path
) -> None:
    (model / name).unlink()
    make(model / name)
    with pytest.raises(UsageError) as caught:
        bundlefmt.pack(model, tmp_path / "x.bundle")
    assert str(model / name) in str(caught.value)


def test_a_target_that_is_no_regular_file_is_not_replaced(model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a regular file"):
        bundlefmt.pack(model, tmp_path / "pipe", force=True)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "x" * 5000 + "/config.json"])
@pytest.mark.parametrize("role", ["source", "target"])
def test_paths_that_no_system_takes_are_the_callers_fault(
    name: str, role: str, model: Path, tmp_path: Path
) -> None:
    paths = (tmp_path / name, None) if role == "source" else (model, tmp_path / name)
    with pytest.raises(UsageError) as caught:
        bundlefmt.pack(*paths)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../up", "a/../../up", ".", "", "a\0b", "x" * 5000, "\ud800", "a//b"]
)
def test_an_index_names_only_files_below_its_folder(name: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "up").write_bytes((model / WEIGHTS).read_bytes())
    (model / WEIGHTS).unlink()
    write_index(model, {"model.norm.weight": name})
    with pytest.raises(BundleError) as caught:
        bundlefmt.pack(model, tmp_path / "x.bundle")
    assert str(caught.value).startswith(str(model))


@pytest.mark.parametrize("name", ["config.json", "vocab.json", INDEX])
def test_a_small_file_that_is_huge_is_not_read(name: str, model: Path, tmp_path: Path) -> None:
    if name == INDEX:
        sharded(model)
    os.truncate(model / name, 1 << 40)
    with pytest.raises(FormatError, match=f"{name}: file too large"):
        bundlefmt.pack(model, tmp_path / "x.bundle")


def test_a_header_of_very_many_values_is_not_taken_apart(model: Path, tmp_path: Path) -> None:
    header = b"{" + b",".join([b'"a":0'] * (1 << 22)) + b"}"
    (model / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FormatError, match=r"at byte 8: too many values"):
        bundlefmt.pack(model, tmp_path / "x.bundle")


def test_a_crowded_folder_is_not_listed_whole(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{'x' * 40}-{i:03}").touch()
    with pytest.raises(UsageError) as caught:
        bundlefmt.pack(tmp_path)
    assert len(str(caught.value)) < 1000
