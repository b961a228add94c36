"""Train the demo model: a small OPT language model whose ReLU FFN is really sparse.

Reads a plain text file, trains a byte-level BPE tokenizer and then the model on it (PyTorch, on
the CPU), and writes a Hugging Face model folder: config, float16 weights, tokenizer and a
README.md with the figures measured on the last part of the text, which the training never sees.

    python tools/train_demo.py --text shakespeare.txt --out bundlefmt/demo_model

Needs torch, transformers and tokenizers (`pip install bundlefmt[reference]`). The same seed on
the same machine and library versions gives the same model.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

# model
VOCAB = 1024
D_MODEL = 128
FFN_DIM = 1024
LAYERS = 5
HEADS = 4
BLOCK = 256  # positions
BOS, PAD, EOS = 0, 1, 2

# training
HELD_OUT = 0.05  # the end of the text
BATCH = 8
LEARNING_RATE = 2e-3
MIN_LEARNING_RATE = 1e-4
WARMUP = 100
WEIGHT_DECAY = 0.1
GRAD_CLIP = 1.0
L1 = 0.15  # weight of the mean activation after the ReLU
EVAL_EVERY = 200
THREADS = 2

PROMPT = "ROMEO:"
PROMPT_TOKENS = 64

README = """\
# Demo model

A small ReLU language model in Hugging Face OPT form: {layers} layers, width {d_model},
FFN {ffn_dim}, {heads} heads, {block} positions, byte-level BPE of {vocab}, {params:,} parameters,
float16. It is here to show and to test the tools on trained, sparse weights; it is far too small
to be of other use.

- Data: plays of Shakespeare, in the public domain ({text_bytes:,} bytes, {train_tokens:,} tokens
  for training). The last {held_out:.0%} of the text was held out; the checkpoint was chosen on it,
  and the figures below are measured on it ({held_tokens:,} tokens).
- Command: `{command}`
- Seed {seed}; {steps:,} steps of {batch} windows of {block} tokens, {minutes:.0f} minutes on
  {threads} CPU cores; kept: step {best_step:,}. AdamW, warmup and cosine, no dropout, and an L1
  penalty of {l1} on the mean activation after the ReLU.
- Held-out loss: {loss:.3f} per token ({bits:.2f} bits per byte).

Share of exact zeros after the ReLU on the held-out text, and of neurons that never fire there:

| layer | zeros | never fire |
| --- | --- | --- |
{rows}
| mean | {zeros_mean:.1%} | {silent_mean:.1%} |

Greedy continuation of `{prompt}`:

```text
{sample}
```
"""


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; no special token is added to what it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=BLOCK,
    )


def make_model() -> OPTForCausalLM:
    """The untrained model, in float32."""
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=D_MODEL,
        word_embed_proj_dim=D_MODEL,
        ffn_dim=FFN_DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=BLOCK,
        activation_function="relu",
        do_layer_norm_before=True,
        enable_bias=True,
        tie_word_embeddings=True,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=BOS,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    return OPTForCausalLM(config)


def watch_activations(model: OPTForCausalLM) -> list[Tensor]:
    """A list that holds, after each forward pass, every layer's activations after the ReLU."""
    seen = [torch.empty(0)] * LAYERS

    def hook(index: int) -> None:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[index] = output

        model.model.decoder.layers[index].activation_fn.register_forward_hook(keep)

    for index in range(LAYERS):
        hook(index)
    return seen


def learning_rate(step: int, steps: int) -> float:
    """Linear warmup, then a cosine down to MIN_LEARNING_RATE."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return MIN_LEARNING_RATE + (LEARNING_RATE - MIN_LEARNING_RATE) * cosine


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


@torch.no_grad()
def evaluate(
    model: OPTForCausalLM, seen: list[Tensor], tokens: Tensor
) -> tuple[float, list[float], list[float]]:
    """Loss per token, and for each layer the share of zeros and of neurons that never fire."""
    model.eval()
    count = (len(tokens) - 1) // BLOCK
    inputs = tokens[: count * BLOCK].view(count, BLOCK)
    targets = tokens[1 : count * BLOCK + 1].view(count, BLOCK)
    loss = 0.0
    fired = torch.zeros(LAYERS, FFN_DIM)
    for x, y in zip(inputs.split(BATCH), targets.split(BATCH), strict=True):
        loss += next_token_loss(model(x).logits, y).item() * len(x)
        for index, active in enumerate(seen):
            fired[index] += (active.view(-1, FFN_DIM) > 0).sum(0)
    model.train()
    zeros = 1 - fired.mean(1) / (count * BLOCK)
    silent = (fired == 0).float().mean(1)
    return loss / count, zeros.tolist(), silent.tolist()


def train(
    model: OPTForCausalLM, train_tokens: Tensor, held_tokens: Tensor, steps: int
) -> tuple[int, dict[str, Tensor]]:
    """Train for some steps; gives the step of the best held-out loss and the weights there."""
    seen = watch_activations(model)
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": WEIGHT_DECAY},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
    )
    best_loss, best_step, best_weights = math.inf, 0, model.state_dict()
    start = time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        offsets = torch.randint(len(train_tokens) - BLOCK, (BATCH,)).tolist()
        x = torch.stack([train_tokens[i : i + BLOCK] for i in offsets])
        y = torch.stack([train_tokens[i + 1 : i + 1 + BLOCK] for i in offsets])
        loss = next_token_loss(model(x).logits, y)
        penalty = torch.stack([active.mean() for active in seen]).mean()
        (loss + L1 * penalty).backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        if (step + 1) % EVAL_EVERY == 0 or step + 1 == steps:
            held_loss, zeros, silent = evaluate(model, seen, held_tokens)
            if held_loss < best_loss:
                best_loss, best_step = held_loss, step + 1
                best_weights = copy.deepcopy(model.state_dict())
            print(
                f"step {step + 1}/{steps}  {time.monotonic() - start:.0f} s  "
                f"loss {loss.item():.3f}  held-out {held_loss:.3f}  "
                f"zeros {' '.join(f'{z:.3f}' for z in zeros)}  "
                f"never fire {sum(silent) / LAYERS:.3f}",
                flush=True,
            )
    return best_step, best_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="plain text to train on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=2700, help="training steps")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and batches")
    args = parser.parse_args()

    logging.disable_progress_bar()
    torch.set_num_threads(THREADS)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)

    text = args.text.read_text(encoding="utf-8")
    split = int(len(text) * (1 - HELD_OUT))
    tokenizer = train_tokenizer(text[:split])
    train_tokens = torch.tensor(tokenizer.encode(text[:split], verbose=False))
    held_tokens = torch.tensor(tokenizer.encode(text[split:], verbose=False))
    print(f"{len(train_tokens):,} tokens to train on, {len(held_tokens):,} held out")

    model = make_model()
    start = time.monotonic()
    best_step, best_weights = train(model, train_tokens, held_tokens, args.steps)
    minutes = (time.monotonic() - start) / 60
    model.load_state_dict(best_weights)
    model.eval()

    # What is shipped is float16, so every figure below is of the weights after rounding to it.
    probe = held_tokens[:BLOCK].unsqueeze(0)
    with torch.no_grad():
        exact = model(probe).logits
        model.half()
        model.save_pretrained(args.out)
        rounded = OPTForCausalLM.from_pretrained(args.out, dtype=torch.float32)
        rounded.eval()
        full = rounded(probe).logits
        half = model(probe).logits.float()
    print(
        f"logits against float32 training weights, largest difference: "
        f"{(full - exact).abs().max():.4f} (float16 weights), "
        f"{(half - exact).abs().max():.4f} (float16 arithmetic too); "
        f"same best token: {(half.argmax(-1) == exact.argmax(-1)).float().mean():.1%}"
    )
    tokenizer.save_pretrained(args.out)

    loss, zeros, silent = evaluate(rounded, watch_activations(rounded), held_tokens)
    rounded.eval()
    prompt = torch.tensor([tokenizer.encode(PROMPT)])
    output = rounded.generate(prompt, max_new_tokens=PROMPT_TOKENS, do_sample=False)
    sample = tokenizer.decode(output[0])
    held_bytes = len(text[split:].encode())
    rows = [f"| {i} | {zeros[i]:.1%} | {silent[i]:.1%} |" for i in range(LAYERS)]
    readme = README.format(
        layers=LAYERS,
        d_model=D_MODEL,
        ffn_dim=FFN_DIM,
        heads=HEADS,
        block=BLOCK,
        vocab=VOCAB,
        params=rounded.num_parameters(),
        text_bytes=len(text.encode()),
        train_tokens=len(train_tokens),
        held_out=HELD_OUT,
        held_tokens=len(held_tokens),
        command=f"python tools/train_demo.py --text {args.text.name} --out bundlefmt/demo_model "
        f"--steps {args.steps} --seed {args.seed}",
        seed=args.seed,
        steps=args.steps,
        batch=BATCH,
        minutes=minutes,
        threads=THREADS,
        best_step=best_step,
        l1=L1,
        loss=loss,
        bits=loss / math.log(2) * len(held_tokens) / held_bytes,
        rows="\n".join(rows),
        zeros_mean=sum(zeros) / LAYERS,
        silent_mean=sum(silent) / LAYERS,
        prompt=PROMPT,
        sample=sample.strip(),
    )
    (args.out / "README.md").write_text(readme, encoding="utf-8")
    print(readme)
    sizes = {path.name: path.stat().st_size for path in sorted(args.out.iterdir())}
    print("\n".join(f"{size:>9,}  {name}" for name, size in sizes.items()))
    print(f"{sum(sizes.values()):>9,}  in all")


if __name__ == "__main__":
    main()
