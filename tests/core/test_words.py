import pytest

from jaxsynth.core.words import counted


@pytest.mark.parametrize(
    ("count", "noun", "expected"),
    [
        (0, "shot", "0 shots"),
        (1, "shot", "1 shot"),
        (2, "shot", "2 shots"),
        (1, "class", "1 class"),
        (3, "class", "3 classes"),
        (1, "entry", "1 entry"),
        (4, "entry", "4 entries"),
        (5, "key", "5 keys"),
        (2, "negative prompt", "2 negative prompts"),
        (2, "box", "2 boxes"),
        (1000, "branch", "1000 branches"),
    ],
)
def test_a_count_agrees_with_its_noun(count, noun, expected):
    assert counted(count, noun) == expected
