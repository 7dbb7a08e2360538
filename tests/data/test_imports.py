"""The data room is used by scripts that must start at once, such as the evaluation's."""

import subprocess
import sys

from tests.support.paths import ROOT

CODE = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(f"matrix_llm.data.{name}")
    print(name, "torch" in sys.modules)
"""


def test_no_module_of_the_room_loads_torch():
    names = [path.stem for path in sorted((ROOT / "matrix_llm/data").glob("*.py")) if path.stem != "__init__"]
    done = subprocess.run([sys.executable, "-c", CODE, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(names) >= 10
    assert done.stdout.splitlines() == [f"{name} False" for name in names]
