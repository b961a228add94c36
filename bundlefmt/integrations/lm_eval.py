"""A model for EleutherAI's lm-eval. Importing this module registers it as `bundlefmt`:

import lm_eval, bundlefmt.integrations.lm_eval
lm_eval.simple_evaluate(model="bundlefmt", model_args="path=m.bundle,mode=exact", tasks=[...])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bundlefmt.errors import UsageError
from bundlefmt.file import BundleFile
from bundlefmt.runtime.evaluate import (
    WHOLE_MODES,
    hidden_states,
    log_probabilities,
    rows_at_once,
)
from bundlefmt.runtime.generate import load_model
from bundlefmt.runtime.sampling import Sampling
from bundlefmt.runtime.text import Tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise UsageError("lm-eval is not installed: pip install 'bundlefmt[lm-eval]'") from None

_NEW_TOKENS = 256  # the harness's own default, for tasks that name no number
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("bundlefmt")
class BundleLM(TemplateLM):
    """A bundle file's model. `batch_size`, `max_batch_size` and `device` are what the harness
    passes to every model: this one takes a request at a time, on the CPU."""

    def __init__(
        self,
        path: str,
        mode: str = "dense",
        batch_size: object = None,
        max_batch_size: object = None,
        device: object = None,
    ) -> None:
        super().__init__()
        with BundleFile(path) as file:
            self._text = Tokenizer(file)
        self.model = load_model(path, mode=mode)

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at once."""
        return self.model.decoder.config.context

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token of the model's config.json."""
        return self._special("eos_token_id")

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the beginning-of-text token where the
        model's config.json names one, else the end-of-text token."""
        named = self.model.file.config.get("bos_token_id") is not None
        return self._special("bos_token_id" if named else "eos_token_id")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; None for `add_special_tokens` adds what the tokenizer adds."""
        ids = self._text.encode(string, special_tokens=add_special_tokens is not False)
        self._text.check(ids, self.model.decoder.vocabulary)
        return ids

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Each text's log-likelihood, in windows of the model's context."""
        return [self._rolling(text) for (text,) in (request.args for request in requests)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Each context's continuation, up to the first stop sequence."""
        return [self._continuation(*request.args) for request in requests]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return [self._score(context, targets) for _, context, targets in requests]

    def _score(self, context: Sequence[int], targets: Sequence[int]) -> tuple[float, bool]:
        """log P(targets | context), and whether greedy decoding would give them."""
        if len(targets) > self.max_length:
            raise UsageError(
                "continuation longer than the model's context",
                expected=f"at most {self.max_length} tokens",
                found=len(targets),
            )
        fed = [*context, *targets][-self.max_length - 1 : -1]
        at_once = len(fed) if self.model.mode in WHOLE_MODES else 1
        hidden = hidden_states(self.model, fed, at_once)[-len(targets) :]
        total, greedy = 0.0, True
        step = rows_at_once(self.model)
        for start in range(0, len(targets), step):
            found = log_probabilities(self.model, hidden[start : start + step])
            for row, target in zip(found, targets[start : start + step], strict=True):
                total += float(row[target])
                greedy = greedy and int(row.argmax()) == target
        return total, greedy

    def _rolling(self, text: str) -> float:
        windows = get_rolling_token_windows(
            self.tok_encode(text, add_special_tokens=False),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return sum(self._score(*make_disjoint_window(window))[0] for window in windows)

    def _continuation(self, context: str, options: dict[str, Any]) -> str:
        wanted = next((options[name] for name in _LENGTHS if name in options), _NEW_TOKENS)
        count = min(int(wanted), self.max_length // 2)
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        sampling = Sampling(
            float(options.get("temperature", 1.0)) if options.get("do_sample") else 0.0,
            float(options.get("top_p", 1.0)),
            options.get("seed"),
        )
        ids = self.tok_encode(context)[-(self.max_length - count) :] or [self.prefix_token_id]
        text = ""
        for piece in self._text.pieces(self.model.tokens(ids, count, sampling), after=ids):
            text += piece
            ends = [text.index(stop) for stop in stops if stop in text]
            if ends:
                return text[: min(ends)]
        return text

    def _special(self, field: str) -> int:
        found = self.model.file.config.get(field)
        token = found[0] if isinstance(found, list) and found else found
        if not isinstance(token, int):
            raise UsageError(
                "the model names no such token",
                file=self.model.file.path,
                field=f"config.json, {field}",
            )
        return token
