"""Tokenizers: bytes, or a Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hethub.errors import InputError, MachineError

__all__ = ["ByteTokenizer", "HuggingFaceTokenizer", "Tokenizer", "load_tokenizer"]

_LARGEST_FILE_BYTES = 256 * 2**20


class Tokenizer(Protocol):
    """Turns text into token ids below `vocab_size`; `digest` changes when the mapping does."""

    name: str
    vocab_size: int
    digest: str

    def encode(self, text: bytes) -> npt.NDArray[np.uint32]:
        """Token ids (n,) of a document. Raises InputError when the text is not what the tokenizer reads."""
        ...


class ByteTokenizer:
    """Every byte is a token."""

    name = "bytes"
    vocab_size = 256
    digest = "bytes"

    def encode(self, text: bytes) -> npt.NDArray[np.uint32]:
        """The bytes themselves."""
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint32)


class HuggingFaceTokenizer:
    """A `tokenizer.json`, read by the `tokenizers` package; no special tokens are added."""

    def __init__(self, path: Path) -> None:
        """Load the file. Raises InputError when it is absent or not a tokenizer, MachineError without the package."""
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise MachineError("the package `tokenizers` is missing. Install it: pip install 'hethub[launch]'") from error
        try:
            if path.stat().st_size > _LARGEST_FILE_BYTES:
                raise InputError(f"{path}: larger than 256 MiB, which no tokenizer.json is.")
            content = path.read_bytes()
            self._library: Any = Library.from_str(content.decode("utf-8"))
        except OSError as error:
            raise InputError(f"{path}: cannot read the tokenizer ({error.strerror}). Mend `data.tokenizer`.") from error
        except InputError:
            raise
        except Exception as error:  # the library raises plain Exception for a bad file
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: not a tokenizer.json ({reason}). Give one, or `bytes`.") from error
        self.name = path.name
        self.vocab_size = int(self._library.get_vocab_size(with_added_tokens=True))
        self.digest = hashlib.sha256(content).hexdigest()

    def encode(self, text: bytes) -> npt.NDArray[np.uint32]:
        """Token ids of UTF-8 text; bytes that are not UTF-8 become the replacement character."""
        decoded = text.decode("utf-8", errors="replace")
        return np.array(self._library.encode(decoded, add_special_tokens=False).ids, dtype=np.uint32)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """`bytes`, or the path of a tokenizer.json."""
    return ByteTokenizer() if str(name_or_path) == "bytes" else HuggingFaceTokenizer(Path(name_or_path))
