"""Whether `run --memory` keeps its promise: runs in control groups with the same limit.

    python -m bench.memory_limits --folder /big/disk --runs 60

Each run is a process of its own, which the kernel ends if it takes more than its limit
(`bench.paper.limits`). Models, modes, policies, backends, prompts and drafts are mixed so that each
meets the others; limits are the least that the run itself names, that and a tenth, and what holds
half and all of the FFN beside it. A run is over when it was ended for its memory, or when the most
that it had in memory, page tables included, was more than the limit. Exits with 1 if any was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import bundlefmt
from bench.paper.limits import Finished, MemoryGroup
from bundlefmt.errors import BundleError
from bundlefmt.layout.header import Predictor
from bundlefmt.runtime.memory import POLICIES
from tools import make_checkpoint

_PLENTY = 8 << 30
_SECONDS = 1200.0
_MIB = 1 << 20
_RANK = 64  # of the predictors that models get

# What a run's process says at its end: the most that was in memory, and its page tables.
_PROGRAM = """
import re, sys
from bundlefmt.cli import main
status = main(sys.argv[1:])
found = dict(re.findall(r"(Vm\\w+):\\s+(\\d+) kB", open("/proc/self/status").read()))
print("taken", 1024 * int(found["VmHWM"]), 1024 * int(found["VmPTE"]), file=sys.stderr)
sys.exit(status)
"""


class Made(NamedTuple):
    """A model that `make_checkpoint` writes: whose shape, layers, d_model, neurons."""

    shape: str
    layers: int
    d_model: int
    ffn: int


MADE = {
    "opt": Made("opt-6.7b", 12, 1024, 4096),
    "llama": Made("llama-2-7b", 4, 2048, 5504),
    "phi": Made("phi-2", 4, 1280, 5120),
    "persimmon": Made("persimmon-8b", 3, 512, 2048),
}
DRAFTS = {"opt": Made("opt-6.7b", 2, 256, 1024)}
DEMO = "demo"
_HEADING = (
    f"{'model':<10} {'mode':<16} {'policy':<7} {'backend':<9} {'words':>5} {'draft':<6} "
    f"{'limit':<16}" + "".join(f"{name:>9}" for name in ("MiB", "taken", "tables", "left"))
)
MODES = ("dense", "exact", "topk", "predict", "predict, trained")
LIMITS = ("least", "least + 10 %", "half of the FFN", "all of the FFN")
BACKENDS = ("auto", "direct", "buffered")
PROMPTS = (8, 300)  # tokens, or what the context has room for
NEW_TOKENS = 6


@dataclass(frozen=True)
class Case:
    """One run, but for its limit in bytes."""

    model: str
    mode: str
    limit: str
    policy: str
    backend: str
    prompt: int
    draft: bool


@dataclass(frozen=True)
class Outcome:
    """A run's limit, the most that it had in memory and its page tables, in bytes; `note` says
    what went wrong."""

    case: Case
    limit: int
    taken: int
    tables: int
    note: str

    @property
    def over(self) -> bool:
        return bool(self.note) or self.taken + self.tables > self.limit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="for the models (default: a new one)")
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--models", nargs="+", choices=[DEMO, *MADE], default=[DEMO, *MADE])
    parser.add_argument("--seed", type=int, default=0, help="of the mix")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        print(_HEADING)
        try:
            outcomes = [_shown(run(folder, case)) for case in cases(args)]
        except BundleError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    over = sum(outcome.over for outcome in outcomes)
    print(f"\n{len(outcomes)} runs, {over} over their limit")
    return 1 if over else 0


def cases(args: argparse.Namespace) -> list[Case]:
    """So many runs, every model in every mode first, the rest of them mixed."""
    mixed = random.Random(args.seed)
    found: list[Case] = []
    turns = itertools.cycle(itertools.product(args.models, MODES))
    limits, policies = itertools.cycle(LIMITS), itertools.cycle(POLICIES)
    for model, mode in itertools.islice(turns, args.runs):
        policy, limit = next(policies), next(limits)
        if len(found) % len(LIMITS) == len(LIMITS) - 1:
            next(policies)  # so that each policy meets each limit
        draft = mixed.random() < 0.3 and (model == DEMO or model in DRAFTS)
        backend = mixed.choice(BACKENDS)
        found.append(Case(model, mode, limit, policy, backend, mixed.choice(PROMPTS), draft))
    return found


def run(folder: Path, case: Case) -> Outcome:
    """Run a case within its limit, which a first run with too little names."""
    mode, _, trained = case.mode.partition(", ")
    path = bundle(folder, case.model, trained=bool(trained))
    command = ["run", str(path), "--prompt", prompt(path, case.prompt), "--json"]
    command += ["--mode", mode, "--policy", case.policy, "--backend", case.backend]
    command += ["--max-new-tokens", str(NEW_TOKENS)]
    if case.policy == "window":
        command += ["--window", "3"]
    if case.draft:
        command += ["--draft", str(draft(folder, case.model))]
    refused = _in_group(_PLENTY, [*command, "--memory", "1"])
    named = re.search(r"--memory (\d+)MiB", refused.err)
    if named is None:
        return Outcome(case, 0, 0, 0, f"no least limit: {refused.err.strip()[-200:]}")
    least = int(named[1]) * _MIB
    ffn = _ffn_bytes(path)
    limit = {
        "least": least,
        "least + 10 %": least * 11 // 10,
        "half of the FFN": least + ffn // 2,
        "all of the FFN": least + ffn * 11 // 10,
    }[case.limit]
    ended = _in_group(limit, [*command, "--memory", str(limit)])
    taken = re.search(r"^taken (\d+) (\d+)$", ended.err, re.MULTILINE)
    note = "ended by the kernel" if ended.killed_for_memory else ""
    if not note and ended.timed_out:
        note = "not done in time"
    if not note and ended.status:
        note = f"status {ended.status}: {ended.err.strip()[-200:]}"
    high, tables = map(int, taken.groups()) if taken else (0, 0)
    return Outcome(case, limit, high, tables, note)


def bundle(folder: Path, model: str, *, trained: bool) -> Path:
    """The model's bundle file, made where it is not there."""
    path = folder / f"{model}.bundle"
    if not path.exists():
        if model == DEMO:
            bundlefmt.pack(Path(bundlefmt.__file__).parent / "demo_model", path)
        else:
            _make(path, MADE[model])
    if not trained:
        return path
    copy = folder / f"{model}-trained.bundle"
    if not copy.exists():
        shutil.copy(path, copy)
        _add_predictors(copy)
    return copy


def draft(folder: Path, model: str) -> Path:
    """A draft for the model; the demo model is its own."""
    if model == DEMO:
        return bundle(folder, model, trained=False)
    path = folder / f"{model}-draft.bundle"
    if not path.exists():
        _make(path, DRAFTS[model])
    return path


def prompt(path: Path, tokens: int) -> str:
    """A text of so many tokens, or of what the model's context has room for."""
    with bundlefmt.open(path) as file:
        config = file.config
    room = config["max_position_embeddings"] - NEW_TOKENS
    words = min(tokens, room) if path.name.startswith(tuple(MADE)) else min(tokens, room) // 6
    return " ".join(f"t{turn % 1000}" for turn in range(words))


def _make(path: Path, made: Made) -> None:
    folder = path.with_suffix(".checkpoint")
    make_checkpoint.make(folder, made.layers, made.d_model, made.ffn, model=made.shape)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer(
        WordLevel({f"t{token}": token for token in range(config["vocab_size"])}, unk_token="t0")
    )
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    bundlefmt.pack(folder, path)
    shutil.rmtree(folder)


def _add_predictors(path: Path) -> None:
    """Predictors of random numbers, which name half of the neurons."""
    numbers = np.random.default_rng(0)
    with bundlefmt.open(path) as file:
        groups = file.groups
    entries, tensors = [], {}
    for group in groups:
        names = f"a{group.layer}", f"b{group.layer}"
        shapes = (_RANK, group.d_model), (group.neurons, _RANK)
        for name, shape in zip(names, shapes, strict=True):
            tensors[name] = numbers.standard_normal(shape, dtype=np.float32)
        entries.append(Predictor(group.layer, *names, threshold=0.5))
    bundlefmt.append(path, tensors=tensors, predictors=entries)


def _in_group(limit: int, command: Sequence[str]) -> Finished:
    with MemoryGroup(limit) as group:
        return group.run([sys.executable, "-P", "-c", _PROGRAM, *command], seconds=_SECONDS)


def _ffn_bytes(path: Path) -> int:
    with bundlefmt.open(path) as file:
        return sum(group.bundles.length for group in file.groups)


def _shown(outcome: Outcome) -> Outcome:
    case = outcome.case
    sizes = [outcome.limit, outcome.taken, outcome.tables, outcome.limit - outcome.taken]
    print(
        f"{case.model:<10} {case.mode:<16} {case.policy:<7} {case.backend:<9} "
        f"{case.prompt:>5} {'draft' if case.draft else '-':<6} {case.limit:<16}"
        + "".join(f"{size / _MIB:9.1f}" for size in sizes)
        + (f"  OVER {outcome.note}" if outcome.over else ""),
        flush=True,
    )
    return outcome


if __name__ == "__main__":
    sys.exit(main())
