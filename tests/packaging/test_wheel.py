"""The wheel: what is in it, and that it works where no checkout is."""

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def names(wheel):
    """Names of the files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Folder with the wheel, as pip installs it; its dependencies are those of this environment."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run([*command, "--no-deps", "--target", str(target), str(wheel)], check=True)
    return target


def beitctl(installed, *arguments, cwd="/"):
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "beitctl", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        timeout=300,
    )


def test_two_packages_are_at_the_top_of_the_wheel(names):
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"beitctl", "beitctl_plugins"}


def test_every_recipe_is_in_the_wheel(names):
    recipes = {path.name for path in (ROOT / "recipes").glob("*.toml")}
    assert recipes
    assert {Path(name).name for name in names if name.startswith("beitctl/recipes/")} >= recipes


@pytest.mark.parametrize(
    "name",
    [
        "beitctl/py.typed",
        "beitctl_plugins/py.typed",
        "beitctl/report/page.html.j2",
        "beitctl_plugins/sources/data/embedded.parquet",
        "beitctl_plugins/sources/data/embedded-text.parquet",
    ],
)
def test_a_file_that_is_no_module_is_in_the_wheel(names, name):
    assert name in names


def test_every_module_of_the_checkout_is_in_the_wheel(names):
    modules = [path.relative_to(ROOT) for path in (ROOT / "beitctl").rglob("*.py")]
    modules += [path.relative_to(ROOT / "plugins") for path in (ROOT / "plugins").rglob("*.py")]
    assert {path.as_posix() for path in modules} == {name for name in names if name.endswith(".py")}


def test_no_tests_and_no_runs_are_in_the_wheel(names):
    assert [name for name in names if "test" in name or "runs/" in name] == []


def test_licence_and_notice_are_in_the_wheel(names):
    licences = {name.rpartition("/licenses/")[2] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_the_metadata_names_the_licence_and_the_python_that_is_needed(wheel, names):
    (file,) = [name for name in names if name.endswith(".dist-info/METADATA")]
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(file).decode())
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("MIT", ">=3.11")


def test_the_installed_package_is_the_one_that_is_tested(installed):
    program = "import beitctl, beitctl_plugins; print(beitctl.__file__, beitctl_plugins.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd="/", env=environment
    )
    assert all(Path(path).is_relative_to(installed) for path in done.stdout.split())


def test_recipes_are_listed_from_anywhere(installed):
    done = beitctl(installed, "recipes", "ls")
    assert done.returncode == 0, done.stderr
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    assert {path.stem for path in (ROOT / "recipes").glob("*.toml")} <= listed


def test_every_bundled_recipe_validates_from_anywhere(installed):
    names = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))
    done = beitctl(installed, "recipes", "check", *names)
    assert (done.returncode, done.stdout) == (0, "".join(f"{name}: ok\n" for name in names)), done.stderr


def test_a_stage_of_a_bundled_recipe_runs_from_anywhere(installed, tmp_path):
    done = beitctl(
        installed, "train-tokenizer", "--recipe", "tiny", "--only", "text", "--out", tmp_path / "words"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "words" / "manifest.json").is_file()
