"""Make the tiny checkpoints under tests/fixtures and the figures that bundlefmt is held against.

    python tools/make_references.py            write the fixtures
    python tools/make_references.py --check    make them afresh and compare with those on disk

Every case is a folder with what `save_pretrained` writes (config.json, model.safetensors) and
reference.npz, made from the same weights by transformers in float32. With d the model's width:

    ffn_in_{i}, ffn_out_{i}              [4, d] float32   FFN of layer i, biases included, without
                                                          norm, dropout and residual
    ffn_in_{i}_{e}, ffn_out_{i}_{e}      the same of expert e, without the router's weight
    prompt                               [64] int64       in cases that generate
    decoded                              [16] int64       what greedy decoding appends
    logits                               [80, vocab] f32  of prompt and decoded together

Needs torch and transformers (`pip install bundlefmt[reference]`). Weights, prompts and FFN inputs
come from NumPy's RandomState, whose streams are frozen, so they do not hang on a version of torch.
"""

import argparse
import json
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"

PROMPT, DECODED, FFN_ROWS = 64, 16, 4
FIRST_ID = 3  # no text here has the ids of padding, begin and end
MIN_DISTINCT = 8  # among the decoded ids: a model that repeats itself hides errors
MIN_MARGIN = 0.01  # between the best two logits: no other order of summing turns the choice
TOLERANCE = 1e-5  # of the largest magnitude in the array

Arrays = dict[str, NDArray[Any]]
Ffn = Callable[[Any, int], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Case:
    """One fixture: a transformers class, its config, and where the FFN of a layer is."""

    model: type[hf.PreTrainedModel]
    config: hf.PreTrainedConfig
    ffn: Ffn
    experts: int = 0
    generates: bool = False
    seed: int = 0


def mlp(model: Any, i: int) -> nn.Module:
    """The FFN of layer i where it is a module of its own, as it mostly is."""
    return model.base_model.layers[i].mlp


def gpt_mlp(model: Any, i: int) -> nn.Module:
    """The same where the layers are called `h`."""
    return model.base_model.h[i].mlp


def opt_ffn(model: Any, i: int) -> Callable[[Tensor], Tensor]:
    """OPT has its FFN spread over the layer."""
    layer = model.model.decoder.layers[i]
    return lambda x: layer.fc2(layer.activation_fn(layer.fc1(x)))


def bert_ffn(model: Any, i: int) -> Callable[[Tensor], Tensor]:
    """BERT without the LayerNorm and the residual of its output module."""
    layer = model.encoder.layer[i]
    return lambda x: layer.output.dense(layer.intermediate(x))


def expert_ffn(model: Any, i: int, e: int) -> Callable[[Tensor], Tensor]:
    """One expert; in memory transformers 5 stacks them and joins gate and up."""
    experts = model.model.layers[i].mlp.experts

    def ffn(x: Tensor) -> Tensor:
        gate, up = nn.functional.linear(x, experts.gate_up_proj[e]).chunk(2, dim=-1)
        return nn.functional.linear(experts.act_fn(gate) * up, experts.down_proj[e])

    return ffn


# Widths are small, and the FFN's is no multiple of the model's, so that a mix-up shows.
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OPT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "ffn_dim": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
FALCON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "ffn_hidden_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # some frequencies stay, some blend, some are divided
}

FATRELU_THRESHOLD = 0.3  # far enough from zero that a plain ReLU shows


class FatRelu(nn.Module):
    """What ProSparse models have for an activation, and transformers has not."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.threshold(x, FATRELU_THRESHOLD, 0.0)


ACT2FN["fatrelu"] = FatRelu

CASES = {
    "opt": Case(hf.OPTForCausalLM, hf.OPTConfig(**OPT), opt_ffn, generates=True, seed=137),
    "opt-post-norm": Case(
        hf.OPTForCausalLM,
        hf.OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=24),
        opt_ffn,
        generates=True,
        seed=8,
    ),
    "llama": Case(
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**SMALL, num_key_value_heads=2),
        mlp,
        generates=True,
        seed=4,
    ),
    "llama3-rope": Case(
        hf.LlamaForCausalLM,
        hf.LlamaConfig(
            **SMALL,
            num_key_value_heads=2,
            head_dim=16,
            hidden_act="relu",
            rope_parameters=LLAMA3_ROPE,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
        ),
        mlp,
        generates=True,
        seed=4,
    ),
    "llama-fatrelu": Case(
        hf.LlamaForCausalLM,
        hf.LlamaConfig(**SMALL, hidden_act="fatrelu", hidden_act_param=FATRELU_THRESHOLD),
        mlp,
        generates=True,
        seed=1,
    ),
    "mistral": Case(
        hf.MistralForCausalLM,
        hf.MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=24),
        mlp,
        generates=True,
        seed=1,
    ),
    "qwen2": Case(
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config(**SMALL, num_key_value_heads=2),
        mlp,
        generates=True,
        seed=6,
    ),
    "qwen3": Case(
        hf.Qwen3ForCausalLM,
        hf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=16),
        mlp,
        generates=True,
        seed=3,
    ),
    "gemma": Case(
        hf.GemmaForCausalLM, hf.GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=16), mlp
    ),
    "phi": Case(
        hf.PhiForCausalLM,
        # Six of a head's sixteen numbers turn.
        hf.PhiConfig(**SMALL | {"num_attention_heads": 2}, partial_rotary_factor=0.4),
        mlp,
        generates=True,
        seed=1,
    ),
    "phi-relu": Case(
        hf.PhiForCausalLM,
        hf.PhiConfig(
            **SMALL,
            num_key_value_heads=2,
            hidden_act="relu",
            qk_layernorm=True,
            tie_word_embeddings=True,
        ),
        mlp,
        generates=True,
        seed=34,
    ),
    "phi3": Case(hf.Phi3ForCausalLM, hf.Phi3Config(**SMALL), mlp),
    # The four shapes of Falcon's blocks and projections: as the 7B, the 7B relufied with biases,
    # as the 40B, and neither parallel nor with shared keys.
    "falcon": Case(
        hf.FalconForCausalLM, hf.FalconConfig(**FALCON), gpt_mlp, generates=True, seed=13
    ),
    "falcon-bias": Case(
        hf.FalconForCausalLM,
        hf.FalconConfig(**FALCON, bias=True, activation="relu"),
        gpt_mlp,
        generates=True,
        seed=13,
    ),
    "falcon-grouped": Case(
        hf.FalconForCausalLM,
        hf.FalconConfig(
            **FALCON,
            new_decoder_architecture=True,
            num_kv_heads=2,
            activation="relu",
            tie_word_embeddings=False,
        ),
        gpt_mlp,
        generates=True,
        seed=12,
    ),
    "falcon-sequential": Case(
        hf.FalconForCausalLM,
        hf.FalconConfig(
            **FALCON,
            multi_query=False,
            parallel_attn=False,
            activation="relu",
            tie_word_embeddings=False,
        ),
        gpt_mlp,
        generates=True,
        seed=7,
    ),
    "persimmon": Case(
        hf.PersimmonForCausalLM, hf.PersimmonConfig(**SMALL), mlp, generates=True, seed=10
    ),
    "gpt2": Case(
        hf.GPT2LMHeadModel,
        hf.GPT2Config(
            vocab_size=96,
            n_embd=32,
            n_inner=72,
            n_layer=2,
            n_head=4,
            n_positions=128,
            bos_token_id=1,
            eos_token_id=2,
        ),
        gpt_mlp,
    ),
    "gpt_neox": Case(hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig(**SMALL), mlp),
    "bert": Case(hf.BertModel, hf.BertConfig(**SMALL), bert_ffn),
    "mixtral": Case(
        hf.MixtralForCausalLM,
        hf.MixtralConfig(
            **SMALL | {"intermediate_size": 40}, num_key_value_heads=2, num_local_experts=3
        ),
        mlp,
        experts=3,
    ),
    "qwen3_moe": Case(
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig(
            **SMALL,
            num_key_value_heads=2,
            head_dim=8,
            moe_intermediate_size=40,
            num_experts=3,
            num_experts_per_tok=2,
        ),
        mlp,
        experts=3,
    ),
}


def random_for(case: Case, name: str) -> np.random.RandomState:
    """A stream of its own for every array, so that a new one leaves the others as they are."""
    return np.random.RandomState((zlib.crc32(name.encode()) + case.seed) % 2**32)


def redraw(case: Case, name: str, old: NDArray[Any]) -> NDArray[Any]:
    """New weights for a tensor: matrices N(0, 1/fan_in), norms 1 + N(0, 0.1²), biases N(0, 0.1²).

    Buffers that are not floating point stay as they are.
    """
    if not np.issubdtype(old.dtype, np.floating):
        return old
    draw = random_for(case, name).standard_normal(old.shape)
    if old.ndim > 1:
        transposed = any(part in name for part in (".c_attn.", ".c_fc.", ".c_proj."))  # Conv1D
        new = draw / np.sqrt(old.shape[0 if transposed else -1])
    else:
        new = 0.1 * draw + name.endswith(".weight")
    return new.astype(np.float32)


def make(case: Case, folder: Path) -> None:
    """Write one case into `folder`, which exists."""
    # Drawn under the names in the file: what the modules are called in memory changes more often,
    # and there the experts are stacked. save_pretrained writes them out one by one again.
    case.model(case.config).save_pretrained(folder)
    weights = folder / "model.safetensors"
    drawn = {name: redraw(case, name, old) for name, old in load_file(weights).items()}
    save_file(drawn, weights, metadata={"format": "pt"})

    # "eager" is the attention with an explicit mask, which the sliding window is part of.
    model = case.model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    with torch.inference_mode():
        arrays = ffn_reference(case, model)
        if case.generates:
            arrays |= generation_reference(case, model)
    np.savez_compressed(folder / "reference.npz", **arrays)


def ffn_reference(case: Case, model: Any) -> Arrays:
    """Input and output of every FFN, or of every expert."""
    ffns: dict[str, Callable[[Tensor], Tensor]] = {}
    for i in range(model.config.num_hidden_layers):
        if case.experts:
            ffns |= {f"{i}_{e}": expert_ffn(model, i, e) for e in range(case.experts)}
        else:
            ffns[f"{i}"] = case.ffn(model, i)
    arrays = {}
    for suffix, ffn in ffns.items():
        shape = FFN_ROWS, model.config.hidden_size
        x = random_for(case, f"ffn_in_{suffix}").standard_normal(shape).astype(np.float32)
        arrays[f"ffn_in_{suffix}"] = x
        arrays[f"ffn_out_{suffix}"] = ffn(torch.from_numpy(x)).numpy()
    return arrays


def generation_reference(case: Case, model: Any) -> Arrays:
    """Greedy decoding without a cache: the whole sequence anew for every token."""
    vocab = model.config.vocab_size
    prompt = random_for(case, "prompt").randint(FIRST_ID, vocab, PROMPT)
    ids = torch.from_numpy(prompt)[None]
    for _ in range(DECODED):
        best = model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, best.view(1, 1)], dim=1)
    logits = model(ids).logits[0].numpy()
    decoded = ids[0, PROMPT:].numpy()

    second, first = np.sort(logits[PROMPT - 1 : -1], axis=1)[:, -2:].T
    margin, distinct = (first - second).min(), len(np.unique(decoded))
    if margin < MIN_MARGIN or distinct < MIN_DISTINCT or decoded.min() < FIRST_ID:
        raise SystemExit(
            f"{model.config.model_type}: seed {case.seed} is of no use: "
            f"margin {margin:.4f}, decoded {decoded.tolist()}; choose another"
        )
    return {"prompt": prompt, "decoded": decoded, "logits": logits}


def differences(name: str, made: Path, kept: Path) -> list[str]:
    """One line for every array, or config, in which two folders of a case differ."""
    for file in ("config.json", "model.safetensors", "reference.npz"):
        if not (kept / file).exists():
            return [f"{name}: {file} is missing"]
    lines = []
    config, kept_config = (json.loads((f / "config.json").read_text()) for f in (made, kept))
    # Another transformers may write other keys; the weights and figures must be the same even so.
    same_version = config["transformers_version"] == kept_config["transformers_version"]
    if same_version and config != kept_config:
        lines.append(f"{name}: config.json differs")

    weights, kept_weights = (load_file(f / "model.safetensors") for f in (made, kept))
    figures, kept_figures = (dict(np.load(f / "reference.npz")) for f in (made, kept))
    for new, old, same in ((weights, kept_weights, identical), (figures, kept_figures, close)):
        for key in sorted(new.keys() | old.keys()):
            if key not in new or key not in old:
                lines.append(f"{name}: {key} is only in the {'old' if key in old else 'new'} one")
            elif not same(new[key], old[key]):
                lines.append(f"{name}: {key} differs")
    return lines


def identical(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Same dtype, shape and bytes."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def close(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Identical integers, or floats within the tolerance."""
    if not np.issubdtype(a.dtype, np.floating):
        return identical(a, b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(np.abs(a - b).max() <= TOLERANCE * np.abs(b).max())


def main() -> int:
    """Write the fixtures, or compare them."""
    parser = argparse.ArgumentParser(description="Make the checkpoints under tests/fixtures.")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)

    lines = []
    for name, case in CASES.items():
        if check:
            with tempfile.TemporaryDirectory() as folder:
                make(case, Path(folder))
                lines += differences(name, Path(folder), FIXTURES / name)
        else:
            folder = FIXTURES / name
            folder.mkdir(parents=True, exist_ok=True)
            make(case, folder)
            print(f"{name}: {sum(f.stat().st_size for f in folder.iterdir()):,} bytes")
    if check:
        print("\n".join(lines) or f"{len(CASES)} cases, all the same")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
