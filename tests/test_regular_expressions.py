"""Every regular expression of the package takes linear time on any text."""

from __future__ import annotations

import ast
import itertools
import re
import time
from pathlib import Path

import pytest

import volseg
from volseg.io.cases import ID_PATTERN

try:  # the parser of `re` has moved between versions of Python
    from re import _parser as pattern_parser
except ImportError:
    import sre_parse as pattern_parser

PACKAGE = Path(volseg.__file__).parent
CALLS = ("compile", "search", "match", "fullmatch", "findall", "finditer", "sub", "subn", "split")
LENGTH, MAX_SECONDS = 20_000, 0.15  # a quadratic one takes more than a second

# Patterns that are not literals in the call: file → (function, pattern as used).
BUILT = {
    "io/described.py": [("fullmatch", r"(.+)_(\d{4})\.nii\.gz")],
    "nnunet/weights.py": [
        ("subn", r"^stem\.0\."),
        ("subn", r"^encoder\.(\d+)\.(\d+)\."),
        ("subn", r"^decoder\.(\d+)\.(\d+)\."),
        ("subn", r"^up\.(\d+)\."),
        ("subn", r"^head\."),
    ],
    "networks/adapt.py": [
        ("sub", r"(denselayer\d+)\.(norm|conv)\.?([12])\."),
        ("sub", r"^(?:classifier|class_layers\.out)\."),
        ("sub", r"^_fc\."),
        ("sub", r"^fc\."),
    ],
}


def constants_of(tree):
    """Return name → text of the module's constants."""
    constants = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant | ast.JoinedStr):
            text = text_of(node.value, constants)
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            constants |= dict.fromkeys(names, text) if isinstance(text, str) else {}
    return constants


def text_of(node, constants):
    """Return the pattern of a call, with 1 for inserted values; None if it is built elsewhere."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value)
            if isinstance(part, ast.Constant)
            else text_of(part.value, constants) or "1"
            for part in node.values
        )
    return constants.get(node.id) if isinstance(node, ast.Name) else None


def expressions():
    """Yield (file, function, pattern) of every call of `re` in the package and its scripts."""
    constants = {"ID_PATTERN": ID_PATTERN}  # built from parts
    paths = sorted(PACKAGE.rglob("*.py"))
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    for tree in trees.values():
        constants |= constants_of(tree)
    for path, tree in trees.items():
        name, n_built = path.relative_to(PACKAGE).as_posix(), 0
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "re"):
                continue
            if node.func.attr not in CALLS:
                continue
            pattern = text_of(node.args[0], constants)
            if pattern is None:
                n_built += 1
            else:
                yield name, {"compile": "search"}.get(node.func.attr, node.func.attr), pattern
        assert n_built == 0 or name in BUILT, f"{name}: add its patterns to BUILT"
        yield from ((name, *built) for built in BUILT.get(name, ()))
    paths = sorted((PACKAGE / "pages" / "templates").glob("*.js"))
    assert paths
    for path in paths:
        scripts = path.read_text(encoding="utf-8")
        for pattern in re.findall(r"(?:replace|split|match|test)\(/(.+?)/[gi]*[,)]", scripts):
            yield path.name, "sub", pattern


def pieces_of(parsed):
    """Yield texts that match parts of a pattern: its words and a character of each class."""
    word = ""
    for operator, argument in parsed:
        name = str(operator)
        if name == "LITERAL":
            word += chr(argument)
            continue
        yield word
        word = ""
        if name == "IN":
            yield from (chr(value) for kind, value in argument if str(kind) == "LITERAL")
            yield from (chr(value[0]) for kind, value in argument if str(kind) == "RANGE")
            yield from (
                {"CATEGORY_DIGIT": "1", "CATEGORY_SPACE": " "}.get(str(value), "x")
                for kind, value in argument
                if str(kind) == "CATEGORY"
            )
        elif name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            yield from pieces_of(argument[2])
        elif name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
            yield from pieces_of(argument[-1])
        elif name == "BRANCH":
            for branch in argument[1]:
                yield from pieces_of(branch)
    yield word


def attacks_on(pattern, length):
    """Yield repeated parts of the pattern, with a start and an end that spoil the match."""
    words = dict.fromkeys(piece for piece in pieces_of(pattern_parser.parse(pattern)) if piece)
    words = [*words][:7] + ["x", " "]
    pumps = [*words, *(a + b for a, b in itertools.permutations(words, 2))]
    for before, pump, after in itertools.product(["", *words[:3]], pumps, ["", "\n!"]):
        yield before + pump * (length // len(pump)) + after


def seconds_of(function, pattern, text):
    if isinstance(pattern, bytes):
        text = text.encode()
    arguments = (text[:0], text) if function in ("sub", "subn") else (text,)
    began = time.process_time()
    result = getattr(re, function)(pattern, *arguments)
    if function == "finditer":
        list(result)
    return time.process_time() - began


@pytest.mark.parametrize(("file", "function", "pattern"), sorted(set(expressions())))
def test_an_expression_takes_linear_time(file, function, pattern):
    for text in attacks_on(pattern, LENGTH):
        seconds = seconds_of(function, pattern, text)
        if seconds > MAX_SECONDS:  # the processor may have been busy
            seconds = seconds_of(function, pattern, text)
        assert seconds <= MAX_SECONDS, (file, pattern, text[:60])


@pytest.mark.parametrize(
    ("function", "pattern"),  # from earlier versions
    [
        ("findall", r"<Label\s[^>]*\bKey=\"(\d+)\"[^>]*>(.*?)</Label>"),
        ("fullmatch", r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*"),
        pytest.param("sub", r"([a-z0-9_]+)\s*(>=|<=|!=|>|<|=)\s*(\S+)", marks=pytest.mark.slow),
    ],
)
def test_the_attacks_find_expressions_that_are_quadratic(function, pattern):
    def slowest(length):
        # The faster of two: on a busy machine, a pause is longer than a short match.
        texts = attacks_on(pattern, length)
        return max(min(seconds_of(function, pattern, text) for _ in range(2)) for text in texts)

    short, long = slowest(250), slowest(1000)
    assert long > 6 * short  # 16 if quadratic, 4 if linear
