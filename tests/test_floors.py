"""No dependency may be older than the oldest version without a known vulnerability."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = tomllib.loads((ROOT / "tests" / "security_floors.toml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def version(text):
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))


def stated(lines):
    """Return the version in each requirement, by lower-case name."""
    matches = (re.match(r"([\w.-]+)\s*[>=]=\s*([\d.]+)", line) for line in lines)
    return {match[1].lower(): match[2] for match in matches if match}


@pytest.mark.parametrize("name", FLOORS)
def test_no_version_with_a_known_vulnerability_is_allowed_tested_or_installed(name):
    floor = version(FLOORS[name]["floor"])
    assert FLOORS[name]["advisories"]
    allowed = stated(PROJECT["dependencies"])
    assert version(allowed[name.lower()]) >= floor
    constraints = stated((ROOT / "constraints.txt").read_text().splitlines())
    assert version(constraints.get(name.lower(), FLOORS[name]["floor"])) >= floor
    assert version(metadata.version(name)) >= floor
