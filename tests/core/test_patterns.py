"""Patterns match what Python's do, and end."""

import itertools
import re
import time

import pytest

from jaxsynth.core.patterns import PatternError, matches_end, matches_whole

NAMES = [
    "".join(letters) for n in range(5) for letters in itertools.product("ab.1", repeat=n)
] + ["down_blocks.0.attentions.1.to_q", "mid_block.to_out.0", "a\nb", "é_1"]  # fmt: skip


@pytest.mark.parametrize(
    "pattern",
    ["", "a", "ab|b", "a*", "a+b?", "(a|b)*1", "(?:a|)b", "(?P<x>a)b", ".*", r".*\.a", r"a\.b",
     "[ab]+", "[^ab]", "[a-b]1", r"[\d.]*", "[]a]", "[^]a]", "[a-]", r"\d", r"\D\w", r"[^\w]",
     "a{2}", "a{1,2}b", "a{2,}", "a{,2}", "a{0}b", "(ab){2}", "a{x", "^a$", "^(a|b$)", "(^|a)b",
     "a$|b", "a^b", "(a*)*b", "(a|ab)(1|b1)", "a*?b", r"\Aa\Z", r"down_blocks\.\d+\..*\.to_[qkv]$",
     r".*(to_q|to_out\.0)", "é_1", r"\n", "((a))", "(a|b){0,3}", "a|", "|", "()", "x{3}|."],
)  # fmt: skip
def test_as_python_matches(pattern):
    for name in NAMES:
        expected = bool(re.fullmatch(pattern, name))
        assert matches_whole(pattern, name) == expected, name
        if "\n" not in name:
            expected = bool(re.match(rf"(.*\.)?({pattern})$", name))
            assert matches_end(pattern, name) == expected, name


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(a", "ends too early"),
        ("a)", "a bracket that was not opened"),
        ("*a", "a repetition of nothing"),
        ("a**", "a repetition of a repetition"),
        ("a++", "a repetition of a repetition"),
        ("a{3,2}", "a repetition of no count"),
        ("[a", "ends too early"),
        ("[b-a]", "a range that ends before"),
        ("a\\", "ends too early"),
        (r"(a)\1", "an escape that is not implemented"),
        (r"\bа", "an escape that is not implemented"),
        ("(?=a)b", "a group that looks around"),
        ("(?!a)b", "a group that looks around"),
        ("(?i)a", "a group that looks around"),
        ("^*", "a repetition of a place"),
        ("(" * 100 + ")" * 100, "more than 50 groups"),
        ("((a{999}){999}){999}b|.", "more than 50000 states"),
        ("(" * 20 + "a" + "{9}){9}" * 10, "not opened|states|ends|repetition"),
    ],
)
def test_other_patterns_are_refused(pattern, message):
    with pytest.raises(PatternError, match=rf"pattern '.*: ({message})") as caught:
        matches_whole(pattern, "a")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "pattern",
    ["^(([a-z0-9_.])+)+$X", "(([a-z0-9_.])+)+X", "(a|a)*X", "(.*)*X", "(a*)*(a*)*(a*)*X",
     "(a?){500}a{500}X", "(.*a){100}X", ".*.*.*.*.*.*X", "(a|b|.)*.{2000}X"],
)  # fmt: skip
def test_no_pattern_takes_for_ever(pattern):
    names = [f"{'a' * n}.{'b.a_' * 20}" for n in range(60)]
    start = time.process_time()
    try:
        assert not any(matches_whole(pattern, name) or matches_end(pattern, name) for name in names)
    except PatternError as error:
        assert re.search("takes too long|states", str(error))
    assert time.process_time() - start < 60


def test_many_literal_patterns_cost_little():
    names = [f"down_blocks.{i}.attentions.{j}.to_q" for i in range(20) for j in range(20)]
    start = time.process_time()
    for pattern in names:
        escaped = f"^{re.escape(pattern)}"
        assert [name for name in names if matches_end(escaped, name)] == [pattern]
    assert time.process_time() - start < 60
