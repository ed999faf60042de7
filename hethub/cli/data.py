"""`hethub data`: token files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(help="Build token files.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Build token files."""


@app.command()
def build(
    files: Annotated[list[Path], typer.Argument(help="Text files, in this order.")],
    output: Annotated[Path, typer.Option(help="The token file to write.")],
    tokenizer: Annotated[str, typer.Option(help="`bytes`, or the path of a Hugging Face tokenizer.json.")] = "bytes",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tokenize text into one memory-mapped file with a digest.

    Example: hethub data build corpus/a.txt corpus/b.txt --tokenizer tokenizer.json --output corpus.tokens
    """
    from hethub.data.token_file import build_token_file
    from hethub.data.tokenizers import load_tokenizer

    built = build_token_file(files, load_tokenizer(tokenizer), output)
    if as_json:
        typer.echo(json.dumps({"path": str(output), "tokens": len(built.tokens), **built.header}))
    else:
        typer.echo(f"{output}: {len(built.tokens):,} tokens, vocabulary {built.vocab_size}, sha256 {built.digest}")
