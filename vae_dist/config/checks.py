"""What is said of values that cannot be right."""


class InputError(ValueError):
    """Bad configuration or data. Entry points print it once, without a traceback, and exit with status 2."""


class ImagesLost(RuntimeError):
    """Images that were there when a run began cannot be had any more. Only some ranks may find it."""


def require(condition: bool, flag: str, value: object, wanted: str) -> None:
    if not condition:
        shown = " ".join(map(str, value)) if isinstance(value, (tuple, list)) else value
        shown = str(value).lower() if isinstance(value, bool) else shown
        raise InputError(f"{flag} {shown}: must be {wanted}")
