"""Where progress bars are shown."""

import sys


def no_bar(is_spokesman: bool = True) -> bool:
    """For tqdm's `disable`: bars are for who looks on, in a terminal or a notebook. A log file gets lines alone, and of many
    processes one has a bar.
    """
    is_seen = sys.stderr.isatty() or "ipykernel" in sys.modules
    return not (is_spokesman and is_seen)
