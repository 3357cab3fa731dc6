"""The tests of the tests: defects that must be noticed. Some here; all by `python tests/conformance/try_mutants.py`."""

from __future__ import annotations

import client_defects
import defects
import pytest
import session_defects  # noqa: F401 - registers
import training_defects  # noqa: F401 - registers
from try_mutants import failing
from zygote import Zygote

from tools.conformance.registry import CASES
from tools.conformance.suite import load_cases

load_cases()
# Those that are noticed at once; the others are noticed because something does not come.
QUICK = [
    "says-nothing-to-other-versions", "answers-ping-with-zeros", "uses-a-nonce-twice", "takes-bools-for-integers",
    "shows-tracebacks", "rounds-int8-towards-zero", "computes-with-nan", "tells-that-a-session-exists",
    "forgets-a-rollback", "ignores-padding", "gives-another-code-for-a-gap", "computes-other-numbers",
    "answers-with-the-first-tokens", "answers-retries-with-too-little", "counts-padding-as-tokens",
    "loses-the-gradients-of-taps", "puts-adapters-into-the-blocks-of-all",
]  # fmt: skip
QUICK_CLIENT = [
    "takes-any-peer",
    "sends-early-payload",
    "takes-nan-in-replies",
    "uses-one-session-id",
    "insists-on-what-it-asked-for",
]


def test_there_are_enough_defects_and_their_cases_exist() -> None:
    assert len(defects.SERVER) >= 30
    assert len(client_defects.CLIENT) >= 20
    for mutant in [*defects.SERVER.values(), *client_defects.CLIENT.values()]:
        assert mutant.cases
        assert set(mutant.cases) <= set(CASES)


@pytest.mark.parametrize("name", QUICK)
def test_a_defect_of_the_server_is_noticed(zygote: Zygote, name: str) -> None:
    assert failing(zygote, "server", name, defects.SERVER[name].cases)


@pytest.mark.parametrize("name", QUICK_CLIENT)
def test_a_defect_of_the_client_is_noticed(zygote: Zygote, name: str) -> None:
    assert failing(zygote, "client", name, client_defects.CLIENT[name].cases)
