"""Figures as the report and a model's card write them."""


def number(count: int | None) -> str:
    """A count, with its thousands told apart; nothing for none."""
    return "" if count is None else f"{count:,}"


def percent(share: float) -> str:
    """A share as percent."""
    return f"{100 * share:.1f}%"


def hundred(share: float) -> str:
    """A share in hundredths, and BLEU as its papers write it."""
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """A difference of shares in hundredths, with its sign; a rounded nought has none."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def p_value(p: float) -> str:
    """A p value to two digits."""
    return f"{p:.2g}" if p >= 1e-300 else "0"


def seconds(taken: float) -> str:
    """Seconds with the digits that matter, and hours beside them where they are many."""
    text = f"{taken:,.0f}" if taken >= 100 else f"{taken:.1f}"
    return f"{text} ({taken / 3600:.1f} h)" if taken >= 3600 else text
