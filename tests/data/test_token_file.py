from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hethub.data import token_file
from hethub.data.token_file import TokenHeader, build_token_file, open_token_file, token_file_for
from hethub.data.tokenizers import ByteTokenizer, load_tokenizer
from hethub.errors import InputError


def text_of(paths):
    return b"".join(path.read_bytes() for path in paths)


class Wide(ByteTokenizer):
    """Bytes moved up past what 16 bits hold."""

    name, vocab_size, digest = "wide", 70_000 + 256, hashlib.sha256(b"wide").hexdigest()

    def encode(self, text):
        return super().encode(text) + np.uint32(70_000)


def test_the_sources_come_back_in_the_given_order(sources, tmp_path):
    built = build_token_file(sources, ByteTokenizer(), tmp_path / "c.tokens")
    assert built.tokens.astype(np.uint8).tobytes() == text_of(sources)
    assert built.tokens.dtype == np.uint16
    assert [s.name for s in built.header.sources] == ["b.txt", "a.txt"]
    assert built.header.sources[0].digest == hashlib.sha256(sources[0].read_bytes()).hexdigest()
    assert built.digest == hashlib.sha256(built.tokens.tobytes()).hexdigest()


def test_a_large_vocabulary_takes_four_bytes_a_token(sources, tmp_path):
    built = build_token_file(sources, Wide(), tmp_path / "c.tokens")
    assert built.tokens.dtype == np.uint32
    assert (built.tokens - 70_000).astype(np.uint8).tobytes() == text_of(sources)


def test_a_tokenizer_json_makes_a_token_file(sources, tmp_path, tokenizer_json):
    tokenizer = load_tokenizer(tokenizer_json)
    built = build_token_file(sources[:1], tokenizer, tmp_path / "c.tokens")
    assert built.tokens.tolist() == tokenizer.encode(sources[0].read_bytes()).tolist()
    assert (built.vocab_size, built.header.tokenizer) == (tokenizer.vocab_size, "tokenizer.json")


def test_blocks_do_not_change_the_bytes(sources, tmp_path, monkeypatch):
    whole = build_token_file(sources, ByteTokenizer(), tmp_path / "whole.tokens")
    monkeypatch.setattr(token_file, "READ_BYTES", 4)
    cut = build_token_file(sources, ByteTokenizer(), tmp_path / "cut.tokens")
    assert cut.path.read_bytes() == whole.path.read_bytes()


def test_building_twice_gives_equal_bytes(sources, tmp_path):
    one, other = (build_token_file(sources, ByteTokenizer(), tmp_path / n) for n in ("1.tokens", "2.tokens"))
    assert one.path.read_bytes() == other.path.read_bytes()


def test_a_long_list_of_sources_makes_a_longer_header(tmp_path):
    paths = [tmp_path / f"source-{i}.txt" for i in range(120)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]))
    built = build_token_file(paths, ByteTokenizer(), tmp_path / "c.tokens")
    assert open_token_file(built.path).tokens.tolist() == list(range(120))
    assert built.tokens.offset % 4096 == 0 and built.tokens.offset > 4096


def test_tokens_cannot_be_written(sources, tmp_path):
    built = build_token_file(sources, ByteTokenizer(), tmp_path / "c.tokens")
    with pytest.raises(ValueError, match="read-only"):
        built.tokens[0] = 1


# --- damage -----------------------------------------------------------------------------------------------

REGIONS = {
    "magic": (0, 13),
    "start of tokens": (14, 18),
    "digest of header": (19, 83),
    "end of first line": (83, 84),
    "header": (84, 500),
    "padding": (1500, 4095),
    "end of padding": (4095, 4096),
    "tokens": (4096, None),
}


@pytest.mark.parametrize("region", REGIONS)
def test_any_flipped_bit_is_found(sources, tmp_path, region):
    path = build_token_file(sources, ByteTokenizer(), tmp_path / "c.tokens").path
    good = path.read_bytes()
    assert good[1499:4096].strip() == b"", "the padding lies where this test thinks"
    first, last = REGIONS[region]
    places = range(first, len(good) if last is None else last)
    for place in places if len(places) < 100 else places[:: len(places) // 50]:
        for bit in range(8):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            path.write_bytes(bad)
            with pytest.raises(InputError) as caught:
                open_token_file(path)
            assert caught.value.message.startswith(f"{path}: ")
            assert "hethub data build" in caught.value.message
            assert "\n" not in caught.value.message


@pytest.mark.parametrize("size", [0, 1, 83, 84, 85, 4095, 4096, 4097, -2, -1])
def test_a_cut_file_is_refused(sources, tmp_path, size):
    path = build_token_file(sources, ByteTokenizer(), tmp_path / "c.tokens").path
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"(not a|damaged) token file"):
        open_token_file(path)


def test_a_longer_file_is_refused(sources, tmp_path):
    path = build_token_file(sources, ByteTokenizer(), tmp_path / "c.tokens").path
    path.write_bytes(path.read_bytes() + b"\0\0")
    with pytest.raises(InputError, match="bytes long instead of"):
        open_token_file(path)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (b'"dtype":"uint16"', b'"dtype":"float9"', "dtype is wrong"),
        (b'"version":1', b'"version":2', "version is wrong"),
        (b'"vocab_size":256', b'"vocab_size":100', "beyond its vocab_size 100"),
        (b'"dtype":"uint16"', b'"dtype":"uint32"', "bytes long instead of"),
    ],
)
def test_a_header_written_by_hand_is_checked_too(sources, tmp_path, old, new, named):
    """Its digest is right, so only the meaning is wrong."""
    path = build_token_file(sources, ByteTokenizer(), tmp_path / "c.tokens").path
    content = path.read_bytes()
    rest = content[84:4096].replace(old, new)
    assert rest != content[84:4096]
    path.write_bytes(
        b"hethub-tokens 4096 " + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest + content[4096:]
    )
    with pytest.raises(InputError, match=named):
        open_token_file(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(
    changes=st.dictionaries(
        st.sampled_from(list(TokenHeader.model_fields)) | st.text(max_size=8), JSON, min_size=1
    )
)
def test_no_header_crashes_the_reader_though_its_digest_is_right(sources, tmp_path, changes):
    """Seen to catch: an unknown key with a line break in it, which made two lines of the message."""
    path = tmp_path / "c.tokens"
    good = build_token_file(sources, ByteTokenizer(), path).header.model_dump(mode="json")
    content = path.read_bytes()
    rest = json.dumps({**good, **changes}).encode().ljust(4096 - 84)
    assume(len(rest) == 4096 - 84)
    path.write_bytes(
        b"hethub-tokens 4096 " + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest + content[4096:]
    )
    try:
        open_token_file(path)
    except InputError as refused:
        assert len(refused.message.splitlines()) == 1


def test_an_absent_token_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"no\.tokens: cannot be read"):
        open_token_file(tmp_path / "no.tokens")


# --- bad sources and outputs ------------------------------------------------------------------------------


def test_bad_sources_are_named_and_nothing_is_written(sources, tmp_path):
    (tmp_path / "empty.txt").touch()
    output = tmp_path / "out" / "c.tokens"
    output.parent.mkdir()
    cases = {"gone.txt": "cannot be read", "empty.txt": "the file is empty", "out": "not a file"}
    for name, wrong in cases.items():
        with pytest.raises(InputError, match=f"{name}: {wrong}"):
            build_token_file([*sources, tmp_path / name], ByteTokenizer(), output)
    with pytest.raises(InputError, match="no source files"):
        build_token_file([], ByteTokenizer(), output)
    assert list(output.parent.iterdir()) == []


def test_text_that_is_not_utf8_is_named_with_its_byte(tmp_path, tokenizer_json, monkeypatch):
    monkeypatch.setattr(token_file, "READ_BYTES", 4)
    bad, out = tmp_path / "latin.txt", tmp_path / "out"
    bad.write_bytes(b"first line\ncaf\xe9\n")
    out.mkdir()
    with pytest.raises(InputError, match=r"latin\.txt: byte 14 is not UTF-8"):
        build_token_file([bad], load_tokenizer(tokenizer_json), out / "c.tokens")
    assert list(out.iterdir()) == []


def test_a_tokenizer_that_breaks_its_word_is_refused(sources, tmp_path):
    class Small(ByteTokenizer):
        vocab_size = 64

    with pytest.raises(InputError, match="beyond its vocab_size 64"):
        build_token_file(sources, Small(), tmp_path / "c.tokens")


def test_an_output_that_cannot_be_written_is_named(sources, tmp_path):
    (tmp_path / "folder").mkdir()
    outputs = [tmp_path / "nowhere" / "c.tokens", sources[0] / "c.tokens", tmp_path / "folder", sources[0]]
    kept = sources[0].read_bytes()
    for output in outputs:
        with pytest.raises(InputError) as caught:
            build_token_file(sources, ByteTokenizer(), output)
        assert caught.value.message.startswith(f"{output}: ")
    assert sources[0].read_bytes() == kept
    assert not list(tmp_path.glob("**/*.tmp"))


# --- files kept in a folder -------------------------------------------------------------------------------


def test_a_kept_file_is_reused(sources, tmp_path):
    folder = tmp_path / "runs" / "data"
    first = token_file_for(sources, ByteTokenizer(), folder)
    os.utime(first.path, ns=(1, 1))
    again = token_file_for(sources, ByteTokenizer(), folder)
    assert again.path == first.path
    assert again.path.stat().st_mtime_ns == 1, "not written again"


def test_another_text_order_or_tokenizer_makes_another_file(sources, tmp_path):
    def built():
        return token_file_for(sources, ByteTokenizer(), tmp_path).path

    paths = {built(), token_file_for(sources[::-1], ByteTokenizer(), tmp_path).path}
    paths.add(token_file_for(sources, Wide(), tmp_path).path)
    sources[1].write_bytes(b"another text")
    paths.add(built())
    assert len(paths) == 4


def test_a_damaged_kept_file_is_built_again(sources, tmp_path):
    path = token_file_for(sources, ByteTokenizer(), tmp_path).path
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"\xff")
    assert token_file_for(sources, ByteTokenizer(), tmp_path).path == path
    assert path.read_bytes() == good


def test_a_kept_file_of_other_sources_is_built_again(sources, tmp_path):
    path = token_file_for(sources, ByteTokenizer(), tmp_path).path
    good = path.read_bytes()
    build_token_file(sources[::-1], ByteTokenizer(), path)
    token_file_for(sources, ByteTokenizer(), tmp_path)
    assert path.read_bytes() == good


def test_a_source_that_changes_while_it_is_read_is_refused(sources, tmp_path):
    class Meddler(ByteTokenizer):
        def encode(self, text):
            sources[1].write_bytes(b"changed")
            return super().encode(text)

    folder = tmp_path / "kept"
    with pytest.raises(InputError, match="a source changed"):
        token_file_for(sources, Meddler(), folder)
    assert list(folder.iterdir()) == []
