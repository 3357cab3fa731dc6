"""What a block costs, learned from pieces of many sizes: the line that made the measurements is found again."""

from __future__ import annotations

import random

import pytest

from petalite.server.blockcost import BlockCost


def learn(fixed: float, each: float, sizes: list[int], noise: float = 0.0) -> BlockCost:
    cost, chance = BlockCost(), random.Random(1)
    for size in sizes:
        cost.measured(size, (fixed + each * size) * (1 + noise * chance.uniform(-1, 1)))
    return cost


def test_a_processor_whose_time_goes_with_the_tokens_gets_pieces_by_the_rule_of_three() -> None:
    cost = learn(0.0, 1e-5, [200, 150, 40, 200, 120, 80])
    assert cost.fixed == pytest.approx(0.0, abs=1e-6)
    assert cost.tokens_within(0.002) == pytest.approx(200, abs=1)


def test_one_size_alone_says_nothing_about_a_fixed_share() -> None:
    assert learn(0.0, 1e-5, [100] * 5).tokens_within(0.002) == pytest.approx(200, abs=1)


def test_where_launches_cost_more_than_tokens_pieces_are_not_cut_in_vain() -> None:
    cost = learn(1e-3, 1e-6, [37, 56, 35, 92, 138, 26], noise=0.02)
    assert cost.fixed == pytest.approx(1e-3, rel=0.1)
    assert cost.tokens_within(0.0005) > 256  # no piece takes less than 1 ms: one that takes 2 is as good


def test_noise_makes_no_piece_that_was_never_tried() -> None:
    for fixed in (0.0, 1e-3):
        cost = learn(fixed, 1e-5, [64, 70, 60, 66], noise=0.5)
        assert 1 <= cost.tokens_within(0.5) <= 4 * 70


def test_a_clock_that_stands_still_is_survived() -> None:
    cost = learn(0.0, 0.0, [100, 10, 50])
    assert 0 < cost.tokens_within(0.001) <= 400
