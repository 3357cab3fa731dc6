"""Tests here need machines apart from each other, so namespaces; where those cannot be made, they say why."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.namespaces.network import why_not

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mine = [item for item in items if HERE in item.path.parents]
    reason = why_not() if mine else ""
    for item in mine:
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))
