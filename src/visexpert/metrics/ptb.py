"""The Penn Treebank tokenizer of the COCO caption evaluation, in Python."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from visexpert.metrics.ptb_characters import DIGIT, FOLDED, LETTER, MARK, SPACE, SYMBOL, kinds

PUNCTUATION = frozenset("'' ' `` ` . ? ! , : - -- ... ;".split())
"""Tokens that the COCO evaluation drops after tokenizing."""


def tokenize(text: str) -> list[str]:
    """Tokenize a caption as pycocoevalcap's ``PTBTokenizer`` does: PTB tokens in lower case, without punctuation.

    That class runs the lexer of Stanford CoreNLP 3.4.1 (Java) and then drops quotes, dashes, full stops, ``?``, ``!``,
    commas, colons and semicolons. This is a rewrite from the lexer's observed behavior. At each place the rule with
    the longest match wins, counting look-ahead text; the first of equally long matches wins.
    Characters that no rule knows (emoji, most control characters) separate tokens and disappear.

    Known differences: initials with a long s or a Kelvin sign in place of s or k, and cases where the two runtimes
    change case differently: a capital sigma before a hyphen, letters of newer versions of Unicode.

    Args:
        text: A caption; line breaks count as spaces.
    """
    text = one_line(text)
    length = len(text)
    seen = kinds(text) + "\n\n"  # what follows a caption in the lexer's input, where rules look ahead
    tokens = []
    place = 0
    while place < length:
        plain = _PLAIN_WORD.match(seen, place)
        if plain:
            token, place = plain[0].lower(), plain.end()
        else:
            emit, end = _next_token(seen, place)
            token, place = emit(text[place:end]).lower(), end
        if token and token not in PUNCTUATION:
            tokens.append(token)
    return tokens


def one_line(text: str) -> str:
    """Replace line breaks of every kind with spaces."""
    return " ".join(text.splitlines())


def _next_token(seen: str, place: int) -> tuple[Callable[[str], str], int]:
    """Return the function that emits the token at ``place``, and the place after it."""
    emit: Callable[[str], str] = drop
    longest, end = place, place + 1
    for rule in _rules_for(seen[place]):
        found = rule.pattern.match(seen, place)
        if found and found.end() > longest:
            longest, emit, end = found.end(), rule.emit, found.end(1)
    return emit, end


@lru_cache(maxsize=1024)
def _rules_for(first: str) -> tuple[Rule, ...]:
    """Return the rules that can start with a character; caching them makes tokenizing three times as fast."""
    return tuple(rule for rule in RULES if rule.starts.match(first))


# By far the most common tokens: an ASCII word before a space, a comma and a space, or the end. No other rule matches
# more or differently there, except for the six words that are split in two.
_PLAIN_WORD = re.compile(r"(?!(?:can|gon|got|gim|lem|wan)(?:not|na|ta|me)\b)[A-Za-z]+(?=,?[ \n])", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """One kind of token.

    Args:
        pattern: Group 1 is the token; the text matched after it must follow and counts towards the length.
        starts: Characters that it can start with (may include too many).
        emit: Turns the matched text into the emitted token.
    """

    pattern: re.Pattern[str]
    starts: re.Pattern[str]
    emit: Callable[[str], str]


def _rule(starts: str, token: str, ahead: str = "", emit: str | Callable[[str], str] | None = None) -> Rule:
    return Rule(re.compile(f"({token}){ahead}"), re.compile(starts), _emitter(emit))


def _emitter(emit: str | Callable[[str], str] | None) -> Callable[[str], str]:
    if emit is None:
        return str
    return (lambda token: emit) if isinstance(emit, str) else emit


def drop(token: str) -> str:
    """Emit nothing."""
    return ""


def _without_soft_hyphens(token: str) -> str:
    return token.replace("\u00ad", "") or "-"


def _unbroken(token: str) -> str:
    return token.replace(" ", "\u00a0")


def _bracketed(token: str) -> str:
    return token.replace("(", "-lrb-").replace(")", "-rrb-")


def _straight(token: str) -> str:
    return re.sub("[\u0091\u2018\u201b]", "`", re.sub("[\u0092\u2019]|&apos;", "'", token))


def _plain_ampersand(token: str) -> str:
    return re.sub("&amp;", "&", token, flags=re.IGNORECASE)


def _capital(word: str) -> str:
    """Return a pattern for a word whose first letter is a capital, with the others in any case."""
    return f"{word[0]}(?i:{word[1:]})"


# --- classes of characters -------------------------------------------------------------------------------------------
_LETTERS = LETTER + FOLDED
_LETTER = rf"(?:[A-Za-z{_LETTERS}{MARK}\u00ad]|&[aeiouAEIOU](?i:acute|grave|uml);)"
_DIGIT = f"[0-9{DIGIT}]"
_ALNUM = f"[A-Za-z{_LETTERS}0-9{DIGIT}]"
_APOSTROPHE = "(?:['\u0092\u2019]|(?i:&apos;))"
_ANY_APOSTROPHE = "(?:['`\u0091\u0092\u2018\u2019\u201b]|(?i:&apos;))"
_SPACE = f"[ \t\u00a0{SPACE}]"
_SPACE_OR_END = f"[ \t\n\u00a0{SPACE}]"
_HYPHEN = "[-_\u058a\u2010\u2011]"
_URL = r'[^ \t\n"<>|(){}]'
_PATH = r'[^ \t\n"<>|()]'
_URL_END = r'[^ \t\n"<>|.!?(){},\-]'
_MAIL = r'[^ \t\n"<>|().\u00a0{}]'

# Where a rule may start: a word, a number, an apostrophe, anything.
_W = f"[A-Za-z{_LETTERS}{MARK}0-9{DIGIT}\u00ad&]"
_N = f"[0-9{DIGIT}+\\-.:,\u00ad\u066b\u066c(]"
_A = "['`\u0091\u0092\u2018\u2019\u201b&]"
_S = "[^A-Za-z0-9]"

_CURLY = "[\u0091-\u0094`\u2018-\u201f\u2039\u203a\u00ab\u00bb]"
_STRAIGHT_QUOTES = {
    sign: text
    for text, signs in {
        "`": "`\u0091\u2018\u201b\u2039",
        "'": "\u0092\u2019\u203a",
        "``": "\u0093\u201c\u00ab",
        "''": "\u0094\u201d\u00bb",
        "\u201a": "\u201a",
        "\u201e": "\u201e",
        "\u201f": "\u201f",
    }.items()
    for sign in signs
}

# --- words -----------------------------------------------------------------------------------------------------------
_WORD = f"{_LETTER}(?:{_LETTER}|{_DIGIT})*(?:[.!?]{_LETTER}(?:{_LETTER}|{_DIGIT})*)*"
_ELIDED = f"(?:[dDoOlL]{_ANY_APOSTROPHE}{_ALNUM})?{_ALNUM}+"
_HYPHENATED = f"{_ELIDED}(?:{_HYPHEN}{_ELIDED})*"
_LETTERS_AND_STOPS = r"[A-Za-z](?:\.[A-Za-z])+"
_ACRONYM = rf"(?:(?i:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R))|{_LETTERS_AND_STOPS})"
_INITIALS = "[A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+"
_DASHED = rf"[A-Za-z0-9][A-Za-z0-9.,\u00ad]*(?:-(?:{_LETTERS_AND_STOPS}\.|[A-Za-z0-9\u00ad]+))+"
_SUFFIX = f"{_APOSTROPHE}(?:[msdMSD]|(?i:re|ve|ll))"
_NOT = f"[nN]{_ANY_APOSTROPHE}[tT]"
_NUMBER = rf"(?:{_DIGIT}*(?:[.:,\u00ad\u066b\u066c]{_DIGIT}+)+|{_DIGIT}+)"
_FRACTION = rf"(?:{_DIGIT}{{1,4}}[- \u00a0])?{_DIGIT}{{1,4}}(?:\\?/|\u2044){_DIGIT}{{1,4}}"
_TAG_NAME = r"[A-Za-z][A-Za-z0-9_:.\-]*"
_TAG = (
    rf"<(?:[!?][A-Za-z\-][^>\r]*|{_TAG_NAME}(?: +(?:{_TAG_NAME} *= *(?:'[^']*'|\"[^\"]*\"|{_TAG_NAME})|{_TAG_NAME}))*"
    rf" */?|/{_TAG_NAME}) *>"
)
_PHONE = (
    r"(?:\([0-9]{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \u00a0])?[0-9]{2,4}[- \u00a0])"
    r"[0-9]{3,4}[- \u00a0]?[0-9]{3,5}"
)
_HOST = r'(?i:www)\.(?:[^ \t\n"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}|(?:[^ \t\n"`\'<>|.!?(){},-_$]+\.)+(?i:com|net|org|edu)'
_HOST_START = "[^ \t\n\"'`<>|.!?(){}]"
_FILE_TYPES = (
    "docx?|html?|jpe?g|java|class|cpp|xml|bat|bmp|cgi|dll|exe|gif|gz|jar|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar|txt"
    "|wav|zip|c|h|x"
)

# --- abbreviations, which keep their full stop -----------------------------------------------------------------------
_TITLES = """
    adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col cpl dept det dr drs elec ens ft gen gov govs
    hon insp invt jos lieut lt maj messrs mlle mme mr mrs ms msgr mt natl pfc ph pres prof profs pvt rep reps rev sen
    sens sfc sgt spc st ste supt treas vs wm
""".split()
_ENDINGS = """
    al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext feb fla
    fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla penn plc rd rt
    sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo
""".split()
_ENDINGS_NOT_LOWER = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash".split()

_TITLE = rf"(?:(?i:{'|'.join(_TITLES)})|[mM][ft][gG]|[A-Za-z])\."
_ENDING = (
    rf"(?:(?i:ph\.d|ed\.d|{'|'.join(_ENDINGS)})|[pP]{{1,2}}[tT][ey][sS]?"
    rf"|{'|'.join(_capital(word) for word in _ENDINGS_NOT_LOWER)})\."
)
_BEFORE_NUMBER = r"(?i:art|ca|figs?|nos?|op|pp|prop)\."

# A lone letter before ". The" ends a sentence; before any other word it is an initial.
_OPENERS = """
    A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now Once One
    Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You
""".split()
_OPENER = rf"(?:{'|'.join(_capital(word) for word in _OPENERS)}|M[rRsS]\.|{_TAG})"

# --- words with an apostrophe that stay whole ------------------------------------------------------------------------
_WITH_APOSTROPHE = (
    f"{_APOSTROPHE}[nN]{_APOSTROPHE}?",
    f"[lLdDjJ]{_APOSTROPHE}",
    f"(?i:dunkin|somethin|ol){_APOSTROPHE}",
    f"{_APOSTROPHE}(?i:em|till?|cause|[2-9]0s)",
    f"[A-HJ-XZn]{_ANY_APOSTROPHE}[A-Za-z{_LETTERS}]{{2,}}",
    f"[oO]{_ANY_APOSTROPHE}[oO]|(?i:cap){_APOSTROPHE}[nN]|(?i:c'mon)|[cC]{_APOSTROPHE}(?i:est)|(?i:e'er|s'mores)",
    r"(?i:cont'd)\.?|(?i:ev'ry|li'l|nat'l|nor'easter)",
    f"[A-Za-z{_LETTERS}]+[aeiouyAEIOUY]{_ANY_APOSTROPHE}[aeiouA-Z][A-Za-z{_LETTERS}]*",
)
"""One rule each: in an alternation, Python takes the first match, the lexer the longest."""

RULES: tuple[Rule, ...] = (
    _rule(_SPACE, f"{_SPACE}+", emit=""),
    # Words that are split in two.
    _rule(_W, "(?i:can)", "(?i:not)"),
    _rule(_W, "(?i:gon|wan)", "(?i:na)"),
    _rule(_W, "(?i:got)", "(?i:ta)"),
    _rule(_W, "(?i:lem|gim)", "(?i:me)"),
    _rule("'", "'[tT]", "(?i:is|was)"),
    # Mark-up and entities.
    _rule("<", _TAG, emit=_unbroken),
    _rule("&", "&(?i:MD|mdash|ndash);", emit="--"),
    _rule("&", "&(?i:amp);", emit="&"),
    _rule("&", "&(?i:HT|TL|UR|LR|QC|QL|QR|odq|cdq|#[0-9]+);"),
    _rule("&", "(?i:&nbsp;)", emit=""),
    _rule("&", "(?i:&lt;)", emit="<"),
    _rule("&", "(?i:&gt;)", emit=">"),
    # Words.
    _rule(_W, _WORD, _SUFFIX, _without_soft_hyphens),
    _rule(_W, f"[yY]{_APOSTROPHE}", f"[A-Za-z{_LETTERS}]"),
    _rule(_W, _WORD, emit=_without_soft_hyphens),
    _rule(_W, "[A-Za-z\u00ad]*[A-MO-Za-mo-z]\u00ad*", _NOT, _without_soft_hyphens),
    *(_rule(f"{_W}|{_A}", words) for words in _WITH_APOSTROPHE),
    _rule(_W, f"(?i:https?)://{_URL}+{_URL_END}"),
    _rule(_HOST_START, f"(?:{_HOST})/{_PATH}+{_URL_END}"),
    _rule(_HOST_START, _HOST),
    _rule(
        "[<&]|[a-zA-Z0-9]", rf"(?i:&lt;|<)?[a-zA-Z0-9][^ \t\n\"<>|()\u00a0{{}}]*@(?:{_MAIL}+\.)*{_MAIL}+(?i:&gt;|>)?"
    ),
    _rule("@", "@[A-Za-z_][A-Za-z_0-9]*"),
    _rule("#", f"#{_LETTER}+"),
    _rule(_A, _SUFFIX, "[^A-Za-z]", _straight),
    _rule("'", "'", r"[A-Za-z][^ \t\n\u00a0]"),
    _rule(_A, _SUFFIX, emit=_straight),
    _rule(_W, _NOT, emit=_straight),
    # Numbers.
    _rule(_N, rf"{_DIGIT}{{1,2}}[-/]{_DIGIT}{{1,2}}[-/]{_DIGIT}{{2,4}}"),
    _rule(_N, rf"[-+]?{_NUMBER}", emit=_without_soft_hyphens),
    _rule(_S, "[\u207a\u207b\u208a\u208b]?(?:[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+|[\u2080-\u2089]+)"),
    _rule(_N, _FRACTION, emit=_unbroken),
    *(
        _rule(sign, sign, emit=text)
        for sign, text in zip("\u00bc\u00bd\u00be\u2153\u2154", ("1/4", "1/2", "3/4", "1/3", "2/3"), strict=True)
    ),
    _rule(f"[-a-zA-Z{FOLDED}]", r"-(?i:[lr][rcs]b)-|(?i:pro-|anti-|S&P-500|S&Ls|C\.D\.s)"),
    _rule(_A, f"{_APOSTROPHE}[0-9]{{2}}", _SPACE_OR_END),
    # Compounds.
    _rule(_W, _HYPHENATED),
    _rule(_W, rf"{_HYPHENATED}\.", "[,;:\u3001]"),
    _rule("[A-Z]", _INITIALS, emit=_plain_ampersand),
    _rule("[A-Z]", rf"{_INITIALS}\.", "[,;:\u3001]", _plain_ampersand),
    _rule("[A-Za-z0-9]", r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"),
    _rule("[A-Z$#]", r"[A-Z]*\$|#+"),
    _rule("\u00a2", "\u00a2", emit="cents"),
    _rule("\u00a3", "\u00a3", emit="#"),
    _rule("[\u0080\u00a4\u20a0\u20ac]", "[\u0080\u00a4\u20a0\u20ac]", emit="$"),
    # Abbreviations.
    _rule(f"[A-Za-z{FOLDED}]", _ENDING, r"[\s\S]{2}"),
    _rule("[A-Za-z]", "[A-Za-z]", rf"\.{_SPACE}+{_OPENER}{_SPACE_OR_END}"),
    _rule(f"[A-Za-z{FOLDED}]", _TITLE),
    _rule(f"[A-Za-z{FOLDED}]", _BEFORE_NUMBER, f"{_SPACE}?{_DIGIT}"),
    _rule(f"[A-Za-z{FOLDED}]", rf"{_ACRONYM}\."),
    _rule(f"[A-Za-z{FOLDED}]", _ACRONYM, _SPACE_OR_END),
    _rule(r"[0-9(+]", _PHONE, emit=lambda token: _bracketed(_unbroken(token))),
    _rule(r"[0-9+]", r"(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"),
    _rule(_W, rf"{_WORD}\.", "[,;:\u3001]", _without_soft_hyphens),
    _rule(_W, rf"(?:{_LETTER}|{_DIGIT})+(?:\.(?:{_LETTER}|{_DIGIT})+)*\.(?i:{_FILE_TYPES})", r"[\s.?!,]"),
    _rule("[A-Za-z0-9]", _DASHED, emit=_without_soft_hyphens),
    _rule("[A-Za-z0-9]", rf"{_DASHED}\.", "[,;:\u3001]", _without_soft_hyphens),
    # Faces.
    _rule("[<>:;=]", r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?![A-Za-z0-9])", emit=_bracketed),
    _rule(r"[\^x=~<>]", r"[\^x=~<>]\.\[\^[xX]=[^<]*<>\]"),  # as in the lexer, which has a wrong character class here
    _rule(r"[-\^x=~<>'(]", r"[-\^x=~<>']_[-\^x=~<>']", emit=_bracketed),
    _rule(r"\(", r"\([-\^x=~<>'][_.]?[-\^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\)", emit=_bracketed),
    # Punctuation and symbols.
    _rule("[cCfF]", r"[cC]\+\+|[cCfF]#"),
    _rule("[<>]", "<<|>>|[<>]"),
    *(
        _rule(re.escape(sign), re.escape(sign), emit=text)
        for sign, text in zip("()[]{}", ("-lrb-", "-rrb-", "-lsb-", "-rsb-", "-lcb-", "-rcb-"), strict=True)
    ),
    _rule(r"[.\u2026]", "\\.{3,5}|(?:\\.[ \u00a0]){2,4}\\.|\u2026", emit="..."),
    _rule("[?!]", "[?!]+"),
    _rule("[.,:;]", "[.,:;]"),
    _rule("[-\u0096\u0097\u2013-\u2015]", "-{1,4}|[\u0096\u0097\u2013-\u2015]", emit="--"),
    _rule("-", "-{5,}"),
    _rule("_", "_+"),
    _rule("@", "@+"),
    _rule(r"[*\\]", r"(?:\\\*){1,3}|\*+"),
    _rule("['`\"]", "''|``|['`\"]", emit="'"),
    _rule("&", "(?i:&quot;|&apos;)", emit=lambda token: "'" if token.islower() else token),
    _rule(_CURLY, f"{_CURLY}{{1,2}}", emit=lambda token: "".join(_STRAIGHT_QUOTES[sign] for sign in token)),
    _rule(_S, rf"[%&+=~^|\\/{SYMBOL}\u2044\u207a\u207b\u208a\u208b\u3001]"),
    _rule(_W, f"[{MARK}\u00ad]", emit=_without_soft_hyphens),
)
