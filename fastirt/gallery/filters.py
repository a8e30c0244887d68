"""Conditions on metadata, as in `--where "brand=x"`."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple, Sequence, Union

from fastirt.errors import UserError

PATTERN = re.compile(r"\s*([^=!<>]*[^=!<>\s])\s*(!=|<=|>=|==?|<|>)(.*)", re.DOTALL)
# Narrower than float(), so that SQL reads the same texts as numbers.
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)


class Condition(NamedTuple):
    """One comparison of a metadata column with a value, which is text as the user wrote it."""

    column: str
    operator: str  # one of =, !=, <, <=, >, >=
    text: str

    def holds(self, value: Any) -> bool:
        """Whether a row with this value matches.

        `=` compares text, and numbers where the value is stored as a number. `<`, `<=`, `>` and
        `>=` compare numbers where the condition's value is one, else text. A missing value equals
        the empty text, and is neither smaller nor larger than anything; nor is a number and text.
        """
        if self.operator in ("=", "!="):
            return self._equal(value) == (self.operator == "=")
        if value is None or value == "":
            return False
        bound: Any = number(self.text)
        if bound is not None:
            value = value if is_number(value) else number(str(value))
        elif not is_number(value):
            bound, value = self.text, str(value)
        else:
            value = None
        if value is None:
            return False
        if self.operator[0] == "<":
            return bool(value < bound or (value == bound and self.operator == "<="))
        return bool(value > bound or (value == bound and self.operator == ">="))

    def _equal(self, value: Any) -> bool:
        if value is None:
            return self.text == ""
        if is_number(value) and (bound := number(self.text)) is not None:
            return bool(value == bound)
        return str(value) == self.text


def is_number(value: Any) -> bool:
    """Whether a value is stored as a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def number(text: str) -> Union[int, float, None]:
    """The finite number that a text says, or None. An integer stays exact: ids exceed 2^53."""
    text = text.strip(" ")
    if not NUMBER.fullmatch(text):
        return None
    if text.lstrip("+-").isdigit() and len(text) < 20:
        return int(text)
    found = float(text)
    return found if math.isfinite(found) else None


def parse_where(where: Union[str, Sequence[str], None], columns: Sequence[str], place: object) -> list[Condition]:
    """The conditions, all of which a row must match; a value may stand in quotes.

    Raises UserError if one is not COLUMN, operator, VALUE, or its column is not in `columns`.
    """
    conditions = []
    for text in [where] if isinstance(where, str) else list(where or ()):
        match = PATTERN.fullmatch(text)
        if match is None:
            raise UserError(f"--where '{text}': write COLUMN=VALUE, or one of != < <= > >= in place of =")
        column, operator, value = match.groups()
        if column not in columns:
            known = ", ".join(columns) or "none"
            raise UserError(f"{place}: no metadata column '{column}' for --where; it has: {known}")
        value = value.strip()
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        conditions.append(Condition(column, "=" if operator == "==" else operator, value))
    return conditions
