"""`volseg` lists its functions, and no package hides one of them."""

import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import volseg
from volseg.options import COMMANDS


def test_the_functions_are_listed_and_stay_functions_when_everything_is_imported():
    assert {*COMMANDS, "check"} <= set(dir(volseg))
    for module in pkgutil.walk_packages(volseg.__path__, "volseg."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    for name in (*COMMANDS, "check"):
        assert callable(getattr(volseg, name)), name
        assert not hasattr(getattr(volseg, name), "__path__"), name


def test_the_package_ships_its_types():
    assert (Path(volseg.__file__).parent / "py.typed").is_file()


def test_importing_volseg_loads_nothing_heavy():
    code = "import volseg, sys; print({'numpy', 'torch', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
