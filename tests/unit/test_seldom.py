"""Log lines that strangers cause: a few a minute, and how many there were."""

from phauld.seldom import WINDOW_SECONDS, Seldom


def test_a_few_then_none_then_how_many_there_were() -> None:
    seldom = Seldom(lines=3)
    assert [seldom.may_say(now / 10) for now in range(100)] == [True] * 3 + [False] * 97
    assert seldom.may_say(WINDOW_SECONDS + 1)
    assert seldom.take_kept_back() == 97
    assert seldom.take_kept_back() == 0


def test_what_comes_seldom_is_always_said() -> None:
    seldom = Seldom(lines=1)
    assert all(seldom.may_say(minute * WINDOW_SECONDS) for minute in range(10))
    assert seldom.take_kept_back() == 0
