"""Command lines that tests make of a common one."""

from collections.abc import Iterable


def last_of_each(words: Iterable[str]) -> list[str]:
    """A command's words, each option with the last of its values: the command takes one alone."""
    return list({word.partition("=")[0]: word for word in words}.values())
