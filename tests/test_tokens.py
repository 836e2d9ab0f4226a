"""The token bucket, by a clock that the tests set."""

import pytest

from cc_proxy.tokens import TokenBucket


def test_a_new_bucket_is_full() -> None:
    bucket = TokenBucket(3)
    assert bucket.full(1, now=1000)
    assert bucket.has(3, 1, now=1000)
    assert not bucket.has(4, 1, now=1000)


def test_looking_takes_nothing() -> None:
    bucket = TokenBucket(3)
    assert all(bucket.has(3, 1, now=1000) for _ in range(5))


def test_what_is_there_needs_no_wait() -> None:
    bucket = TokenBucket(3)
    assert bucket.take(3, 1, now=1000) == 0.0
    assert not bucket.has(1, 1, now=1000)
    assert not bucket.full(1, now=1000)


def test_what_is_not_there_is_owed() -> None:
    bucket = TokenBucket(3)
    assert bucket.take(5, 2, now=1000) == pytest.approx(1.0)
    assert bucket.take(1, 2, now=1000) == pytest.approx(1.5)
    assert not bucket.has(1, 2, now=1001.5)
    assert bucket.has(1, 2, now=1002)


def test_it_fills_up_to_the_burst_and_no_further() -> None:
    bucket = TokenBucket(3)
    bucket.take(3, 1, now=1000)
    assert not bucket.full(1, now=1002.5)
    assert bucket.full(1, now=1003)
    assert not bucket.has(4, 1, now=2000)


def test_the_rate_may_change() -> None:
    bucket = TokenBucket(10)
    bucket.take(10, 1, now=1000)
    assert bucket.has(4, 4, now=1001)
    assert not bucket.has(6, 1, now=1002)
    assert bucket.has(5, 1, now=1002)


def test_a_clock_read_earlier_gives_nothing_twice() -> None:
    bucket = TokenBucket(3)
    bucket.take(3, 1, now=1001)
    assert not bucket.has(1, 1, now=1000)
    assert not bucket.has(1, 1, now=1001)
    assert bucket.has(1, 1, now=1002)
