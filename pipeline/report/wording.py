"""Numbers and text as the page shows them."""

import html

MISSING = "–"
_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"}
_CONTROL[127] = "␡"


def escape(text: object) -> str:
    """HTML-escaped text; control characters, which HTML forbids, become their visible pictures."""
    return html.escape(str(text).translate(_CONTROL), quote=True)


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with a fixed count of decimals and thousands separators, or a dash."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def percent(share: float | None, digits: int = 0) -> str:
    """A share in [0, 1] as per cent; 100 % is kept for the whole, 0 % for nothing."""
    if share is None:
        return MISSING
    rounded = round(100 * share, digits)
    if (rounded >= 100) != (share >= 1) or (rounded <= 0) != (share <= 0):
        return percent(share, digits + 1) if digits < 4 else f"{100 * share:.4g} %"
    return f"{rounded:.{digits}f} %"


def compact(value: float | None) -> str:
    """A count in three figures: 950, 1.3M, 1.54B."""
    if value is None:
        return MISSING
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,600 would print as 1,000k
        if abs(value) >= size * (0.9995 if size > 1e3 else 1):
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def tick_text(value: float, step: float) -> str:
    """An axis label with as many decimals as the distance between ticks needs."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    if step < 0.001:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    decimals = 0
    while decimals < 8 and abs(round(step, decimals) - step) > step * 1e-6:
        decimals += 1
    return f"{value:,.{decimals}f}"
