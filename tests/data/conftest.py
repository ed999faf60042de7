from __future__ import annotations

import pytest

TEXT = b"def add(one, other):\n    return one + other\n\n\nprint(add(1, 2))\n"


@pytest.fixture
def sources(tmp_path):
    """Two text files, the second not ending in a newline."""
    paths = [tmp_path / "b.txt", tmp_path / "a.txt"]
    paths[0].write_bytes(TEXT)
    paths[1].write_bytes(b"caf\xc3\xa9 \x00 end")
    return paths


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory):
    """A byte-level BPE tokenizer.json trained on a few lines; by itself it cuts texts at 5 tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    model.train_from_iterator(TEXT.decode().splitlines() * 3, trainer)
    model.enable_truncation(max_length=5)
    model.enable_padding(length=7)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    model.save(str(path))
    return path
