"""The names in a PromQL expression: metrics with the labels they are asked for, and the labels it groups by."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

__all__ = ["Names", "names_in"]

FUNCTIONS = {"avg", "histogram_quantile", "increase", "max", "min", "rate", "sum"}  # those in use; a typing error is no metric
GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
OPERATORS = {"and", "or", "unless", "bool"}

TOKEN = re.compile(
    r"""(?P<space>\s+)
    | (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | (?P<range>\[[^\]]*\])
    | (?P<number>\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![a-zA-Z_]))
    | (?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)
    | (?P<operator>=~|!~|!=|==|<=|>=|[-+*/%^<>=(){},])""",
    re.VERBOSE,
)


@dataclass
class Names:
    """What an expression names."""

    metrics: dict[str, set[str]] = field(default_factory=dict)  # with the labels in braces
    matched: list[tuple[str, str, str, str]] = field(default_factory=list)  # metric, label, operator, text
    grouped: set[str] = field(default_factory=set)


def names_in(expression: str) -> Names:
    """Return the names. Raises AssertionError at what is not understood: nothing is passed over."""
    tokens = _tokens(expression)
    names = Names()
    at = 0
    while at < len(tokens):
        kind, text = tokens[at]
        at += 1
        if kind != "name" or text in OPERATORS:
            assert text != "{", f"a selector without a metric in {expression}"
            continue
        following = tokens[at][1] if at < len(tokens) else ""
        if text in GROUPING:
            assert following == "(", expression
            end = tokens.index(("operator", ")"), at)
            names.grouped |= {each for kind, each in tokens[at:end] if kind == "name"}
            at = end + 1
        elif text in FUNCTIONS:
            assert following in ("(", "by", "without"), expression
        else:
            assert following != "(", f"{text} is no function known here, in {expression}"
            labels = names.metrics.setdefault(text, set())
            if following == "{":
                end = tokens.index(("operator", "}"), at)
                for label, operator, value in _matchers(tokens[at + 1 : end]):
                    labels.add(label)
                    names.matched.append((text, label, operator, value))
                at = end + 1
    return names


def _tokens(expression: str) -> list[tuple[str, str]]:
    tokens = []
    at = 0
    while at < len(expression):
        found = TOKEN.match(expression, at)
        assert found, f"what is {expression[at:]!r} in {expression}"
        at = found.end()
        assert found.lastgroup is not None
        if found.lastgroup != "space":
            tokens.append((found.lastgroup, found.group()))
    return tokens


def _matchers(tokens: list[tuple[str, str]]) -> list[tuple[str, str, str]]:
    """Return (label, operator, text) of what is in braces."""
    matchers = []
    for start in range(0, len(tokens), 4):
        (kind, label), (_, operator), (quoted, text), *comma = tokens[start : start + 4]
        assert (kind, quoted, comma) in (("name", "string", []), ("name", "string", [("operator", ",")]))
        assert operator in ("=", "!=", "=~", "!~")
        matchers.append((label, operator, text[1:-1]))
    return matchers
