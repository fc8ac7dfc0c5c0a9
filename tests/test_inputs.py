"""Untrusted files: what `volseg.inputs` accepts and what it refuses."""

import json
import math
import os
import socket
import time
import tomllib

import pytest

from volseg.inputs import (
    MAX_DEPTH,
    NotAFileError,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_toml,
    shorten,
)

NESTED = (
    b"[" * 100_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
)


@pytest.mark.parametrize("text", NESTED, ids=["open", "lists", "objects", "just_too_deep"])
def test_json_that_is_nested_too_deep_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"nested more than 64 levels"):
        parse_json(text)


def test_json_at_the_limits_is_accepted_unchanged():
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json.dumps(parse_json(deep)) == deep
    numbers = [2**63 - 1, -(2**63), 1.7e308, 0.1, -5e-324]
    assert parse_json(json.dumps(numbers)) == numbers
    for text in ('{"name": "é → 😀"}', json.dumps({"name": "😀"})):
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
            assert parse_json(text.encode(encoding)) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("NaN", "NaN"),
        ("[-Infinity]", "Infinity"),
        ("[1e400]", "finite"),
        (f'{{"a": {"9" * 400}}}', "400 digits"),
        ("9" * 5000, "5000 digits"),
        (str(2**63), "64 bits"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' appears twice"),
        (r'{"a": "\ud800"}', "surrogate"),
        (r'{"\udfff": 1}', "surrogate"),
        ("", "Expecting value"),
        (b"\xff\xfe\x00", "decode"),
        ('{"a": 1', "delimiter"),
    ],
)
def test_nonsense_json_is_a_value_error(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_numbers_that_are_not_finite_are_accepted_on_request():
    low, nan, high = parse_json("[-Infinity, NaN, 1e400]", is_finite=False)
    assert (low, high) == (-math.inf, math.inf)
    assert math.isnan(nan)


def test_a_file_that_is_too_large_is_not_read_to_its_end(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"more than 32 MB"):
        read_json(path)


@pytest.mark.parametrize(
    "text",
    [
        "a = " + "[" * 20_000,
        ".".join("a" * 2000) + " = 1",
        "a = " + "9" * 400,
        "a = " + "9" * 5000,
        "a = 1\na = 2",
        "a",
    ],
)
def test_toml_with_such_contents_is_a_value_error(tmp_path, text):
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises(ValueError):
        read_toml(tmp_path / "recipe.toml")


def test_dots_count_in_keys_alone(tmp_path):
    dots = ".".join("a" * 100)
    text = f"""# {dots}
{".".join("a" * MAX_DEPTH)} = 1
b = "{dots}\\" {dots}"
c = '{dots}'
d = \"\"\"
{dots}"" \\\"\"\" {dots}\"\"\"\"
e = '''{dots}'' {dots}'''''  # {dots} " {dots}
f = [{", ".join(["1.5"] * 100)}]
g = "" # '
"{dots}" = {{ "{dots}" = 1.5 }}
""".replace("\n", "\r\n")
    (tmp_path / "recipe.toml").write_bytes(text.encode())
    assert read_toml(tmp_path / "recipe.toml") == tomllib.loads(text)
    unclosed = b"'" + b"'.".join([b"a"] * (MAX_DEPTH + 1)) + b" = 1"
    (tmp_path / "recipe.toml").write_bytes(text.encode() + unclosed)
    with pytest.raises(ValueError, match="at line"):  # the TOML parser's own error
        read_toml(tmp_path / "recipe.toml")
    for key in (".".join("a" * (MAX_DEPTH + 1)), " .\t".join(['"a"'] * (MAX_DEPTH + 1))):
        (tmp_path / "recipe.toml").write_bytes(text.encode() + key.encode() + b" = 1")
        with pytest.raises(ValueError, match=r"nested more than 64 levels"):
            read_toml(tmp_path / "recipe.toml")


def test_only_regular_files_are_opened_without_waiting(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link to file").symlink_to(tmp_path / "file")
    began = time.monotonic()
    kinds = {
        "pipe": "a pipe",
        "folder": "a folder",
        "link": "a pipe",
        "/dev/zero": "a device",
        "/dev/null": "a device",
    }
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # as the name of a socket must be short
        listener.bind("socket")
        for name, kind in (kinds | {"socket": "a socket"}).items():
            with pytest.raises(NotAFileError, match=f"is {kind}, not a file") as caught:
                open_regular(tmp_path / name)
            assert caught.value.kind == kind
    for name in ("nowhere", "loop", "a" * 5000, "a\0b", "\udcff" * 3000):
        with pytest.raises(OSError):
            open_regular(tmp_path / name)
    assert time.monotonic() - began < 1
    assert read_bytes(tmp_path / "link to file", max_bytes=4) == b"text"


def test_a_long_text_is_shortened_for_a_message():
    assert shorten("spleen") == "spleen"
    assert len(shorten("a" * 100_000)) == 60
