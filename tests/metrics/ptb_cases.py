"""Captions with everything that is hard to tokenize; run it to renew the golden file (needs Java)."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from pathlib import Path

GOLDEN = Path(__file__).parent / "data" / "ptb_golden.json"
GOLDEN_COUNT = 400
STRANGE_COUNT = 300

EDGE_CASES = (
    "",
    "   ",
    ".",
    "...",
    "A man riding a wave on top of a surfboard.",
    "  A  cat\tsits   here .  ",
    "A dog.A cat.Then a bird",
    "a dog... and.. a cat.... so. . . then \u2026 end",
    "It's a dog's life; they're dogs' tails, isn't it? DON'T",
    "don't can't won't shan't ain't cannot Cannot gonna wanna gotta gimme lemme 'tis 'twas",
    "y'all ma'am o'clock O'Brien rock'n'roll rock 'n' roll fish 'n chips 'em 'til ol' cap'n l'eau d'Arc",
    "He said \"hi\", 'hello' ``there'' \u201ccurly\u201d \u2018single\u2019 "
    "\u00abguillemets\u00bb don\u2019t it\u2019s",
    "Mr. Smith and Mrs. Jones of St. Louis, U.S., met Dr. No at 5 p.m. on Jan. 5.",
    "a Ph.D. from the U.S.A. (i.e., a Dr.) vs. J. K. Rowling, Inc. or Co. Ltd. etc.",
    "vitamin b. The dog. plan B. Then it ran. I saw J. Then. he left",
    "1,000 people, 3.5 miles, 1/2 cup, 1 1/2 cups, $5, $5.99, 10%, #1, 5:30, 5:30pm, 10th, '90s, 1990's, -5, +3",
    "no. 5 and No. 7, fig. 2, pp. 3, no. and no",
    "\u00a35 \u20ac6 \u00a57 8\u00a2 \u00bd cup 1\u00bd \u00bc 25\u00b0 m\u00b2 \u00ae \u2122 5\u00d77",
    "call 555-1234 or (555) 555-1234 or 1-800-555-5555 on 12/25/2010 or 2010-11-12",
    "black-and-white T-shirt, 2-year-old, e-mail, mid-air, two-year- old, well -known, dog--cat dog -- cat - bird",
    "caf\u00e9 na\u00efve Z\u00fcrich se\u00f1or \u65e5\u672c "
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u03b1\u03b2\u03b3 e\u0301",
    "smile \U0001f600 dog\U0001f436cat \u2600 \u2764\ufe0f zero\u200bwidth soft\u00adhyphen \u00a0nbsp",
    "dog \u2013 cat \u2014 bird\u2014fish \u2015 a\u2010b \u2212 5",
    "(red) [blue] {green} <b>bold</b> <br /> a<b ( ) -LRB- :) :-( ;) :D :P <3 ^_^ (:",
    "AT&T R&B b&b rock & roll &amp; &lt; &quot;x&quot; &nbsp; A&amp;B &#39;s",
    "and/or he/she 24/7 w/ w/o a/b/c / // \\ \\/",
    "me@home.com @home #tag #1a www.google.com http://a.com/b?c=1, google.com. a.jpg photo.png, .com",
    "http://x8o'{UHeBA http://n{d x.com/n't}v http://{a a j'uvx J'Mcy Mn`tJ0 on`TE Fa\u00adn't",
    "li'l LI'L nat'l cont'd. ev'ry nor'easter s'mores PTe. pteS. MAss. Ark. MfG. b. AcCording b. Their b. However x",
    "<!AO?)%> <b (> \u2019'n\u00a0 '12\u2007 '\u0661\u0661 n\u2018t \u017fq. \u212ag. "
    "'\u017f l\u0131'l \u3000\u3000.org \ua7b1 \u08c2",
    "* ** a*b + = ~ ^ | \\ _ __ a_b a=b a+b 5+5 % & @ # $ ! ? ?! !!! ???",
)

_SUBJECTS = (
    """
    A man|Two dogs|the woman's dog|The dogs' owners|St. Bernard dogs|Mr. Smith|Dr. Jones, Jr.,|a 3-year-old
    boy|An 8-week-old kitten|The U.S. Army|a TV|the "big" cat|a 'small' cat|O'Neil|a black-and-white cow|1,000
    people|5 girls|A half-eaten (red) apple|J.P. Morgan|Someone|The man/woman|AT&T employees|the #1
    player|caf\u00e9 guests|a T-shirt-clad man|They|James's bike|the 1990's car|an x-ray|50% of cows|Ms.
    Lee|A.J.|A bearded man's
""".replace("\n    ", " ")
    .strip()
    .split("|")
)
_VERBS = (
    """
    sits|isn't sitting|is standing|can't stand|cannot see|don't eat|they're eating|won't look|'s looking|is
    "playing"|plays frisbee|rides -- slowly --|gonna jump|wanna play|is half-asleep|(maybe)
    runs|runs/walks|gotta go|doesn't care|is rock'n'rolling|ain't moving|\u2014 it\u2019s late \u2014 sleeps|has
    $5|ate 1/2 of it|should've won
""".replace("\n    ", " ")
    .strip()
    .split("|")
)
_PLACES = (
    """
    on a bench|in St. Louis, Mo.|at 5:30 p.m.|near 5th Ave. and Main St.|on the U.S. coast|at No. 5|in the
    1980s|by the 'Stop' sign|under a 10' x 12' tent|on http://www.flickr.com/photos/1|with a 4x4|for $3.50|in
    Washington, D.C.|next to a red/blue bus|at an angle of 45\u00b0|off-road|on a sunny day :)|with friends &
    family|in Paris, Fr. The end|between 10 and 12|in 'the' \u201ccity\u201d|on top of it...|vs. another|on page
    fig. 2|in the back-yard|of pic1.jpg
""".replace("\n    ", " ")
    .strip()
    .split("|")
)
_ENDS = (
    ".",
    "",
    " .",
    "!",
    "...",
    "?",
    "!!",
    " ",
    ". ",
    '."',
    '".',
    ")",
    ";",
    ", etc.",
    " -",
    "\u2026",
    ".)",
    "?!",
    "'",
)
_JOINS = (" ", ", ", " and ", "; ", ". ", " - ", " -- ", "... ", ": ", "/", "  ", ", but ", " & ", "-")


def captions(count: int, seed: int = 0) -> list[str]:
    """Return the edge cases, then captions from templates, then random joins of their words."""
    rng = random.Random(seed)
    words = sorted({word for text in EDGE_CASES for word in text.split()})
    texts = list(EDGE_CASES)
    while len(texts) < count:
        if rng.random() < 0.6:
            parts = [rng.choice(_SUBJECTS), rng.choice(_VERBS), rng.choice(_PLACES)]
            text = " ".join(parts) + rng.choice(_ENDS)
        else:
            pool = words if rng.random() < 0.7 else [*_SUBJECTS, *_VERBS, *_PLACES]
            text = "".join(rng.choice(pool) + rng.choice(_JOINS) for _ in range(rng.randint(1, 8)))
        texts.append(rng.choice((str, str, str.upper, str.capitalize))(text))
    return texts[:count]


def strange(count: int, seed: int = 0) -> list[str]:
    """Return strings that no one writes: ASCII, characters that the lexer names, and others up to FFFF.

    Unassigned characters are left out, since the case of some depends on the version of Unicode.
    """
    rng = random.Random(seed)
    pieces = sorted({word for text in EDGE_CASES for word in text.split()})
    named = sorted({sign for text in EDGE_CASES for sign in text if not sign.isascii()})
    texts: list[str] = []
    while len(texts) < count:
        plain = len(texts) % 2 == 0
        text = ""
        for _ in range(rng.randint(1, 20)):
            draw = rng.random()
            if draw < 0.5 or (plain and draw < 0.8):
                text += chr(rng.randrange(0x20, 0x7F))
            elif draw < 0.8:
                text += rng.choice(named) if draw < 0.6 else chr(rng.choice((0xA0, 0x600, 0x2000)) + rng.randrange(500))
            else:
                text += rng.choice(pieces) if rng.random() < 0.7 or not plain else " "
        if _is_settled(text):
            texts.append(text)
    return texts


def _is_settled(text: str) -> bool:
    """Whether its letters had their case before Unicode 6.1, and it opens no tag that the next line might close."""
    old = all(unicodedata.category(sign) != "Cn" and sign not in "\u20be\u20bf" for sign in text)
    return old and not re.search(r"<[A-Za-z!?][^>]*$|<[A-Za-z][^>]*=\s*['\"]", text)


def main() -> None:
    """Write the golden file: pairs of caption and tokens of the Java tokenizer."""
    from visexpert.metrics.java import tokenize_with_java

    texts = captions(GOLDEN_COUNT) + strange(STRANGE_COUNT)
    pairs = zip(texts, tokenize_with_java(texts), strict=True)
    lines = ",\n".join(json.dumps([text, " ".join(tokens)]) for text, tokens in pairs)
    GOLDEN.write_text(f"[\n{lines}\n]\n", encoding="ascii")


if __name__ == "__main__":
    main()
