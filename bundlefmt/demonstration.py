"""The demo: the small ReLU model that ships with the package, dense against exact."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from bundlefmt.convert.pack import PackReport, pack
from bundlefmt.runtime.run import RunReport, run

PROMPT = "ROMEO:"
MODES = ("dense", "exact")  # which give the same text
NEW_TOKENS = 96
TEMPERATURE, TOP_P, SEED = 0.7, 0.9, 1  # so small a model repeats itself when it is greedy


@dataclass(frozen=True)
class DemoReport:
    """The pack of the demo model and one run per mode."""

    prompt: str
    packed: PackReport
    runs: list[RunReport]

    @property
    def same_text(self) -> bool:
        """Whether every mode gave the same text."""
        return len({run.text for run in self.runs}) == 1


def demo(prompt: str = PROMPT, max_new_tokens: int = NEW_TOKENS) -> DemoReport:
    """Pack the demo model into a temporary folder and continue `prompt` from it in each mode.

    Raises WriteError when there is no room for it.
    """
    with (
        resources.as_file(resources.files("bundlefmt") / "demo_model") as model,
        tempfile.TemporaryDirectory(prefix="bundlefmt-demo-") as folder,
    ):
        path = Path(folder) / "demo.bundle"
        packed = pack(model, path)
        runs = [
            run(
                path,
                prompt,
                max_new_tokens,
                mode=mode,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                seed=SEED,
            )
            for mode in MODES
        ]
    return DemoReport(prompt, packed, runs)
