"""English captions to words, much as Stanford's PTBTokenizer gives them to COCO's caption scores.

That one is a Java program; this one agrees with it on nearly all captions and not on every abbreviation, so
scores made with it say so. Source: the treebank's rules, and what pycocoevalcap 1.2 prints.
"""

import re

REMOVED = frozenset(["'", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"', "''", "``"]) | frozenset(
    "“”‘’–—…"
)
"""Marks that count as no word."""
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
"""Names of brackets, which do count: COCO's list has them in capitals, the tokenizer writes them small."""
WHOLE = re.compile(r"\b(can)(not)\b|\b(gim|lem)(me)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b")
"""Words that the treebank writes as two."""
NOT = re.compile(r"(?<=\w)n['’]t\b")
"""don't: do n't."""
ENDING = re.compile(r"(?<=\w)['’](s|m|d|ll|re|ve)\b")
"""it's, we'll: it 's, we 'll."""
WORD = re.compile(
    r"""
    n't (?!\w) | '(?:s|m|d|ll|re|ve)(?!\w)               # endings that were cut off
    | (?:[a-z]\.){2,}                                    # u.s.
    | \b(?:mr|mrs|ms|dr|st|mt|prof|gen|col|capt|rev|gov|sen)\.
    | (?<!\S)[+-]?\d+(?:[.,:/]\d+)*(?!-?\w)              # 1,000  2.5  3:30  1/2  -1
    | \d+(?:[.,:]\d+)*(?!-?\w)
    | \w+(?:[-'’/]\w+)*                                  # red-haired  o'clock  and/or  8ball
    | \.\.\. | -- | [!?]{2,}
    | [^\w\s]
    """,
    re.VERBOSE,
)


def tokens(text: str) -> list[str]:
    """Words of a caption in small letters, without marks."""
    text = WHOLE.sub(lambda match: " ".join(part for part in match.groups() if part), text.lower())
    text = ENDING.sub(r" '\1", NOT.sub(" n't", text))
    return [BRACKETS.get(word, word) for word in WORD.findall(text) if word not in REMOVED]
