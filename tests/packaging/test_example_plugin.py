"""A distribution from outside, installed and used; a broken one beside it harms nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder with both example distributions, as pip installs them; no network."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-build-isolation", "--target", str(target)]
    projects = [str(TESTS / "example_plugin"), str(TESTS / "example_plugin_broken")]
    subprocess.run([*command, *projects], check=True, capture_output=True, text=True)
    return target


@pytest.fixture
def beitctl(installed, tmp_path):
    """``beitctl(*arguments)``: run the command line where both are installed, in an empty folder."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "beitctl", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=300,
        )

    return run


def words(text):
    """A text without the line breaks and frames of a terminal."""
    return " ".join(text.replace("│", " ").split())


def test_a_stage_from_outside_is_in_the_help(beitctl):
    assert "probe Count the labels of a source, and the weights of a model." in words(
        beitctl("--help").stdout
    )


def test_a_stage_from_outside_tells_its_settings(beitctl):
    assert "source (required): What is counted." in words(beitctl("probe", "--help").stdout)


def test_a_broken_stage_is_named_in_the_help_with_its_distribution_and_cause(beitctl):
    done = beitctl("--help")
    assert done.returncode == 0
    assert (
        "broken (broken: acme-broken 0.1: ModuleNotFoundError: No module named 'a_package_that_nobody_has')"
        in words(done.stdout)
    )


def test_a_broken_stage_ends_with_exit_code_2_and_its_cause(beitctl):
    done = beitctl("broken")
    assert done.returncode == 2
    assert (
        "error: plugin 'broken' (acme-broken 0.1) cannot be imported: "
        "ModuleNotFoundError: No module named 'a_package_that_nobody_has'" in words(done.stderr)
    )


def test_plugins_ls_tells_where_every_plugin_comes_from_and_its_state(beitctl):
    rows = json.loads(beitctl("plugins", "ls", "--json").stdout)
    outside = {(row["group"], row["name"]): row for row in rows if row["distribution"].startswith("acme")}
    assert {key: row["distribution"] for key, row in outside.items()} == {
        ("stages", "broken"): "acme-broken 0.1",
        ("stages", "probe"): "acme-beit 0.3",
        ("tasks", "colour"): "acme-beit 0.3",
        ("sources", "solid"): "acme-beit 0.3",
    }
    assert [row["name"] for row in rows if row["state"] != "ok"] == ["broken"]


def test_the_schema_offers_plugins_from_outside(beitctl):
    found = json.loads(beitctl("recipes", "schema").stdout)
    offered = found["$defs"]["beitctl.sources"]["anyOf"]
    kinds = [s["properties"]["kind"]["const"] for s in offered if s["type"] == "object"]
    assert "solid" in kinds
    assert "probe" in found["properties"]
    assert "broken" not in found["properties"]


def test_a_setting_of_a_plugin_from_outside_is_checked(beitctl):
    done = beitctl(
        "probe", "--recipe", TESTS / "example_plugin" / "colours.toml", "--set", "source.colour=[]"
    )
    assert done.returncode == 2
    assert "probe.source.colour: unknown key, did you mean 'colours'?" in done.stderr


def test_a_recipe_of_plugins_from_outside_runs_to_its_summary(beitctl, tmp_path):
    done = beitctl("run", TESTS / "example_plugin" / "colours.toml")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "colours" / "summary.json").read_text())
    assert summary["colours"] == 2
    assert summary["weights"] > 10
