"""Others, on the same checkpoint: PyTorch with weights offloaded to disk by accelerate, and with
weights that are the mapped files. Both optional: `pip install '.[tables]'`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NEEDED = ("torch", "transformers", "accelerate", "safetensors")


def missing() -> str | None:
    """Why the rows cannot be measured; None when they can."""
    lacking = [name for name in NEEDED if find_spec(name) is None]
    return f"needs {', '.join(lacking)}: pip install '.[tables]'" if lacking else None


def offloaded(folder: str, limit: int) -> Any:
    """As many layers as fit well below the limit in memory, the rest on disk."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float16,
        device_map="auto",
        max_memory={"cpu": limit * 2 // 3},  # a layer comes on top, and what loading takes
        offload_folder=tempfile.mkdtemp(),
    )


def mapped(folder: str, limit: int) -> Any:
    """Parameters that are views of the mapped safetensors files."""
    import torch
    from accelerate import init_empty_weights
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.float16
        )
    tensors: dict[str, Any] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def tokens(model: Any, ids: list[int], prompt_tokens: int) -> Iterator[float]:
    """Seconds of each token after the prompt, keys and values kept."""
    import torch

    with torch.inference_mode():
        made = model(torch.tensor([ids[:prompt_tokens]]), use_cache=True)
        for token in ids[prompt_tokens:]:
            start = time.perf_counter()
            made = model(
                torch.tensor([[token]]), use_cache=True, past_key_values=made.past_key_values
            )
            yield time.perf_counter() - start
