"""Characters as the PTB tokenizer sees them: a few kinds, and some that its rules name."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right

LETTER, DIGIT, MARK, SYMBOL, UNKNOWN = "\u00e9\u0660\u0301\u00a9\u0001"
"""The one character that stands for all non-ASCII characters of its kind in :func:`kinds`."""


def kinds(text: str) -> str:
    """Replace each non-ASCII character by the one that stands for its kind; the length stays.

    So the rules' patterns name one letter in place of 48,000, and compile in no time. Characters that rules name stay
    themselves. Characters that are unknown to the lexer (emoji among them) become :data:`UNKNOWN`.
    """
    return text if text.isascii() else text.translate(_KINDS)


class _Kinds(dict[int, str]):
    """Finds the kind of a character when it is first met."""

    def __missing__(self, code: int) -> str:
        self[code] = kind = _kind(code)
        return kind


def _kind(code: int) -> str:
    character = chr(code)
    if code < 0x80 or character in _NAMED:
        return character
    if code > 0xFFFF:  # the lexer sees two halves and knows neither
        return UNKNOWN
    if _listed(code, _MARKS):
        return MARK
    if _listed(code, _SYMBOLS):
        return SYMBOL
    category = unicodedata.category(character)
    return LETTER if category.startswith("L") else DIGIT if category == "Nd" else UNKNOWN


def _ranges(text: str) -> list[int]:
    """First and last + 1 code of each range, one after the other."""
    ends = [part.partition("-") for part in text.split()]
    return [code for first, _, last in ends for code in (int(first, 16), int(last or first, 16) + 1)]


def _listed(code: int, ranges: list[int]) -> bool:
    return bisect_right(ranges, code) % 2 == 1


_NAMED = frozenset(
    "\u0080\u0091\u0092\u0093\u0094\u0096\u0097\u00a0\u00a2\u00a3\u00a4\u00ab\u00ad\u00b9\u00b2\u00b3\u00bb"
    "\u00bc\u00bd\u00be\u058a\u066b\u066c\u2010\u2011\u2013\u2014\u2015\u2018\u2019\u201b\u201a\u201c\u201d\u201e\u201f\u2026"
    "\u2039\u203a\u2044\u2070\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u2080\u2081\u2082\u2083\u2084"
    "\u2085\u2086\u2087\u2088\u2089\u208a\u208b\u20a0\u20ac\u2153\u2154\u3001"
)

# Found by giving the lexer every character: these join a word as letters do, but do not take part in compounds.
_MARKS = _ranges(
    """
    02C2-02C5 02D2-02DF 02E5-02EB 02ED 02EF-036F 0375 0378-0379 0384-0385 03F6 0483-0487 055A-055F 0591-05BD
    05BF 05C1-05C2 05C4-05C5 05C7 0615-061A 064B-065E 0670 06D6-06E4 06E7-06ED 06FD-06FE 070F 0711 0730-074C
    07A6-07B0 07EB-07F3 0900-0903 093C 093E-094E 0951-0955 0962-0963 0981-0983 09BC 09BE-09C4 09C7-09C8
    09CB-09CD 09D7 09E2-09E3 0A01-0A03 0A3C 0A3E-0A4F 0A81-0A83 0ABC 0ABE-0ACF 0B82 0BBE-0BC2 0BC6-0BC8
    0BCA-0BCD 0C01-0C03 0C3E-0C56 0D3E-0D44 0D46-0D48 0E31 0E34-0E3A 0E47-0E4E 0EB1 0EB4-0EBC 0EC8-0ECD
    """
)

# These are tokens of their own.
_SYMBOLS = _ranges(
    """
    00A1 00A5-00A9 00AC 00AE-00B4 00B6-00B9 00BF 00D7 00F7 037E 0387 0589 05BE 05C0 05C3 05C6 05F3-05F4
    0600-0603 0606-060C 0614 061B 061E-061F 066A 066D 06D4 0700-070D 07F6-07F8 0964-0965 0E3F 0E4F 1FBD
    2016-2017 201A 201E-2023 2030-2038 203B 203E-2042 2070 2074-207E 2080-208E 20A4 2100-2101 2103-2106
    2108-2109 2114 2116-2118 211E-2123 2125 2127 2129 212E 213A-213B 2140-2144 214A-214D 214F 2155-215E
    2190-2BFF 3001-3002 3012 30FB FF01-FF0F FF1A-FF20 FF3B-FF40 FF5B-FF65 FFE0-FFE1 FFE5-FFE6
    """
)

_KINDS = _Kinds()
