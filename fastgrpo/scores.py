"""How a score is shown to people."""

from collections.abc import Iterable


def are_shares(scores: Iterable[float]) -> bool:
    """Whether scores are shares of 1, to be shown in percent: some rewards have another range."""
    return all(0 <= score <= 1 for score in scores)


def score_text(score: float, shares: bool) -> str:
    return f"{score:.1%}" if shares else f"{score:.4g}"
