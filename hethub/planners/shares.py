"""Shares of a tensor-parallel group of alike devices, as spans and as the plan file's ranks."""

from __future__ import annotations

from functools import lru_cache

from hethub.apportion import apportion
from hethub.specs.layout import Share
from hethub.specs.workload import Model

__all__ = ["even_shares", "rank_entries"]


@lru_cache(maxsize=256)
def even_shares(model: Model, degree: int) -> tuple[Share, ...]:
    """As even as whole units allow: key-value groups, FFN columns, vocabulary rows; the first ranks have
    more.

    Raises ValueError when there are fewer key-value groups than ranks.
    """
    alike = [1.0] * degree
    group = model.heads // model.kv_heads
    shares = []
    kv = ffn = vocab = 0
    for kvs, columns, words in zip(
        apportion(model.kv_heads, alike, 1),
        apportion(model.ffn_size, alike, 1),
        apportion(model.vocab_size, alike, 1),
        strict=True,
    ):
        shares.append(
            Share(
                heads=(kv * group, (kv + kvs) * group),
                kv=(kv, kv + kvs),
                ffn=(ffn, ffn + columns),
                vocab=(vocab, vocab + words),
            )
        )
        kv, ffn, vocab = kv + kvs, ffn + columns, vocab + words
    return tuple(shares)


@lru_cache(maxsize=1024)
def rank_entries(
    model: Model, degree: int, decoders: bool, words: bool
) -> tuple[tuple[int, int, int, int], ...]:
    """(count, heads, ffn, vocab) of the plan file's rank entries: alike neighbours are one entry.

    Heads and columns are 0 in a stage without `decoders`, vocabulary rows in one without embedding and head.
    """
    entries: list[tuple[int, int, int, int]] = []
    for share in even_shares(model, degree):
        heads = share.heads[1] - share.heads[0] if decoders else 0
        columns = share.ffn[1] - share.ffn[0] if decoders else 0
        rows = share.vocab[1] - share.vocab[0] if words else 0
        if entries and entries[-1][1:] == (heads, columns, rows):
            entries[-1] = (entries[-1][0] + 1, heads, columns, rows)
        else:
            entries.append((1, heads, columns, rows))
    return tuple(entries)
