"""Captions cut into words as coco-caption cuts them, without Java.

coco-caption (Chen et al. 2015, arXiv 1504.00325, section 3.1) runs Stanford's PTBTokenizer (CoreNLP 3.4.1,
`-preserveLines -lowerCase`) and drops some punctuation. This tokeniser is written from what that one gives
for captions, and keeps what looks odd but changes scores: `(` is `-lrb-` and stays, for the official list
spells it in capitals; `!!` stays, `!` goes; `cannot` is two words; `22 3/4` is one, with a no-break space.

The official one reads all captions as the lines of one file, so a line break inside a caption shifts every
caption after it, and whether `K.` at the end keeps its period depends on the next caption's first word. Here
each caption is cut by itself: a line break is a space, and a single letter at the end loses its period.
"""

from __future__ import annotations

import re

PUNCTUATION = frozenset("'' ' `` ` . ? ! , : - -- ... ;".split())
"""What is dropped: of the official list what a lower-cased text can hold."""

# One word together with their period.
_ABBREVIATIONS = """
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri
    ala ariz calif colo conn dak del fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt
    wis wyo inc co cos corp ltd plc dept mfg bhd assn univ intl sys ph jr sr bros blvd rd esq etc al seq
    mr mrs ms dr drs prof profs sen sens rep reps lt col gen messrs gov govs adm rev maj sgt cpl pvt capt st
    ste ave pres lieut hon brig comdr cmdr pfc spc supt det vs alex wm jos cie cf mt ft sq est
"""
# In small letters these are words.
_IN_CAPITALS = "Ark Ill Mass Miss Ore Pa Tex Wash"
# With their period only before a number.
_BEFORE_NUMBERS = "no nos art fig prop"
# A single letter before one of these ends a sentence and is no initial.
_STARTERS = """
    A An About After As At But He Her Here However If In It Last Many More Mr Ms Now One Other Our She Since
    So Some Such That The Their Then There These They This We What When While Yet You
"""
_TWO_WORDS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "wanna": ("wan", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "gimme": ("gim", "me"),
}
_WRITTEN = {
    **dict(zip("¼½¾⅓⅔⅛⅜⅝⅞", "1/4 1/2 3/4 1/3 2/3 1/8 3/8 5/8 7/8".split(), strict=True)),
    **{"€": "$", "¤": "$", "£": "#", "¢": "cents"},
    **{"&amp;": "&", "&lt;": "<", "&gt;": ">"},
}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_BRACKET = re.compile(r"[()\[\]{}]")

# Java's lexer knows no characters beyond the first plane, emoji among them.
_UNKNOWN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028\u2029\ufe00-\ufe0f\ufeff\ufffd\U00010000-\U0010ffff]"
)


def _any(names: str) -> str:
    return "|".join(names.split())


_LETTER = r"(?:(?![\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209c\u2150-\u218b])[^\W\d_][\u0300-\u036f]*)"
_ALNUM = rf"(?:\d|{_LETTER})"
_APOS = "['\u2019]"

# In the order in which they are tried; the name of what matched says what becomes of it.
_TOKEN = re.compile(
    rf"""
    (?P<plain>      [^\W\d_\u00b2-\u00be]+ (?=[ ,]|$) )
  | (?P<tag>        <[!?/]?[A-Za-z][^<>]*> )
  | (?P<url>        (?:https?|ftp)://[^\s"<>|()]+[^\s"<>|().,;:!?'-] )
  | (?P<mail>       [A-Za-z0-9][\w.+-]{{0,63}}@[A-Za-z][\w-]*(?:\.[\w-]+)* | [@#][A-Za-z_]\w* )
  | (?P<smiley>     [<>]?[:;=][-o*']?[()DPdpO\\{{@|\[\]](?!\w) )
  | (?P<fraction>   \(\d{{3}}\)[ -]?\d{{3}}-\d{{4}} | (?:\d{{1,4}}[- ])?\d{{1,4}}/\d{{1,4}}(?![\w/]|-\w) )
  | (?P<clitic>     {_APOS}(?:s|m|d|re|ve|ll)(?!\w) | n{_APOS}t(?!\w) )
  | (?P<negated>    {_LETTER}+(?=n['\u2019`]t(?!\w)) | n`t(?!\w) )
  | (?P<apostrophe> (?!^){_APOS}n(?:{_APOS}|(?!\w)) | (?<!\w){_APOS}(?:em|till?|cause)(?!\w)
                  | (?<![^ ]){_APOS}(?:[2-9]0s|\d\d)(?![^\s,.]) | {_APOS}t(?=is\b|was\b)
                  | c{_APOS}mon | s{_APOS}mores | nor{_APOS}easter | ol{_APOS} | y{_APOS}(?=all\b)
                  | o{_APOS}{_LETTER}{{2,}} | [ldj]{_APOS}{_LETTER}+ | (?-i:[A-HJ-XZ]){_APOS}{_LETTER}{{2,}}
                  | {_LETTER}*[aeiouy](?!{_APOS}(?:s|m|d|re|ve|ll)(?!\w)){_APOS}(?-i:[aeiouA-Z]){_LETTER}* )
  | (?P<acronym>    ph\.d\. | (?:{_LETTER}+-)?{_LETTER}(?:\.{_LETTER})+\b\.?(?:-{_ALNUM}+)*
                  | {_LETTER}\.(?![^\W\d_]|$|\ (?-i:{_any(_STARTERS)})\b) )
  | (?P<abbreviated> (?:{_any(_ABBREVIATIONS)}|(?-i:{_any(_IN_CAPITALS)}))\.(?!\w)
                  | (?:{_any(_BEFORE_NUMBERS)})\.(?=\ *\d) )
  | (?P<time>       \d+:\d+(?=[ap]\.?m\b) )
  | (?P<hyphenated> {_ALNUM}(?:{_ALNUM}|[.,](?={_ALNUM}))*(?:-{_ALNUM}+)+ )
  | (?P<slashed>    {_ALNUM}+(?:-{_LETTER}+){{0,2}}(?:/{_ALNUM}+(?:-{_LETTER}+){{0,2}}){{1,2}} )
  | (?P<company>    (?-i:[A-Z]+(?:(?:[&+]|&amp;)[A-Z]+)+) )
  | (?P<currency>   (?-i:[A-Z]*)\$ )
  | (?P<word>       c\+\+ | {_LETTER}{_ALNUM}*(?:_{_ALNUM}+)*(?:[.!?]{_LETTER}{_ALNUM}*)* )
  | (?P<number>     \d+(?:\.\d+)*\.?{_LETTER}{_ALNUM}* | [-+]?(?:\d+(?:[.,:]\d+)*|(?:[.,:]\d+)+) )
  | (?P<dropped>    \.+ | -{{1,4}}(?!-) | [.,;"“”«»'‘’‹›`–—―…] | &(?:quot|nbsp|apos); )
  | (?P<mark>       [!?]+ | -+ | \*+ | _+ | <+ | >+ | &(?:amp|lt|gt); | \S )
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokenise(caption: str) -> list[str]:
    """The words of a caption, in lower case and without punctuation; none for a caption of punctuation alone.

    Only `22 3/4` and phone numbers hold a no-break space.
    """
    text = " ".join(_UNKNOWN.sub(" ", caption).replace("\u00ad", "").split())
    words: list[str] = []
    for match in _TOKEN.finditer(text):
        kind, word = match.lastgroup, match[0].lower()
        if kind == "dropped":
            continue
        if kind == "clitic":
            word = word.replace("\u2019", "'")
        elif kind == "fraction":
            word = word.replace(" ", "\u00a0")
        if kind in ("plain", "word") and word in _TWO_WORDS:
            words.extend(_TWO_WORDS[word])
        else:
            word = _WRITTEN.get(word, word)
            words.append(word if kind in ("plain", "url") else _BRACKET.sub(lambda m: _BRACKETS[m[0]], word))
    return [word for word in words if word not in PUNCTUATION]
