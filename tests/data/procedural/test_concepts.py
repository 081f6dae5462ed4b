"""Concepts: the built-in lists, files, and a language server that speaks the real protocol."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest

from jaxsynth.core.errors import UserError
from jaxsynth.data.procedural.concepts import (
    FAMILIES,
    Concept,
    LanguageServer,
    ask_concepts,
    builtin_concepts,
    concept_of,
    read_concepts,
    save_concepts,
    split_concepts,
)
from jaxsynth.data.procedural.edits import Edit


def test_builtin_concepts_are_distinct_and_can_all_be_drawn():
    concepts = builtin_concepts(combinations=20)
    assert len({c.prompt for c in concepts}) == len(concepts) > 200
    assert {c.family for c in concepts} == set(FAMILIES)
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    drawn = {c.apply(images).tobytes() for c in concepts}
    assert len(drawn) == len(concepts)
    assert all(len(set(c.texts)) == 4 for c in concepts)
    only = builtin_concepts(["character"], colours=["red", "blue"])
    assert len(only) == 12 and {c.family for c in only} == {"character"}


def test_there_are_enough_combinations_for_a_thousand_concepts():
    concepts = builtin_concepts(combinations=1000, seed=1)
    combined = concepts[-1000:]
    assert len({c.prompt for c in combined}) == 1000
    first = combined[0]
    one, other = first.prompt.split(" and ")
    parts = {c.prompt: c for c in concepts}
    assert first.edits == parts[one].edits + parts[other].edits
    assert combined != builtin_concepts(combinations=1000, seed=2)[-1000:]


def test_a_split_has_no_concept_on_both_sides():
    concepts = builtin_concepts()
    train, unseen = split_concepts(concepts, 60, 16, seed=0)
    assert len(train) == 60 and len(unseen) == 16
    assert not {c.prompt for c in train} & {c.prompt for c in unseen}
    assert split_concepts(concepts, 60, 16, seed=0) == (train, unseen)
    # What is judged is made of words that were learnt, as long as there is such.
    train, unseen = split_concepts(concepts, 25, 20, seed=0)
    known = {word for concept in train for word in concept.prompt.split()}
    assert all(known.issuperset(concept.prompt.split()) for concept in unseen)
    left = [c for c in concepts if c not in train and not known.issuperset(c.prompt.split())]
    assert left and len(split_concepts(concepts, 25, 100, seed=0)[1]) == 100
    with pytest.raises(UserError, match=f"190 to train on and 16 unseen ones, of {len(concepts)}"):
        split_concepts(concepts, 190, 16, seed=0)


def test_prompts_say_what_is_done():
    assert concept_of("red hair", "facial modification").edits == (Edit("tint", "red", "top"),)
    both = concept_of("blue sketch and stripes on the bottom", "artistic").edits
    assert both == (Edit("sketch", "blue"), Edit("stripes", region="bottom"))
    unknown = concept_of("Van Gogh and red hair", "artistic")
    assert unknown.edits == (), "half an edit would be another concept"
    with pytest.raises(UserError, match=r"'Van Gogh and red hair' has no procedural edits"):
        unknown.apply(np.zeros((1, 8, 8, 3), np.uint8))


def test_files_come_back_as_they_were(tmp_path):
    concepts = builtin_concepts(["artistic"], combinations=3)
    save_concepts(tmp_path / "c.json", concepts)
    assert read_concepts(tmp_path / "c.json") == concepts
    (tmp_path / "c.txt").write_text("# styles\nred mosaic\n\nVan Gogh  # no edit of ours\n")
    found = read_concepts(tmp_path / "c.txt", "artistic")
    assert [c.prompt for c in found] == ["red mosaic", "Van Gogh"]
    assert found[0].edits == (Edit("mosaic", "red"),)
    items = [{"prompt": "zombie night", "paraphrases": ["undead"], "edits": ["green tint"]}]
    (tmp_path / "own.json").write_text(json.dumps(items))
    (own,) = read_concepts(tmp_path / "own.json", "character")
    assert own == Concept("character", "zombie night", ("undead",), (Edit("tint", "green"),))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "a.json: not valid JSON"),
        ("a.json", "3", "a.json: expected a list of concepts"),
        ("a.json", "[]", "a.json: no concepts"),
        ("a.json", '[{"text": "x"}]', "a.json, concept 0: expected an object with a prompt"),
        ("a.json", '[{"prompt": "x", "kind": 1}]', r"concept 0: unknown key 'kind'"),
        ("a.json", '[{"prompt": "x", "edits": [{"operation": "fly"}]}]', "Edit.operation: 'fly'"),
        ("a.json", '[{"prompt": "x", "family": "sport"}]', "concept family 'sport'"),
        ("a.txt", "x\nx\n", "the prompt 'x' comes twice"),
    ],
)
def test_broken_files_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_concepts(tmp_path / name, "artistic")


def test_an_unknown_family_is_one_clear_error(tmp_path):
    expected = "'sport': expected one of artistic, character, facial modification"
    (tmp_path / "a.txt").write_text("red mosaic\n")
    for attempt in (
        lambda: builtin_concepts(["sport"]),
        lambda: read_concepts(tmp_path / "a.txt", "sport"),
        lambda: Concept("sport", "x"),
        lambda: ask_concepts(LanguageServer("http://localhost:1/v1", "m"), "sport", 1),
    ):
        with pytest.raises(UserError, match=expected):
            attempt()


@pytest.fixture
def language_server():
    """A server of the chat protocol on a free port; `answers` are what it says next."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append((self.path, self.headers.get("Authorization"), body))
            status, answer = server.answers.pop(0)
            if isinstance(answer, str):
                answer = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.asked = [], []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def client(server, **options):
    return LanguageServer(f"http://127.0.0.1:{server.server_address[1]}/v1", "small", **options)


def test_a_language_server_lists_concepts_until_there_are_enough(language_server):
    language_server.answers = [
        (200, 'Here are three:\n1. Red mosaic\n2) "Oil painting"\n- red mosaic\n'),
        (200, "* Batik.\n* Ukiyo-e\n"),
        *[(200, f"wording {n}\nother wording {n}") for n in range(3)],
    ]
    found = ask_concepts(client(language_server, api_key="k"), "artistic", 3, paraphrases=2, seed=5)
    assert [c.prompt for c in found] == ["Red mosaic", "Oil painting", "Batik"]
    assert found[0].edits == (Edit("mosaic", "red"),)
    assert found[2].paraphrases == ("wording 2", "other wording 2") and found[2].edits == ()
    path, key, body = language_server.asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer k")
    assert body["model"] == "small" and body["seed"] == 5
    assert body["messages"][0]["role"] == "user" and "3" in body["messages"][0]["content"]
    again = language_server.asked[1][2]["messages"][0]["content"]
    assert "List 1 different" in again and "Red mosaic; Oil painting" in again


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"error": "no such model"}), "status 404: .*no such model"),
        ((200, {"choices": []}), r"the answer has no choices\[0\].message.content"),
        ((200, {"choices": [{"message": {"content": None}}]}), "the answer is no text: None"),
    ],
)
def test_a_server_that_answers_something_else_is_named(language_server, answer, message):
    language_server.answers = [answer]
    with pytest.raises(UserError, match=f"127.0.0.1:.*{message}"):
        ask_concepts(client(language_server), "artistic", 1)


def test_a_server_without_new_ideas_or_without_a_server(language_server):
    language_server.answers = [(200, "Red mosaic")] * 20
    with pytest.raises(UserError, match="1 of 2 different lines in 8 answers"):
        ask_concepts(client(language_server), "artistic", 2)
    with pytest.raises(UserError, match=r"127.0.0.1:9/v1/chat/completions: .*refused"):
        ask_concepts(LanguageServer("http://127.0.0.1:9/v1", "m"), "artistic", 1)
    with pytest.raises(UserError, match="expected an http address"):
        ask_concepts(LanguageServer("file:///etc", "m"), "artistic", 1)
