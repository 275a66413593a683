"""Checks before the start: `__main__` makes them, through a `meeting` of all processes."""
