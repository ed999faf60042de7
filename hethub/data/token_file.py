"""The token file: one header page, then little-endian tokens, memory-mapped; a digest guards every byte.

Layout: the magic line, one line of JSON (version, count, dtype, vocab_size, tokenizer, sources, sha256 of the tokens)
padded with spaces to HEADER_BYTES, then the tokens. Written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from hethub.data.tokenizers import Tokenizer
from hethub.errors import InputError

__all__ = ["TokenFile", "build_token_file", "open_token_file", "token_file_for"]

_MAGIC = b"hethub-tokens\n"
_VERSION = 1
_HEADER_BYTES = 4096
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True, slots=True)
class TokenFile:
    """An intact token file: `tokens` (n,) is a read-only memory map, `digest` the sha256 of its bytes."""

    path: Path
    tokens: npt.NDArray[np.unsignedinteger[Any]]
    vocab_size: int
    digest: str
    header: dict[str, Any]


def build_token_file(sources: Sequence[Path], tokenizer: Tokenizer, output: Path) -> TokenFile:
    """Tokenize `sources` in the given order, one document after the other.

    Raises InputError naming a source that is missing or empty.
    """
    if not sources:
        raise InputError("no source files. Name at least one text file.")
    kind = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    temporary = output.with_name(output.name + ".tmp")
    output.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    count = 0
    listed = []
    try:
        with temporary.open("wb") as stream:
            stream.write(bytes(_HEADER_BYTES))
            for source in sources:
                text = _read_source(source)
                tokens = tokenizer.encode(text).astype(_DTYPES[kind])
                raw = tokens.tobytes()
                stream.write(raw)
                digest.update(raw)
                count += len(tokens)
                listed.append(hashlib.sha256(text).hexdigest())
            header = {
                "version": _VERSION,
                "count": count,
                "dtype": kind,
                "vocab_size": tokenizer.vocab_size,
                "tokenizer": {"name": tokenizer.name, "digest": tokenizer.digest},
                "sources": len(listed),
                "sources_sha256": hashlib.sha256("".join(listed).encode()).hexdigest(),
                "sha256": digest.hexdigest(),
            }
            _write_header(stream, header)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return open_token_file(output)


def _read_source(source: Path) -> bytes:
    try:
        text = source.read_bytes()
    except OSError as error:
        raise InputError(f"{source}: cannot read the data file ({error.strerror}). Mend the list of files.") from error
    if not text:
        raise InputError(f"{source}: the data file is empty. Leave it out.")
    return text


def _write_header(stream: BinaryIO, header: dict[str, Any]) -> None:
    line = _MAGIC + json.dumps(header).encode()
    if len(line) >= _HEADER_BYTES:
        raise AssertionError("the header outgrew its page")
    stream.seek(0)
    stream.write(line.ljust(_HEADER_BYTES - 1) + b"\n")


def open_token_file(path: Path) -> TokenFile:
    """Open and verify a token file. Raises InputError when it is absent or any byte is not as written."""
    try:
        with path.open("rb") as stream:
            header = _read_header(path, stream.read(_HEADER_BYTES))
            size = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise InputError(f"{path}: cannot read the token file ({error.strerror}). Mend `data.files`.") from error
    dtype = _DTYPES[header["dtype"]]
    if size != _HEADER_BYTES + header["count"] * dtype.itemsize:
        raise _corrupt(path, f"{size} bytes long, its header says {header['count']} tokens")
    tokens = np.memmap(path, dtype=dtype, mode="r", offset=_HEADER_BYTES, shape=(header["count"],))
    digest = hashlib.sha256()
    largest = 0
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = np.asarray(tokens[start : start + _CHUNK_TOKENS])
        digest.update(chunk.tobytes())
        largest = max(largest, int(chunk.max()))
    if digest.hexdigest() != header["sha256"]:
        raise _corrupt(path, "the digest of its tokens is not the one in its header")
    if largest >= header["vocab_size"]:
        raise _corrupt(path, f"token {largest} is outside its vocabulary of {header['vocab_size']}")
    return TokenFile(path, tokens, header["vocab_size"], header["sha256"], header)


def _corrupt(path: Path, what: str) -> InputError:
    return InputError(f"{path}: corrupt token file ({what}). Build it again: hethub data build")


def _read_header(path: Path, page: bytes) -> dict[str, Any]:
    if not page.startswith(_MAGIC):
        raise InputError(f"{path}: not a token file. Make one: hethub data build FILES... --output corpus.tokens")
    padding_at = page.rfind(b"}") + 1
    if len(page) != _HEADER_BYTES or page[padding_at:] != b" " * (_HEADER_BYTES - 1 - padding_at) + b"\n":
        raise _corrupt(path, "its header is torn")
    try:
        header = json.loads(page[len(_MAGIC) : padding_at])
        whole = all(isinstance(header[key], int) and header[key] > 0 for key in ("count", "vocab_size"))
        if header["version"] != _VERSION or header["dtype"] not in _DTYPES or not whole:
            raise ValueError("unknown version or dtype")
        if not isinstance(header["sha256"], str):
            raise TypeError("no digest")
    except (ValueError, KeyError, TypeError) as error:
        raise _corrupt(path, f"its header cannot be read: {error}") from error
    return dict(header)


def token_file_for(sources: Sequence[Path], tokenizer: Tokenizer, folder: Path) -> TokenFile:
    """The token file of these sources in `folder`: reused when it was built from the same bytes, else built."""
    digest = hashlib.sha256(tokenizer.digest.encode())
    for source in sources:
        digest.update(hashlib.sha256(_read_source(source)).digest())
    output = folder / f"{digest.hexdigest()[:16]}.tokens"
    return open_token_file(output) if output.is_file() else build_token_file(sources, tokenizer, output)
