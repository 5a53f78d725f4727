"""Which tests one process runs where there are several (`make test`)."""

import pytest


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of a file, which share fixtures; and all of tests/cpp, whose programs take memory and several cores."""
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group("cpp" if folder == "cpp" else str(item.path)))
