"""A module that fails while it is imported, as a plugin does whose own requirements are not installed."""

import a_package_that_nobody_has  # noqa: F401
