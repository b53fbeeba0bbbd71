"""How scores are shown to people, as text."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def score_text(score: float, percent: bool) -> str:
    return f"{score:.1%}" if percent else f"{score:.4g}"


Row = tuple[str, dict[str, float]]  # its name, and its scores by column


def scores_by_reward(name: str, row: Mapping[str, Any], rewards: Sequence[str]) -> list[Row]:
    """A prompt file's mean score by each reward, and below it those of its categories if it has some.

    `row` is what `Evaluator.accuracy` returned, which lays out one reward by category, and several by name.
    """
    accuracy = row["accuracy"]
    if len(rewards) == 1:
        whole = {rewards[0]: accuracy["overall"]}
        categories = {tag: {rewards[0]: score} for tag, score in accuracy.items() if tag != "overall"}
    else:
        whole, categories = {reward: accuracy[reward] for reward in rewards}, row["categories"]
    return [(name, whole), *((f"  {tag}", scores) for tag, scores in categories.items() if len(categories) > 1)]


def score_table(rows: Sequence[Row], percent: Collection[str] = ()) -> str:
    """The rows as lines of text below a line of column names. percent: the columns whose rewards say that."""
    columns = list(rows[0][1])
    cells = [["", *columns]]
    cells += [[name, *(score_text(scores[column], column in percent) for column in columns)] for name, scores in rows]
    first, *widths = (max(len(line[i]) for line in cells) for i in range(len(columns) + 1))
    lines = []
    for name, *texts in cells:
        lines.append("  ".join([name.ljust(first), *(text.rjust(width) for text, width in zip(texts, widths, strict=True))]))
    return "\n".join(lines)
