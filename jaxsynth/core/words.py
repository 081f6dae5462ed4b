"""Numbers with their nouns, as messages and pages say them."""


def counted(count: int, noun: str) -> str:
    """`1 image`, `2 images`: a count with its noun, whose singular is given."""
    return f"{count} {noun if count == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """The plural of a noun, or of the last one of several words, by the regular rules."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("y") and noun[-2:-1] not in tuple("aeiou"):
        return f"{noun[:-1]}ies"
    return f"{noun}s"
