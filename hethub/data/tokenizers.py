"""Tokenizers: what turns text into token numbers, and the digest that says which one did."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hethub.errors import InputError, MachineError

__all__ = ["ByteTokenizer", "HuggingFaceTokenizer", "Tokenizer", "load_tokenizer"]

MAX_TOKENIZER_BYTES = 128 * 2**20
"""The largest tokenizer.json that is read; those of models with 256,000 tokens have about 35 MB."""


class Tokenizer(Protocol):
    """Turns text into numbers below `vocab_size`; `digest` (SHA-256, hex) tells two tokenizers apart."""

    @property
    def name(self) -> str:
        """What a person calls it; not unique."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token."""

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all that decides what `encode` returns."""

    def encode(self, text: bytes) -> npt.NDArray[np.uint32]:
        """Return the tokens of `text`, shape (tokens,). Raises UnicodeDecodeError on text it cannot read."""


class ByteTokenizer:
    """Every byte is a token."""

    name = "bytes"
    vocab_size = 256
    digest = hashlib.sha256(b"hethub tokenizer: bytes").hexdigest()

    def encode(self, text: bytes) -> npt.NDArray[np.uint32]:
        """Return the bytes of `text`, shape (bytes,)."""
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint32)


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`. Adds no special tokens of its own and never cuts or pads a text."""

    def __init__(self, path: Path) -> None:
        """Read `path`. Raises InputError on a bad file, MachineError without the `tokenizers` package."""
        content = _read_bounded(path)
        self.name = path.name
        self.digest = hashlib.sha256(content).hexdigest()
        self._tokenizer = _parse(path, content)
        # A file may carry the limits of some earlier use, which would silently drop most of a corpus.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # The numbers may have gaps, so their count says less than the largest one.
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.vocab_size == 0:
            raise InputError(f"{path}: the tokenizer has no tokens. Give a trained tokenizer.json.")

    def encode(self, text: bytes) -> npt.NDArray[np.uint32]:
        """Return the tokens of UTF-8 `text`, shape (tokens,). Raises UnicodeDecodeError on other text."""
        encoding = self._tokenizer.encode(text.decode("utf-8"), add_special_tokens=False)
        return np.asarray(encoding.ids, dtype=np.uint32)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Return the tokenizer named `bytes`, or the one in a `tokenizer.json`.

    Raises InputError on an absent or bad file, MachineError when the package that reads it is missing.
    """
    if name_or_path == ByteTokenizer.name:
        return ByteTokenizer()
    return HuggingFaceTokenizer(Path(name_or_path))


def _read_bounded(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_TOKENIZER_BYTES + 1)
    except OSError as error:
        raise InputError(
            f"{path}: no such tokenizer ({error.strerror}). Give `bytes` or the path of a tokenizer.json."
        ) from error
    if len(content) > MAX_TOKENIZER_BYTES:
        raise InputError(
            f"{path}: larger than {MAX_TOKENIZER_BYTES // 2**20} MiB, so not a tokenizer. "
            "Give the path of a tokenizer.json."
        )
    return content


def _parse(path: Path, content: bytes) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MachineError(
            f"{path}: reading a tokenizer.json needs the package `tokenizers`. "
            "Run pip install 'hethub[launch]' or use the tokenizer `bytes`."
        ) from error
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises nothing narrower
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: not a tokenizer.json ({reason}). Give one that the package `tokenizers` wrote."
        ) from error
