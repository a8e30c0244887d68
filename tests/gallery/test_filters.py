"""Conditions on metadata."""

import pytest

from fastirt.errors import UserError
from fastirt.gallery.filters import Condition, parse_where

KNOWN = ["brand", "price", "shoe size", "note", "a"]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("brand=x", Condition("brand", "=", "x")),
        (" brand == 'a b' ", Condition("brand", "=", "a b")),
        ('brand != "x"', Condition("brand", "!=", "x")),
        ("shoe size<=42.5", Condition("shoe size", "<=", "42.5")),
        ("note=", Condition("note", "=", "")),
        ("note=a=b<c", Condition("note", "=", "a=b<c")),
        ("price>3", Condition("price", ">", "3")),
    ],
)
def test_parse(text, expected):
    assert parse_where(text, KNOWN, "") == [expected] and parse_where([text, "a=1"], KNOWN, "")[1] == Condition(
        "a", "=", "1"
    )


@pytest.mark.parametrize("text", ["brand", "=x", "", "<3", "  = x"])
def test_malformed(text):
    with pytest.raises(UserError, match="COLUMN=VALUE"):
        parse_where([text], KNOWN, "")


@pytest.mark.parametrize(
    "text, matching, others",
    [
        ("a=7", [7, 7.0, "7"], ["7.0", "07", None, "", 8]),
        ("a!=x", ["y", None, 1], ["x"]),
        ("a=9007199254740993", [9007199254740993], [9007199254740992, 9007199254740994]),
        ("a>9007199254740992", [9007199254740993, "9007199254740993"], [9007199254740992, "9007199254740992"]),
        ("a>3", [float("inf"), " 4 "], ["inf", "nan", "1_000", True]),
        ("a>!", ["x"], [9, 9.5, ""]),
        ("a<10", [9, "9", 9.5, "-1"], [10, "10", "x", "", None]),
        ("a>=10", [10, "10.0", 11], [9, "b", None]),
        ("a>2024-05", ["2024-06-01", "x"], ["2024-04", "", None]),
        ("a=", ["", None], [0, "x"]),
        ("a=True", [True, "True"], [False, 1]),
        ("a<=nan", ["abc"], ["xyz"]),
    ],
)
def test_holds(text, matching, others):
    condition = parse_where(text, KNOWN, "")[0]
    assert [condition.holds(value) for value in matching + others] == [True] * len(matching) + [False] * len(others)


def test_unknown_column_is_named_with_the_known_ones():
    with pytest.raises(UserError, match="shop: no metadata column 'colour'.*brand, price"):
        parse_where("colour=x", ["brand", "price"], "shop")
