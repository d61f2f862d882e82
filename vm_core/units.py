"""Bytes and seconds as people read them."""

_UNITS = ("bytes", "KB", "MB", "GB", "TB", "PB")


def size(count: float) -> str:
    """Bytes with three digits or so and a decimal unit."""
    for unit in _UNITS:
        if count < 1000 or unit == _UNITS[-1]:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days."""
    for limit, unit_seconds, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit_seconds:,.3g} {unit}"
    return f"{seconds / 86400:,.1f} days"
