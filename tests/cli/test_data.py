from __future__ import annotations

import json
import subprocess
import sys

from typer.testing import CliRunner

from hethub.cli.data import app
from hethub.data.token_file import open_token_file
from hethub.errors import InputError


def build(*arguments):
    return CliRunner().invoke(app, ["build", *map(str, arguments)])


def test_build_writes_a_token_file_and_says_what_is_in_it(tmp_path):
    text, output = tmp_path / "a.txt", tmp_path / "corpus.tokens"
    text.write_bytes(b"hello")
    result = build(text, text, "--output", output, "--json")
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    built = open_token_file(output)
    assert bytes(built.tokens.astype("u1")) == b"hellohello"
    assert (answer["tokens"], answer["vocab_size"], answer["digest"]) == (10, 256, built.digest)
    assert answer["bytes"] == output.stat().st_size


def test_a_pipe_gets_one_line_a_figure(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"hello")
    result = build(tmp_path / "a.txt", "--output", tmp_path / "c.tokens")
    lines = dict(line.split("\t") for line in result.stdout.splitlines())
    assert (lines["tokens"], lines["vocab_size"], lines["tokenizer"]) == ("5", "256", "bytes")


def test_a_missing_source_is_an_input_error(tmp_path):
    result = build(tmp_path / "no.txt", "--output", tmp_path / "c.tokens")
    assert isinstance(result.exception, InputError)
    assert result.exception.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_help_shows_an_example():
    assert "hethub data build corpus/*.txt" in " ".join(build("--help").stdout.split())


def test_listing_the_command_loads_no_numpy():
    code = "import sys, hethub.cli.data; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
