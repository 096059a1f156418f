"""Numbers, sizes and durations as text."""

import re


def escape(text: object) -> str:
    """Text that stands for itself in Markdown and in HTML, whatever is in it."""
    line = " ".join(str(text).split())
    special = r"[\\`*\[\]|<>]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
    return re.sub(special, lambda match: f"&#{ord(match[0])};", line.replace("&", "&amp;"))


def format_percent(value: float | None, deviation: float | None = None) -> str:
    """A share as per cent, with its deviation where there is one."""
    if value is None:
        return "-"
    return f"{100 * value:.2f}" + ("" if deviation is None else f" ± {100 * deviation:.2f}")


def format_number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def format_hours(hours: float) -> str:
    """A duration in the unit that fits it."""
    if hours < 1 / 3600:
        return f"{format_number(hours * 3.6e6)} ms"
    if hours < 1 / 30:
        return f"{format_number(hours * 3600)} s"
    return f"{format_number(hours * 60)} minutes" if hours < 2 else f"{format_number(hours)} hours"


def format_bytes(num_bytes: float) -> str:
    """Bytes in the unit that fits them, of 1000 each."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{format_number(num_bytes)} {unit}"
        num_bytes /= 1000
    return f"{format_number(num_bytes)} TB"


def format_file_size(num_bytes: int) -> str:
    unit = next(unit for unit in (1e9, 1e6, 1e3) if num_bytes >= unit or unit == 1e3)
    return f"{num_bytes / unit:.1f} {({1e9: 'GB', 1e6: 'MB', 1e3: 'kB'})[unit]}"


def format_metric(name: str, value: float) -> str:
    return f"{value:.0%}" if name == "data_wait" else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """Such as 45 s, 12 min or 7 h 05 min."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_age(seconds: float) -> str:
    """A length of time in words."""
    for name, unit_seconds in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * unit_seconds:
            return f"{seconds / unit_seconds:.0f} {name}"
    return f"{seconds:.0f} s"
