"""`hethub data`: make token files from text."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # numpy is loaded when the command runs, not when `hethub --help` lists it
    from hethub.data.token_file import TokenFile

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True)


@app.callback()
def data() -> None:
    """Make token files from text."""


@app.command()
def build(
    files: Annotated[list[Path], typer.Argument(help="Text files, concatenated in this order.")],
    output: Annotated[Path, typer.Option(help="Token file to write.")],
    tokenizer: Annotated[
        str, typer.Option(help="`bytes`, or the path of a Hugging Face tokenizer.json.")
    ] = "bytes",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Turn text files into one token file, which training maps into memory.

    Example: hethub data build corpus/*.txt --tokenizer bytes --output corpus.tokens
    """
    from hethub.data.token_file import build_token_file
    from hethub.data.tokenizers import load_tokenizer

    answer = _as_object(build_token_file(files, load_tokenizer(tokenizer), output))
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
    elif sys.stdout.isatty():
        _print_table(answer)
    else:
        typer.echo("\n".join(f"{key}\t{value}" for key, value in answer.items()))


def _as_object(built: TokenFile) -> dict[str, Any]:
    header = built.header
    return {
        "file": str(built.path),
        "tokens": header.count,
        "vocab_size": header.vocab_size,
        "digest": header.payload_digest,
        "dtype": header.dtype,
        "tokenizer": header.tokenizer,
        "tokenizer_digest": header.tokenizer_digest,
        "sources": len(header.sources),
        "bytes": built.path.stat().st_size,
    }


def _print_table(answer: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in answer.items():
        shown = f"{value:,}" if isinstance(value, int) else str(value)
        table.add_row(key.replace("_", " "), Text(shown))
    Console().print(table)
