"""Names that examples have in tar shards: written by ``beitctl data pack``, read by the source webdataset."""

import hashlib
import re
from urllib.parse import quote

PART_BYTES, KEY_BYTES = 200, 800
"""Longest part of a key between slashes, and longest key, that file systems and tar readers take."""


def key(id: str) -> str:
    """Name of an example's members in a tar, up to their first dot; each id has its own.

    What cannot stand in such a name is percent-encoded: dots, spaces, control characters, whatever is not
    ASCII, and slashes that have no name before or after them. An id that becomes too long is replaced by its
    hash. ``urllib.parse.unquote`` turns the others back.
    """
    name = quote(id, safe="/").replace(".", "%2E")
    name = re.sub(r"^/|/$|/(?=/)", "%2F", name) or "%"
    if len(name) > KEY_BYTES or max(map(len, name.split("/"))) > PART_BYTES:
        return "%h" + hashlib.blake2b(id.encode(), digest_size=16).hexdigest()
    return name
