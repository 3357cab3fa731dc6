"""When instances are asked, believed and forgotten: by a clock that is a number."""

from __future__ import annotations

import math

from petalite.identity import Identity
from petalite.lan.announcement import Kind
from petalite.lan.book import Book, Hint, Sighting

PEER = Identity(bytes(32)).peer_id
PLACE = (("10.0.0.1", 4000),)
OURS = Sighting(Kind.OURS, PEER, PLACE, ttl=120)


def known(ttl: float = 120.0) -> Book:
    book = Book()
    book.notice("x", 0.0)
    assert book.next_to_ask(0.0) == "x"
    assert book.answered("x", Sighting(Kind.OURS, PEER, PLACE, ttl), 0.0) == Hint("x", PEER, PLACE, 0.0)
    return book


def test_a_newcomer_is_asked_at_once_and_by_one_at_a_time() -> None:
    book = Book()
    assert book.next_at() == math.inf
    book.notice("x", 5.0)
    book.notice("x", 5.0)
    assert book.next_at() == 5.0
    assert (book.next_to_ask(5.0), book.next_to_ask(5.0)) == ("x", None)


def test_asked_again_at_three_quarters_and_forgotten_at_the_end_of_its_life() -> None:
    book = known()
    assert book.next_at() == 90.0
    assert book.next_to_ask(89.9) is None
    assert book.next_to_ask(90.0) == "x"
    assert book.answered("x", None, 91.5) is None
    assert book.next_to_ask(93.4) is None
    assert book.next_to_ask(93.5) == "x"
    assert book.answered("x", OURS, 94.0) == Hint("x", PEER, PLACE, 94.0)
    assert book.sweep(120.0) == []
    assert book.sweep(214.0) == [Hint("x", PEER, (), 214.0)]
    assert book.sightings() == {}


def test_a_ttl_of_2_to_the_31_is_clamped() -> None:
    book = known(ttl=2.0**31)
    assert book.next_at() == 90.0
    assert book.sweep(120.0) == [Hint("x", PEER, (), 120.0)]


def test_a_ttl_of_nothing_does_not_make_us_ask_all_the_time() -> None:
    assert known(ttl=0.0).next_at() == 7.5


def test_goodbye_is_passed_on_once() -> None:
    book = known()
    assert book.remove("x", 3.0) == Hint("x", PEER, (), 3.0)
    assert book.remove("x", 3.0) is None


def test_one_that_never_answers_is_given_up_in_silence() -> None:
    book = Book()
    book.notice("x", 0.0)
    now = 0.0
    while (at := book.next_at()) < math.inf:
        now = max(now, at)
        assert book.sweep(now) == []
        if book.next_to_ask(now):
            assert book.answered("x", None, now + 1.5) is None
    assert 10.0 <= now <= 15.0


def test_an_answer_after_the_goodbye_is_nothing() -> None:
    book = Book()
    book.notice("x", 0.0)
    book.next_to_ask(0.0)
    assert book.remove("x", 0.5) is None
    assert book.answered("x", OURS, 1.0) is None
    assert book.next_at() == math.inf


def test_foreign_instances_are_remembered_but_no_hints() -> None:
    book = Book()
    book.notice("x", 0.0)
    book.next_to_ask(0.0)
    foreign = Sighting(Kind.OTHER_NETWORK, PEER, PLACE, 120)
    assert book.answered("x", foreign, 0.0) is None
    assert book.sightings() == {"x": foreign}
    assert book.sweep(121.0) == []


def test_one_that_turns_foreign_or_loses_its_addresses_is_withdrawn() -> None:
    for after in (Sighting(Kind.OTHER_NETWORK, PEER, PLACE, 120), Sighting(Kind.OURS, PEER, (), 120)):
        book = known()
        book.notice("x", 1.0)
        book.next_to_ask(1.0)
        assert book.answered("x", after, 1.0) == Hint("x", PEER, (), 1.0)


def test_a_flood_of_names_is_cut_and_known_ones_stay() -> None:
    book = known()
    for number in range(10_000):
        book.notice(f"flood {number}", 1.0)
    asked = 0
    while book.next_to_ask(1.0):
        asked += 1
    assert asked == 255
    assert "x" in book.sightings()


def test_a_new_network_asks_everybody_again() -> None:
    book = known()
    book.restart(7.0)
    assert book.next_to_ask(7.0) == "x"
