"""Text and token ids, by the tokenizer that a bundle file carries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import tokenizers

from bundlefmt.errors import FormatError, UsageError
from bundlefmt.file import BundleFile

_BLOB = "tokenizer.json"


class Tokenizer:
    """The tokenizer.json of a bundle file. Raises UsageError when it carries none, FormatError
    when the `tokenizers` library cannot read it."""

    def __init__(self, file: BundleFile) -> None:
        if _BLOB not in file.blob_names:
            raise UsageError("the file carries no tokenizer", file=file.path, field=_BLOB)
        self.path = file.path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(file.blob(_BLOB))
        except ValueError as error:
            raise FormatError(
                f"tokenizer not understood: {error}", file=file.path, field=_BLOB
            ) from None

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token and its id."""
        return dict(self._tokenizer.get_vocab())

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer adds unless those are
        not wanted."""
        return list(self._encoding(text, special_tokens).ids)

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """Like `encode`; with each token's end, in characters of the text (0 for a special token
        that was added)."""
        encoding = self._encoding(text, True)
        return list(encoding.ids), [end for _, end in encoding.offsets]

    def _encoding(self, text: str, special_tokens: bool) -> tokenizers.Encoding:
        try:
            return self._tokenizer.encode(text, add_special_tokens=special_tokens)
        except UnicodeEncodeError:
            raise UsageError("not Unicode text", field="prompt", found=ascii(text)) from None

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self._tokenizer.decode(ids))

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, piece by piece; a character that spans tokens is held
        back until it is whole."""
        seen: list[int] = []
        shown = ""
        for token in ids:
            seen.append(token)
            text = self.decode(seen)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                yield text[len(shown) :]
                shown = text
        yield self.decode(seen)[len(shown) :]
