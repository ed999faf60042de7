"""The YAML loader: what it reads, what it refuses and where, and that writing and reading agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hethub.errors import InputError
from hethub.specs import document as loader
from hethub.specs.document import dump_yaml, load_document, parse_document

PATH = Path("x.yaml")


def value(text):
    return parse_document(text, PATH).value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3e-4", 3e-4),
        ("1e9", 1e9),
        ("-1.5E+3", -1500.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("12", 12),
        ("+7", 7),
        ("007", 7),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("12:30:00", "12:30:00"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("-", None),
        ("'3'", "3"),
        ('"true"', "true"),
        ("a b", "a b"),
    ],
)
def test_scalars_follow_yaml_1_2(text, expected):
    found = value(f"k: [{text}]" if text != "-" else "k:\n  -")["k"][0]
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "place", "why"),
    [
        ("a: &x 1\n", "x.yaml:1:4", "anchors"),
        ("a: 1\nb: *x\n", "x.yaml:2:4", "aliases"),
        ("a: !!int 3\n", "x.yaml:1:4", "tags"),
        ("a: ! 3\n", "x.yaml:1:4", "tags"),
        ("a: 1\nb: 2\na: 3\n", "x.yaml:3:1", "'a' stands here again (first on line 1)"),
        ("a: {b: 1, b: 2}\n", "x.yaml:1:11", "'b' stands here again"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2:1", "second document"),
        ("a: .nan\n", "x.yaml:1:4", "not a finite number"),
        ("a: -.inf\n", "x.yaml:1:4", "not a finite number"),
        ("a: 1e999\n", "x.yaml:1:4", "too large"),
        ("a: 9223372036854775808\n", "x.yaml:1:4", "64 bits"),
        ("a: " + "9" * 5000 + "\n", "x.yaml:1:4", "64 bits"),
        ("a: " + "[" * 40 + "]" * 40, "x.yaml:1:35", "nested more than 32 deep"),
        ("? [1, 2]\n: 3\n", "x.yaml:1:3", "a key must be text"),
        ("a: [1, 2\n", "x.yaml:2:1", "not YAML"),
        ("a: 1\n b: 2\n", "x.yaml:2:3", "not YAML"),
        ("\ta: 1\n", "x.yaml:1:1", "not YAML"),
        ("", "x.yaml", "empty"),
        ("# nothing\n", "x.yaml", "empty"),
        ("a: \x00\n", "x.yaml", "not YAML"),
    ],
)
def test_what_is_not_taken_is_refused_with_its_place(text, place, why):
    with pytest.raises(InputError) as caught:
        value(text)
    assert caught.value.message.startswith(place + ":")
    assert why in caught.value.message
    assert "\n" not in caught.value.message


def test_nodes_are_bounded(monkeypatch):
    monkeypatch.setattr(loader, "MAX_NODES", 10)
    assert value("[1, 2, 3, 4, 5, 6, 7, 8, 9]")
    with pytest.raises(InputError, match="more than 10 values"):
        value("[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]")


def test_size_is_bounded(tmp_path):
    file = tmp_path / "big.yaml"
    file.write_bytes(b"a: 1\n" + b"#" * loader.MAX_BYTES)
    with pytest.raises(InputError, match="larger than 10 MB"):
        load_document(file)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"a: 1\nb: \xff\xfe\n", ":2: byte 8 is not UTF-8"),
        ("a: ä".encode("utf-16"), ":1: byte 0 is not UTF-8"),
    ],
)
def test_text_that_is_not_utf_8_is_refused(tmp_path, content, why):
    file = tmp_path / "latin.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_document(file)
    assert caught.value.message.startswith(f"{file}{why}")


def test_a_byte_order_mark_is_skipped(tmp_path):
    file = tmp_path / "bom.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert load_document(file).value == {"a": 1}


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: no such file"):
        load_document(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_document(tmp_path)


def test_every_value_remembers_its_line_and_column():
    document = parse_document("a: 1\nb:\n  - {c: 2, d: [3, 4]}\n  - x\n", PATH)
    assert document.where(()) == "x.yaml:1:1"
    assert document.where(("b",)) == "x.yaml:2:1"
    assert document.where(("b", 0, "d")) == "x.yaml:3:12"
    assert document.where(("b", 0, "d", 1)) == "x.yaml:3:19"
    assert document.where(("b", 1)) == "x.yaml:4:5"


def test_a_place_that_is_not_there_is_the_nearest_around_it():
    document = parse_document("a:\n  - {c: 2}\n", PATH)
    assert document.where(("a", 0, "none", 5)) == "x.yaml:2:5"
    assert document.where(("a", 7)) == "x.yaml:1:1"
    assert document.where(("a", 0, "c", "deeper")) == "x.yaml:2:6"


def test_keys_are_text_whatever_they_look_like():
    assert value("1: a\non: b\ntrue: c\n<<: d\n") == {"1": "a", "on": "b", "true": "c", "<<": "d"}


def test_json_is_read():
    assert value('{"a": [1, 2.5, "x\\/y", null, true]}\n') == {"a": [1, 2.5, "x/y", None, True]}


def test_the_pure_python_parser_reads_the_same(monkeypatch):
    text = "a: [1, 3e-4, 'x']\nb: {c: no}\n"
    fast = value(text)
    monkeypatch.setattr(loader, "_EVENTS", yaml.SafeLoader)
    assert value(text) == fast


@given(st.text())
def test_any_text_is_read_or_refused(text):
    """No other exception, whatever the text."""
    try:
        value(text)
    except InputError as error:
        assert error.message.startswith("x.yaml")


@given(st.text(alphabet="ab:-[]{},&*!|>'\"#%@`? \n\t0.e~<"))
def test_any_soup_of_yaml_signs_is_read_or_refused(text):
    """Denser in YAML's own signs than `st.text()`, and with bytes that are no UTF-8 never reached."""
    try:
        value(text)
    except InputError as error:
        assert error.message.startswith("x.yaml")


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    try:
        load_document(file)
    except InputError as error:
        assert error.message.startswith(str(file))


TEXT = st.text(max_size=40)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(TEXT, v, max_size=4), max_leaves=15
)


@given(st.dictionaries(TEXT, VALUES, min_size=1, max_size=4))
def test_what_is_written_reads_back_equal(content):
    assert value(dump_yaml(content)) == content


@given(
    st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["no", "on", "1e5", "0x1", "~", "", "1:2"])
)
def test_numbers_and_words_read_back_with_other_yaml_readers_too(scalar):
    """PyYAML reads YAML 1.1: what we write means the same there."""
    assert yaml.safe_load(dump_yaml({"k": scalar})) == {"k": scalar}


def test_small_parts_stand_on_one_line_and_large_ones_do_not():
    text = dump_yaml(
        {"name": "x", "near": {"a": [1, 2]}, "far": [{"k": "v" * 60, "w": "v" * 60}, ["1f1b", "no"]]}
    )
    assert text.splitlines() == [
        "name: x",
        "near: {a: [1, 2]}",
        "far:",
        f"  - k: {'v' * 60}",
        f"    w: {'v' * 60}",
        '  - [1f1b, "no"]',
    ]


def test_what_yaml_cannot_say_is_not_written():
    with pytest.raises(ValueError, match="finite"):
        dump_yaml({"a": float("inf")})
    with pytest.raises(TypeError, match="Path"):
        dump_yaml({"a": Path("x")})
    with pytest.raises(TypeError, match="key 1"):
        dump_yaml({1: "a"})
