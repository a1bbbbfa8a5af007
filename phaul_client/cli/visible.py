"""Text that came from elsewhere, on its way to a terminal (pure).

A process, a node or a failure may be called what its maker likes. Control characters in it would be the terminal's
commands: they are shown, not obeyed.
"""

import re
from typing import Final

#: C0 but for tab and line feed, DEL, C1, and what turns the direction of writing around.
_CONTROL: Final = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """The text with control characters as `\\x1b`."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
