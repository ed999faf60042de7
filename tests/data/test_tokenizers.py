from __future__ import annotations

import json
import sys

import pytest

from hethub.data import tokenizers
from hethub.data.tokenizers import ByteTokenizer, load_tokenizer
from hethub.errors import InputError, MachineError


def test_every_byte_is_a_token():
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.encode(bytes(range(256))).tolist() == list(range(256))
    assert tokenizer.vocab_size == 256


def test_a_tokenizer_json_gives_back_the_whole_text(tokenizer_json):
    """The file's own limit of 5 tokens and its padding would lose or add text."""
    import tokenizers as package

    tokenizer = load_tokenizer(str(tokenizer_json))
    text = "return one + other # é\n" * 20
    tokens = tokenizer.encode(text.encode())
    assert package.Tokenizer.from_file(str(tokenizer_json)).decode(tokens.tolist()) == text
    assert 20 < len(tokens) < len(text)
    assert tokens.max() < tokenizer.vocab_size <= 300


def test_the_digest_tells_tokenizers_apart(tokenizer_json, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_text(tokenizer_json.read_text().replace('"<s>"', '"<t>"'))
    digests = {load_tokenizer(name).digest for name in ("bytes", tokenizer_json, other)}
    assert len(digests) == 3


def test_the_vocabulary_reaches_past_gaps_in_the_numbers(tokenizer_json, tmp_path):
    content = json.loads(tokenizer_json.read_text())
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    vocabulary[last] += 40
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(content))
    assert load_tokenizer(other).vocab_size == vocabulary[last] + 1


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_tokenizer(path)
    assert caught.value.message.startswith(f"{path}: not a tokenizer.json")
    assert "\n" not in caught.value.message


def test_an_absent_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: no such tokenizer .* Give `bytes` or"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_huge_file_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers, "MAX_TOKENIZER_BYTES", 8)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"123456789")
    with pytest.raises(InputError, match="larger than"):
        load_tokenizer(path)


def test_a_missing_package_says_what_to_install(tokenizer_json, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MachineError, match=r"pip install 'hethub\[launch\]'"):
        load_tokenizer(tokenizer_json)
