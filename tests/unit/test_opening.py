from beitctl.api import Plugin
from beitctl.data.opening import once, opened
from beitctl_plugins.sources.opened import Opened

calls = []


class Counted(Plugin):
    name: str

    def open(self):
        calls.append(self.name)
        return Opened(self.name, str, self.name)


def test_inside_the_context_equal_sources_are_opened_once():
    calls.clear()
    with once():
        found = [opened(Counted(name=name)) for name in ("a", "b", "a")]
    assert calls == ["a", "b"]
    assert found[0] is found[2]


def test_outside_of_it_a_source_is_opened_whenever_it_is_asked_for():
    calls.clear()
    with once():
        opened(Counted(name="a"))
    assert opened(Counted(name="a")) is not opened(Counted(name="a"))
    assert calls == ["a", "a", "a"]
