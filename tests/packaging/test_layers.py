"""What is imported when, and that what is installed is what pyproject.toml says."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from beitctl import registry

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = ("torch", "numpy", "pyarrow", "PIL", "matplotlib", "jinja2", "timm", "datasets", "sentencepiece")


def run(code, cwd=None):
    """What a Python program writes to stdout; its stderr if it fails."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_by(code):
    """Which of the heavy packages a program has imported at its end."""
    found = run(f"import sys\n{code}\nprint('|', *[name for name in {HEAVY!r} if name in sys.modules])")
    return found.rpartition("|")[2].split()


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["recipes", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    assert imported_by(f"from beitctl.cli import execute\nexecute({arguments!r})") == []


@pytest.mark.parametrize("stage", sorted(PROJECT["entry-points"]["beitctl.stages"]))
def test_the_help_of_a_stage_imports_no_torch(stage):
    assert "torch" not in imported_by(f"from beitctl.cli import execute\nexecute([{stage!r}, '--help'])")


@pytest.mark.parametrize(
    "module", ["beitctl", "beitctl.api", "beitctl.config", "beitctl.recipe", "beitctl.registry"]
)
def test_a_module_of_the_contract_imports_nothing_heavy(module):
    assert imported_by(f"import {module}") == []


def test_help_imports_no_module_that_only_a_command_needs():
    names = ("beitctl.doctor", "beitctl.pipeline", "beitctl.recipe", "beitctl.runs", "tomlkit")
    code = "from beitctl import cli\ncli.execute(['--help'])"
    found = run(f"import sys\n{code}\nprint('|', *[name for name in {names!r} if name in sys.modules])")
    assert found.rpartition("|")[2].split() == []


@pytest.mark.parametrize("group", sorted(registry.GROUPS))
def test_the_installed_plugins_are_those_of_pyproject(group):
    installed = {e.name: e.value for e in entry_points(group=group) if e.dist and e.dist.name == "beitctl"}
    assert installed == PROJECT["entry-points"][group], "entry points changed: pip install -e . again"


def test_the_groups_of_pyproject_are_those_that_are_looked_for():
    assert set(PROJECT["entry-points"]) == set(registry.GROUPS)


def test_imports_point_downward():
    environment = {**os.environ, "NO_COLOR": "1"}
    program = (
        "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
