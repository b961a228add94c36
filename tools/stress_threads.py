"""Generations of one model in several threads at once, each held against the same one made alone.

    python -m tools.stress_threads --generations 1000 --threads 2

Exit status 1 when a token is wrong.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import bundlefmt
from bundlefmt import native

MODES = ("dense", "exact", "topk")
NEW_TOKENS = 12
PROMPTS = 40


def main() -> int:
    """Run; print a line for each mode."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", help="a bundle file (default: the demo model)")
    parser.add_argument("--generations", type=int, default=1000, help="in all modes together")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    native.require()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or Path(folder, "demo.bundle")
        if args.model is None:
            bundlefmt.pack(Path(bundlefmt.__file__).parent / "demo_model", path)
        for mode in MODES:
            count = -(-args.generations // len(MODES))
            found = wrong_generations(path, mode, count, args.threads)
            print(f"{mode}: {found} of {count} generations in {args.threads} threads wrong")
            wrong += found
    return 1 if wrong else 0


def wrong_generations(path: str | Path, mode: str, count: int, threads: int) -> int:
    """How many of `count` generations are not what the model makes of the prompt alone."""
    chosen = random.Random(0)
    with bundlefmt.load_model(path, mode=mode) as model, ThreadPoolExecutor(threads) as pool:
        vocabulary = model.decoder.vocabulary
        prompts = [
            [chosen.randrange(vocabulary) for _ in range(chosen.randint(1, 32))]
            for _ in range(PROMPTS)
        ]
        alone = [model.generate(prompt, NEW_TOKENS) for prompt in prompts]
        turns = [chosen.randrange(PROMPTS) for _ in range(count)]
        made = pool.map(lambda turn: model.generate(prompts[turn], NEW_TOKENS), turns)
        return sum(text != alone[turn] for turn, text in zip(turns, made, strict=True))


if __name__ == "__main__":
    sys.exit(main())
