"""Text and token ids, by the tokenizer that a bundle file carries."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import tokenizers

from bundlefmt.errors import FormatError, UsageError
from bundlefmt.file import BundleFile
from bundlefmt.runtime.tokenizer_files import TOKENIZER, load_tokenizer, understood
from bundlefmt.storage.regular import read_regular

# One text at a time is encoded. The library's pool of threads would take memory that no limit
# counts, and make it warn on standard error when the process forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

_PATIENCE = 10.0  # seconds for any text; a text takes 1.4 s a megabyte (2 cores, Xeon)
_BYTES_PER_SECOND = 50_000  # of longer texts
_CONTEXT = 8  # tokens before a new one that its text may depend on: a blank, a prefix, a suffix
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")

_MOST_TEXT = 256 << 20  # bytes of a text file

# Held while standard error goes nowhere. A fork waits for that: its child would find the lock taken
# by a thread that it has not, and keep the descriptor. (One by the thread that holds it does not.)
_quiet = threading.RLock()
os.register_at_fork(
    before=_quiet.acquire, after_in_parent=_quiet.release, after_in_child=_quiet.release
)


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file of at most 256 MiB. Raises UsageError when it is none."""
    try:
        return read_regular(path, _MOST_TEXT).decode()
    except OSError as error:
        raise UsageError(f"text cannot be read: {error.strerror}", file=path) from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"text is not UTF-8: {error.reason}", file=path, offset=error.start
        ) from None


class Tokenizer:
    """The tokenizer of a bundle file (`tokenizer_files.load_tokenizer`). Raises UsageError when it
    carries none, FormatError for one that is damaged or hostile."""

    def __init__(self, file: BundleFile) -> None:
        self.path = file.path
        with _panics_unheard():
            self._tokenizer = load_tokenizer(file)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {number for number, token in added.items() if token.special}
        decoder = self._tokenizer.decoder
        self._falls_back = decoder is not None and b'"ByteFallback"' in decoder.__getstate__()

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        return dict(self._tokenizer.get_vocab())

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds unless those are
        not wanted. Raises FormatError for a tokenizer that takes far longer than any should."""
        return list(self._encoding(text, special_tokens).ids)

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Like `encode`; with each token's end, in characters of the text (0 for a special token
        that was added)."""
        encoding = self._encoding(text, True)
        return list(encoding.ids), [end for _, end in encoding.offsets]

    def check(self, ids: Sequence[int], vocabulary: int) -> None:
        """Raise FormatError unless a model of so many tokens has all of these."""
        beyond = max(ids, default=0)
        if beyond >= vocabulary:
            raise FormatError(
                f"the tokenizer gives token {beyond}, which the model lacks",
                file=self.path,
                field=TOKENIZER,
                expected=f"the model's {vocabulary} tokens",
                found=f"{self._tokenizer.get_vocab_size()} in the tokenizer",
            )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out."""
        with understood(self.path, TOKENIZER):
            return str(self._tokenizer.decode(list(ids)))

    def pieces(self, ids: Iterable[int], after: Sequence[int] = ()) -> Iterator[str]:
        """The text of ids as they come, piece by piece, as it continues that of the ids `after`
        which they follow: joined, what `decode` of all of them gives beyond `decode(after)`.

        A character that spans tokens is held back until it is whole, and so are bytes where one
        that is wrong would change what those before it stand for.
        """
        recent = self._context(after)
        shown = len(self.decode(recent))
        for token in ids:
            if token in self._special:
                continue
            recent.append(token)
            if self._is_byte(token):
                continue
            text = self.decode(recent)
            whole = len(text) - text.endswith("\N{REPLACEMENT CHARACTER}")
            if whole > shown:
                yield text[shown:whole]
                shown = whole
            if len(recent) > 4 * _CONTEXT:  # so that each token takes bounded time
                recent = recent[-_CONTEXT:]
                shown += len(self.decode(recent)) - len(text)
        yield self.decode(recent)[shown:]

    def _context(self, ids: Sequence[int]) -> list[int]:
        """The last ids, as many as the text of the next one may depend on."""
        shown = [token for token in ids if token not in self._special]
        start = max(len(shown) - _CONTEXT, 0)
        while start and self._is_byte(shown[start]):
            start -= 1
        return shown[start:]

    def _is_byte(self, token: int) -> bool:
        """Whether a token is one byte of a character that the vocabulary lacks."""
        return self._falls_back and bool(_BYTE.fullmatch(self._tokenizer.id_to_token(token) or ""))

    def _encoding(self, text: str, special_tokens: bool) -> tokenizers.Encoding:
        """The library's answer; on a thread, since a pattern may take for ever, and so that the
        wait for it can be interrupted."""
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise UsageError("not Unicode text", field="prompt", found=ascii(text)[:80]) from None
        done: list[tokenizers.Encoding] = []
        failed: list[BaseException] = []

        def work() -> None:
            try:  # the library keeps the GIL for `encode`, and not for batches
                done.extend(self._tokenizer.encode_batch([text], add_special_tokens=special_tokens))
            except BaseException as error:  # a panic is no Exception
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True)
        patience = _PATIENCE + size / _BYTES_PER_SECOND
        with understood(self.path, TOKENIZER):
            with _panics_unheard():
                thread.start()
                thread.join(patience)
            if failed:
                raise failed[0]
            if not done:
                raise FormatError(
                    f"the tokenizer takes more than {patience:.0f} s for {size} bytes of text"
                )
        return done[0]


@contextmanager
def _panics_unheard() -> Iterator[None]:
    """Standard error goes nowhere meanwhile: the library writes lines there when it panics, beside
    the exception that it raises."""
    with _quiet:
        try:
            kept = os.dup(2)
        except OSError:  # closed
            yield
            return
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
