"""Names out of files as they can be shown: on one line, printable, and no longer than somebody reads."""


def printable(text: str, characters: int | None = None) -> str:
    """A name for a message: what is not printable is escaped, the middle of a long one is cut out.

    Args:
        text: as it came out of a file; it may hold line breaks, half characters, and bytes that are no UTF-8.
        characters: most that are kept; None keeps all.
    """
    if characters is not None and len(text) > 2 * characters:
        text = text[:characters] + text[-characters:]
    safe = text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)
    if characters is None or len(safe) <= characters:
        return safe
    return f"{safe[: characters // 2 - 1]}…{safe[-(characters - characters // 2) :]}"


def _escaped(sign: str) -> str:
    if "\udc80" <= sign <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(sign) - 0xDC00:02x}"
    return sign.encode("unicode_escape").decode()
