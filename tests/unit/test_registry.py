"""Plugins by name."""

import sys
from importlib.metadata import Distribution, EntryPoint

import pytest

from beitctl import registry
from beitctl.errors import PluginError

GROUP = "beitctl.stages"


class Dist(Distribution):
    """A distribution that is nowhere on disk."""

    def __init__(self, name, version):
        self.data = {"METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"}

    def read_text(self, filename):
        return self.data.get(filename)

    def locate_file(self, path):
        return path


class Good:
    def run(self, job): ...
    def plan(self): ...


class NoPlan:
    def run(self, job): ...


@pytest.fixture
def installed(monkeypatch):
    """``installed(name=target, ...)``: pretend that these stages are installed, by ``acme 1.0``."""

    def install(*extra, **targets):
        pairs = [*targets.items(), *extra]
        entries = [
            EntryPoint(name.replace("_", "-"), target, GROUP)._for(Dist(f"acme{place}", "1.0"))
            for place, (name, target) in enumerate(pairs)
        ]
        monkeypatch.setattr(registry, "_entries", lambda group: tuple(entries))

    monkeypatch.setitem(sys.modules, "stages_of_test", sys.modules[__name__])
    return install


def test_a_plugin_is_found_by_name(installed):
    installed(probe="stages_of_test:Good")
    assert registry.get(GROUP, "probe") is Good


def test_listing_names_imports_nothing(installed):
    installed(b="no_such_module:B", a="no_such_module:A")
    assert registry.names(GROUP) == ["a", "b"]


def test_origin_names_distribution_and_version(installed):
    installed(probe="stages_of_test:Good")
    assert registry.origin(GROUP, "probe") == "acme0 1.0"


def test_an_unknown_name_gets_the_closest_match_and_all_names(installed):
    installed(probe="stages_of_test:Good", other="stages_of_test:Good")
    with pytest.raises(PluginError) as caught:
        registry.get(GROUP, "prob")
    assert str(caught.value) == "no 'prob' in beitctl.stages; did you mean 'probe'? Installed: other, probe."


def test_an_unknown_name_without_any_plugin_says_none(installed):
    installed()
    with pytest.raises(PluginError, match=r"^no 'x' in beitctl\.stages\. Installed: none\.$"):
        registry.get(GROUP, "x")


def test_a_name_installed_twice_is_refused(installed):
    installed(("probe", "stages_of_test:Good"), probe="stages_of_test:Good")
    with pytest.raises(PluginError) as caught:
        registry.get(GROUP, "probe")
    assert str(caught.value) == (
        "'probe' in beitctl.stages is installed by acme0 1.0, acme1 1.0; uninstall all but one of them"
    )


def test_a_plugin_that_fails_to_import_is_named_with_its_cause(installed):
    installed(probe="no_such_module:Probe")
    with pytest.raises(PluginError) as caught:
        registry.get(GROUP, "probe")
    assert str(caught.value) == (
        "plugin 'probe' (acme0 1.0) cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"
    )


def test_a_plugin_without_a_method_of_its_group_is_refused(installed):
    installed(probe="stages_of_test:NoPlan")
    with pytest.raises(PluginError) as caught:
        registry.get(GROUP, "probe")
    assert str(caught.value) == "plugin 'probe' (acme0 1.0) is no stages plugin: it has no method plan"


@pytest.mark.parametrize("group", sorted(registry.GROUPS))
def test_every_plugin_that_comes_with_beitctl_can_be_imported(group):
    names = registry.names(group)
    assert names
    assert all(registry.get(group, name).__doc__ for name in names)
