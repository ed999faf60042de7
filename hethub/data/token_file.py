"""Token files (`.tokens`): a corpus as numbers, memory-mapped, with a digest over every byte.

    hethub-tokens 4096 SHA-256-OF-THE-REST-OF-THE-HEADER
    {"version": 1, "count": ..., ...}                       one line of JSON, then spaces up to byte 4096
    tokens, little-endian                                   digest in the JSON line

The number in the first line is where the tokens start, a multiple of 4096: many sources make a long header.
Equal sources and an equal tokenizer give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hethub.data.tokenizers import Tokenizer
from hethub.errors import InputError, printable
from hethub.files import whole_file, writing

__all__ = [
    "Source",
    "TokenFile",
    "TokenHeader",
    "build_token_file",
    "open_token_file",
    "token_file_for",
]

VERSION: Final = 1
ALIGNMENT_BYTES = 4096
MAX_HEADER_BYTES = 256 * 2**20
READ_BYTES = 4 * 2**20
"""Longer sources are encoded in blocks of this size, each ended after a line: this bounds memory."""

_FIRST_LINE = re.compile(rb"hethub-tokens ([1-9][0-9]{0,11}) ([0-9a-f]{64})\n")
_MAX_FIRST_LINE_BYTES = len("hethub-tokens ") + 12 + 1 + 64 + 1
_DIGEST_PATTERN = "^[0-9a-f]{64}$"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Source(_Strict):
    """One text file of a corpus: its base name and the SHA-256 of its bytes."""

    name: str
    digest: str = Field(pattern=_DIGEST_PATTERN)


class TokenHeader(_Strict):
    """What a token file says about its tokens; `payload_digest` is the SHA-256 of their bytes."""

    version: Literal[1]
    count: int = Field(ge=1)
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(ge=1, le=2**32)
    tokenizer: str
    tokenizer_digest: str = Field(pattern=_DIGEST_PATTERN)
    sources: tuple[Source, ...]
    payload_digest: str = Field(pattern=_DIGEST_PATTERN)


@dataclass(frozen=True, slots=True, eq=False)
class TokenFile:
    """An open, verified token file; `tokens` is a read-only map of the file, shape (count,)."""

    path: Path
    tokens: npt.NDArray[np.unsignedinteger]
    header: TokenHeader

    @property
    def vocab_size(self) -> int:
        """One more than the largest token that the tokenizer can give."""
        return self.header.vocab_size

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the tokens."""
        return self.header.payload_digest


# --- build ------------------------------------------------------------------------------------------------


def build_token_file(sources: Sequence[Path], tokenizer: Tokenizer, output: Path) -> TokenFile:
    """Write the tokens of `sources`, concatenated in the given order, to `output`, whole or not at all.

    Raises InputError naming a source that is missing, empty or not text for this tokenizer, or an output that
    cannot be written.
    """
    _refuse_bad_sources(sources, output)
    with _written_whole(output) as stream:
        _write(stream, sources, tokenizer)
    return open_token_file(output)


def token_file_for(sources: Sequence[Path], tokenizer: Tokenizer, folder: Path) -> TokenFile:
    """Return the token file of `sources` in `folder`, built when it is not there yet or is damaged.

    Its name is a digest of the sources' contents and the tokenizer, so an edited source gets a new file.
    Raises InputError as `build_token_file` does.
    """
    _refuse_bad_sources(sources, folder)
    digests = [_file_digest(path) for path in sources]
    identity = json.dumps([VERSION, tokenizer.digest, digests]).encode()
    path = folder / f"{hashlib.sha256(identity).hexdigest()[:32]}.tokens"
    with suppress(InputError):  # the sources are at hand, so what is absent or damaged is made again
        found = open_token_file(path)
        if _made_from(found, digests, tokenizer):
            return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{folder}: cannot be made ({error.strerror}). Give a folder that can be written."
        ) from error
    built = build_token_file(sources, tokenizer, path)
    if not _made_from(built, digests, tokenizer):
        path.unlink()
        raise InputError(
            f"{path.name}: a source changed while it was read. Run again when the files are still."
        )
    return built


def _made_from(file: TokenFile, digests: Sequence[str], tokenizer: Tokenizer) -> bool:
    header = file.header
    return header.tokenizer_digest == tokenizer.digest and [s.digest for s in header.sources] == list(digests)


def _refuse_bad_sources(sources: Sequence[Path], output: Path) -> None:
    if not sources:
        raise InputError(f"{output}: no source files. Give at least one text file.")
    for path in sources:
        try:
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                path.open("rb").close()
        except OSError as error:
            raise _unreadable(path, error) from error
        if not stat.S_ISREG(status.st_mode):  # a pipe can be read only once
            raise InputError(f"{path}: not a file. Give the path of a text file.")
        if status.st_size == 0:
            raise InputError(f"{path}: the file is empty. Leave it out or give one with text.")
        with suppress(OSError):
            if output.samefile(path):
                raise InputError(f"{output}: is also a source and would be replaced. Give another output.")


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read ({error.strerror}). Give the path of a text file.")


@contextmanager
def _written_whole(output: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `output` that takes its name when all went well, else is deleted."""
    if output.is_dir():
        raise InputError(f"{output}: is a folder. Give the path of a file.")
    with (
        writing(output, "Give another path."),
        whole_file(output) as temporary,
        temporary.open("w+b") as stream,
    ):
        yield stream


def _write(stream: BinaryIO, sources: Sequence[Path], tokenizer: Tokenizer) -> None:
    """Write the tokens first, after room for the header, which needs their count and digest."""
    dtype = np.dtype("<u2") if tokenizer.vocab_size <= 2**16 else np.dtype("<u4")
    names = [os.fsencode(path.name).decode("utf-8", "replace") for path in sources]

    def header(count: int, digests: Sequence[str], payload_digest: str) -> bytes:
        content = TokenHeader(
            version=VERSION,
            count=count,
            dtype="uint16" if dtype.itemsize == 2 else "uint32",
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.name,
            tokenizer_digest=tokenizer.digest,
            sources=tuple(Source(name=n, digest=d) for n, d in zip(names, digests, strict=True)),
            payload_digest=payload_digest,
        )
        return content.model_dump_json().encode()

    longest = len(header(2**62, ["0" * 64] * len(names), "0" * 64)) + 1 + _MAX_FIRST_LINE_BYTES
    start = -(-longest // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    stream.seek(start)
    payload, digests = hashlib.sha256(), []
    for path in sources:
        source = hashlib.sha256()
        for text, tokens in _encoded(path, tokenizer):
            source.update(text)
            piece = tokens.astype(dtype).tobytes()
            payload.update(piece)
            stream.write(piece)
        digests.append(source.hexdigest())
    count = (stream.tell() - start) // dtype.itemsize
    if count == 0:
        raise InputError(
            f"{sources[0]}: the tokenizer {tokenizer.name} gives no tokens. Give files with text."
        )
    stream.seek(0)
    stream.write(_padded(header(count, digests, payload.hexdigest()), start))


def _padded(content: bytes, start: int) -> bytes:
    """Return the first `start` bytes of a token file whose header is `content`."""
    first_line_bytes = len(f"hethub-tokens {start} ") + 64 + 1
    rest = content.ljust(start - first_line_bytes - 1) + b"\n"
    return f"hethub-tokens {start} {hashlib.sha256(rest).hexdigest()}\n".encode() + rest


def _encoded(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[bytes, npt.NDArray[np.uint32]]]:
    """Yield (text, its tokens) block by block."""
    position = 0
    for text in _blocks(path):
        try:
            tokens = tokenizer.encode(text)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}: byte {position + error.start} is not UTF-8 text. "
                "Convert the file or use the tokenizer `bytes`."
            ) from error
        if tokens.size and int(tokens.max()) >= tokenizer.vocab_size:
            raise InputError(
                f"{path}: the tokenizer {tokenizer.name} gives token {int(tokens.max())}, beyond its "
                f"vocab_size {tokenizer.vocab_size}. Give another tokenizer."
            )
        yield text, tokens
        position += len(text)


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            # Up to the end of a line: no character is cut in two, and a tokenizer rarely merges over it.
            while text := stream.read(READ_BYTES) + stream.readline():
                yield text
    except OSError as error:
        raise _unreadable(path, error) from error


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


# --- open -------------------------------------------------------------------------------------------------


def open_token_file(path: Path) -> TokenFile:
    """Open what `build_token_file` wrote and verify every byte of it (about a second per GB).

    Raises InputError when the file is absent, is something else, or differs in any bit from what was written.
    """
    try:
        with path.open("rb") as stream:
            header, start = _read_header(path, stream)
            size = os.fstat(stream.fileno()).st_size
        dtype = np.dtype("<u2") if header.dtype == "uint16" else np.dtype("<u4")
        expected = start + header.count * dtype.itemsize
        if size != expected:
            raise _damaged(path, f"{size} bytes long instead of {expected}")
        tokens = np.memmap(path, dtype=dtype, mode="r", offset=start, shape=(header.count,))
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}). Give a file that `hethub data build` wrote."
        ) from error
    _verify(path, tokens, header)
    return TokenFile(path, tokens, header)


def _damaged(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path}: a damaged token file: {printable(reason)}. Build it again with `hethub data build`."
    )


def _read_header(path: Path, stream: BinaryIO) -> tuple[TokenHeader, int]:
    """Return the header and the position of the first token."""
    first_line = _FIRST_LINE.fullmatch(stream.readline(_MAX_FIRST_LINE_BYTES))
    if first_line is None:
        raise InputError(f"{path}: not a token file. Make one with `hethub data build`.")
    start = int(first_line[1])
    if start % ALIGNMENT_BYTES or start > MAX_HEADER_BYTES:
        raise _damaged(path, f"its tokens cannot start at byte {start}")
    rest = stream.read(start - stream.tell())
    if hashlib.sha256(rest).hexdigest().encode() != first_line[2]:
        raise _damaged(path, "its header does not match its digest")
    try:
        return TokenHeader.model_validate_json(rest), start
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the header"
        raise _damaged(path, f"{where} is wrong ({first['msg']})") from error


def _verify(path: Path, tokens: npt.NDArray[np.unsignedinteger], header: TokenHeader) -> None:
    digest = hashlib.sha256()
    step = READ_BYTES // tokens.itemsize
    largest = 0
    for first in range(0, len(tokens), step):
        piece = tokens[first : first + step]
        digest.update(piece.data)
        largest = max(largest, int(piece.max()))
    if digest.hexdigest() != header.payload_digest:
        raise _damaged(path, "its tokens do not match their digest")
    if largest >= header.vocab_size:
        raise _damaged(path, f"token {largest} is beyond its vocab_size {header.vocab_size}")
