"""Check names and docstrings for words that say nothing; `make lint` runs it.

    python tests/house_words.py [FOLDER_OR_FILE ...]

A variable names the thing it holds, so a pronoun or a participle of its own is refused. A docstring
of a function starts with a verb, its first sentence is complete and at most 100 characters long.
Phrases that only this project ever used are refused in text. `ALLOWED` lists the exceptions.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("volseg", "tests", "benchmarks", "sample_data", "docs", "README.md", "pipelines")
NAMES = frozenset(
    [
        "found",
        "each",
        "known",
        "chosen",
        "wanted",
        "own",
        "here",
        "there",
        "rest",
        "said",
        "told",
        "heard",
    ]
)
# First words with which a docstring of a function, or of anything, is no sentence.
NOT_VERBS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "as",
        "per",
        "whether",
        "how",
        "what",
        "where",
        "when",
        "which",
        "who",
        "why",
        "all",
        "any",
        "each",
        "every",
        "one",
        "no",
        "its",
        "their",
        "this",
        "that",
        "these",
        "those",
        "if",
        "in",
        "on",
        "at",
        "by",
        "for",
        "from",
        "to",
        "with",
        "without",
    ]
)
FRAGMENTS = frozenset(("of", "as", "per"))
PHRASES = (
    "nobody",
    "anew",
    "is said",
    "are said",
    "put off",
    "is no table",
    "is no safe",
    "turns its back",
    "made good",
    "looked at after",
    "takes part in the vote",
)
SENTENCE = 100
# file → names, first words or phrases that are right there
ALLOWED: dict[str, frozenset[str]] = {
    "tests/house_words.py": frozenset(PHRASES),
    "docs/glossary.md": frozenset(),
    "volseg/measurement/selftest.py": frozenset(["found"]),  # a key of `volseg selftest --json`
}


def main(arguments: Sequence[str]) -> int:
    """Print every finding as file:line: text; 1 if there is any."""
    findings = [line for path in files(arguments or FOLDERS) for line in check(path)]
    sys.stdout.writelines(f"{line}\n" for line in findings)
    return 1 if findings else 0


def files(arguments: Sequence[str]) -> Iterator[Path]:
    """Yield the Python and Markdown files of these folders, without what is built or vendored."""
    for argument in arguments:
        path = (ROOT / argument).resolve()
        paths = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in paths:
            if file.suffix in (".py", ".md") and not {"vendor", "bundles"} & set(file.parts):
                yield file


def check(path: Path) -> Iterator[str]:
    """Yield the findings of one file."""
    name = path.relative_to(ROOT).as_posix()
    allowed, text = ALLOWED.get(name, frozenset()), path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        for phrase in PHRASES:
            if phrase not in allowed and re.search(rf"\b{phrase}\b", line, re.IGNORECASE):
                yield f"{name}:{number}: the phrase {phrase!r}"
    if path.suffix != ".py":
        return
    for node in ast.walk(ast.parse(text)):
        for word, number in names_of(node):
            if word in NAMES - allowed:
                yield f"{name}:{number}: the name {word!r}: name the thing"
        if name.startswith("volseg/") and isinstance(node, ast.FunctionDef | ast.ClassDef):
            for problem in docstring_problems(node, allowed):
                yield f"{name}:{node.lineno}: docstring of {node.name}: {problem}"


def names_of(node: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield the names that a node binds: variables, arguments and fields."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id, node.lineno
    elif isinstance(node, ast.arg):
        yield node.arg, node.lineno


def docstring_problems(
    node: ast.FunctionDef | ast.ClassDef, allowed: frozenset[str]
) -> Iterator[str]:
    """Yield what is wrong with the first sentence of a docstring."""
    docstring = ast.get_docstring(node)
    if not docstring:
        return
    first = re.split(r"\n\s*\n", docstring)[0]
    sentence = re.split(r"(?<=[.:;])\s", first.replace("\n", " "))[0]
    word = re.sub(r"\W.*", "", sentence.lower())
    is_value = any(
        getattr(name, "id", getattr(name, "attr", "")).endswith("property")
        for name in node.decorator_list
    )
    refused = NOT_VERBS if isinstance(node, ast.FunctionDef) and not is_value else FRAGMENTS
    if word in refused - allowed:
        yield f"starts with {sentence.split()[0]!r}"
    if len(sentence) > SENTENCE:
        yield f"a first sentence of {len(sentence)} characters"
    if not first.rstrip().endswith((".", ":", "?", ">>>")):
        yield "no full stop"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
