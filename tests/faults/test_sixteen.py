"""Every fault of docs/faults.md has a test that causes it."""

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "faults.md"
FAULTS = set(range(1, 17))


def marked(path):
    """Numbers of the faults that the tests of a file are marked with; a mark of the file marks its tests."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tests = any(isinstance(n, ast.FunctionDef) and n.name.startswith("test_") for n in ast.walk(tree))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and tests]
    return {call.args[0].value for call in calls if ast.unparse(call.func) == "pytest.mark.fault"}


def test_each_of_the_sixteen_faults_has_a_test():
    assert set().union(*map(marked, FOLDER.glob("test_*.py"))) == FAULTS


def test_the_page_has_a_row_for_each_and_names_files_that_are_there():
    rows = re.findall(r"^\| (\d+) \|.*\|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {int(number) for number, _ in rows} == FAULTS
    files = [name for _, cell in rows for name in re.findall(r"`([\w/]+\.py)`", cell)]
    assert [name for name in files if not (FOLDER.parents[1] / "beitctl" / name).is_file()] == []
