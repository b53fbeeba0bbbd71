"""How far two texts lie apart."""


def levenshtein(a: str, b: str) -> int:
    """How many letters to insert, delete or replace until a is b: a row of the table a letter of a."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (letter != other))
    return row[-1]
