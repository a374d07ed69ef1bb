"""English captions to words, much as Stanford's PTBTokenizer gives them to COCO's caption scores.

That one is a Java program; this one agrees with it on nearly all captions and not on every abbreviation, so
scores made with it say so. Source: the treebank's rules, and what pycocoevalcap 1.2 prints.
"""

import re

REMOVED = frozenset(["'", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"', "''", "``"]) | frozenset(
    "“”‘’–—…"
)
"""Marks that count as no word."""
BRACKETS = str.maketrans({
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
})  # fmt: skip
"""Names of brackets, which do count: COCO's list has them in capitals, the tokenizer writes them small."""
WRITTEN = str.maketrans({"£": "#", "€": "$", "¢": " cents", "½": "1/2", "¼": "1/4", "¾": "3/4"})
"""Characters that the tokenizer writes with others."""
SPLIT = (
    (r"&(amp|lt|gt);", lambda m: {"amp": "&", "lt": "<", "gt": ">"}[m[1].lower()]),
    (
        r"\b(can)(not)\b|\b(gim|lem)(me)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|(?<!\w)('t)(is|was)\b",
        lambda m: " ".join(part for part in m.groups() if part),
    ),
    (r"(?<=\w)n['’]t\b", lambda _: " n't"),
    (r"(?<=\w)['’](s|m|d|ll|re|ve)\b", lambda m: f" '{m[1]}"),
    (r"\by'(?=(?:all|know)\b)", lambda _: "y' "),
    (r"(?<=\w)'n'(?=\w)", lambda _: " 'n' "),
    (r"\b(no\.)(?=\d)", lambda m: f"{m[1]} "),
    (r"(?<=\d)([.:]\d+)(?=[a-z])", lambda m: f"{m[1]} "),
)
"""What is written as two: cannot, don't, it's, y'all, rock'n'roll, no.1, 12:30pm; and characters of HTML."""
SHORT = (
    "mr mrs ms dr st mt ft prof gen col capt rev gov sen rep lt sgt maj pres hon vs etc inc corp co ltd jr "
    "sr ave blvd rd dept bros jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri"
)
"""Short forms that keep their full stop."""
WORD = re.compile(
    rf"""
    https?://[^\s"<>]*[^\s"<>.,!?;:')]
    | [\w.+-]{{1,64}}@\w+(?:[.-]\w+)+                    # a@b.org
    | @\w+ | \#[a-z]\w* | </?[a-z]\w*> | &\#\d+;         # @home  #fun  <tag>  &#39;
    | [:;=]-?[()]                                        # :)
    | n't (?!\w) | '(?:s|m|d|ll|re|ve)(?!\w)             # endings that were cut off
    | 't(?=\ (?:is|was)\b) | \by'(?!\w) | (?<!\w)'(?:n'?|em|\d\ds?)(?!\w)
    | (?:[a-z]\.){{2,}}(?!\w) | (?:[a-z]\.)+[a-z](?!\w)  # u.s.  a.b.c
    | [^\W\d_][\w-]*(?:\.[^\W\d_][\w-]*)+(?:(?<=\.com|\.org|\.net)/[\w/-]*\w)?       # a.svg  a.com/b
    | \b(?:{SHORT.replace(" ", "|")})\. | \b(?:no|fig|pp|est)\.(?=\ ?\d)
    | (?<![\w'’-])[a-z]\.(?!\w|\s+(?:he|she|it|they|there|the|this|an?)\b)           # plan b.
    | (?<!\S)[+-]?\d+(?:[.,:/]\d+)*(?!-?\w)              # 1,000  2.5  3:30  1/2  -1
    | \d+(?:[.,:]\d+)*(?!-?\w)
    | (?-i:\b[A-Z]+(?:&[A-Z]+)+\b) | \bc(?:\+\+|\#)(?!\w)                            # R&B  c++
    | \w+(?:[-'’/]\w+)*                                  # red-haired  o'clock  and/or  8ball
    | \.\.\. | -- | [!?]{{2,}} | \*{{2,}}
    | [^\w\s\x00-\x1f\x7f-\x9f]
    """,
    re.VERBOSE | re.IGNORECASE,
)


def tokens(text: str) -> list[str]:
    """Words of a caption in small letters, without marks."""
    text = text.translate(WRITTEN)
    for pattern, change in SPLIT:
        text = re.sub(pattern, change, text, flags=re.IGNORECASE)
    found = (word.lower() for word in WORD.findall(text) if word not in REMOVED)
    return [word.translate(BRACKETS) for word in found]
