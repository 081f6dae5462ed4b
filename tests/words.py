"""Command lines that tests make of a common one."""

from collections.abc import Iterable

# Options of which a command takes several.
_MANY = (
    "--adapter",
    "--embedding",
    "--prompt",
    "--reuse",
    "--motion-lora",
    "--image",
    "--mask",
    "--image-adapter",
    "--image-prompt",
    "--image-prompt-mask",
    "--controlnet",
    "--condition",
)


def last_of_each(words: Iterable[str]) -> list[str]:
    """A command's words, each option with the last of its values: the command takes one alone."""
    last: dict[object, str] = {}
    for number, word in enumerate(words):
        name = word.partition("=")[0]
        last[number if name in _MANY or not name.startswith("--") else name] = word
    return list(last.values())
