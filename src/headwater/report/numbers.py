"""Numbers, durations and rewards as a reader wants to see them."""

from __future__ import annotations

import math

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def as_float(value: object) -> float:
    """A number out of JSON, where "nan" and "inf" are strings; NaN for anything that is no number."""
    try:
        return float(value) if isinstance(value, (int, float, str)) else math.nan
    except ValueError:
        return math.nan


def number(value: float) -> str:
    """Up to four significant digits, thousands apart, powers of ten written out: 12,500; 0.03; 4.1 × 10⁻⁷."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == round(value) and abs(value) < 1e12:
        return f"{round(value):,}".replace("-", "−")
    if 1e-3 <= abs(value) < 1e6:
        decimals = max(0, 3 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{decimals}f}".replace("-", "−")
        return text.rstrip("0").rstrip(".") if decimals else text
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return _scientific(mantissa, int(exponent))


def reward(log_reward: float) -> str:
    """The reward of a log-reward, also where it would overflow or vanish as a float."""
    if not math.isfinite(log_reward) or abs(log_reward) < 50:
        return number(math.exp(log_reward))
    exponent = math.floor(log_reward / math.log(10))
    mantissa = f"{math.exp(log_reward - exponent * math.log(10)):.2f}"
    return _scientific("1.00", exponent + 1) if mantissa == "10.00" else _scientific(mantissa, exponent)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: the two largest that there are."""
    if not math.isfinite(seconds):
        return "not a number"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _scientific(mantissa: str, exponent: int) -> str:
    return f"{mantissa} × 10{str(exponent).translate(_SUPERSCRIPT)}".replace("-", "−")
