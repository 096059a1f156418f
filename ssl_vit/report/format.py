"""Numbers, sizes and durations as text."""

import re


def plain(text: object) -> str:
    """Text that stands for itself in Markdown and in HTML, whatever is in it."""
    words = " ".join(str(text).split())
    signs = r"[\\`*\[\]|<>]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
    return re.sub(signs, lambda sign: f"&#{ord(sign[0])};", words.replace("&", "&amp;"))


def per_cent(value: float | None, deviation: float | None = None) -> str:
    """A share as per cent, with its deviation where there is one."""
    if value is None:
        return "-"
    return f"{100 * value:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def span(hours: float) -> str:
    """A duration in the unit that fits it."""
    if hours < 1 / 3600:
        return f"{number(hours * 3.6e6)} ms"
    if hours < 1 / 30:
        return f"{number(hours * 3600)} s"
    return f"{number(hours * 60)} minutes" if hours < 2 else f"{number(hours)} hours"


def human(size: float) -> str:
    """Bytes in the unit that fits them, of 1000 each."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{number(size)} {unit}"
        size /= 1000
    return f"{number(size)} TB"


def size(size: int) -> str:
    unit = next(unit for unit in (1e9, 1e6, 1e3) if size >= unit or unit == 1e3)
    return f"{size / unit:.1f} {({1e9: 'GB', 1e6: 'MB', 1e3: 'kB'})[unit]}"


def short(name: str, value: float) -> str:
    return f"{value:.0%}" if name == "data_wait" else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Such as 45 s, 12 min or 7 h 05 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def age(seconds: float) -> str:
    """A length of time in words."""
    for name, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} s"
