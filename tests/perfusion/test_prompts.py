"""perfusion.prompts: what a prompt says about concepts, and what is refused."""

import pytest

from perfusion.prompts import Mention, Prompt, PromptError, check_settings, near_tags, parse_prompt

LOADED = {"teddy": "teddy", "my-pot": "teapot", "c3_po": "robot"}


def parse(text, **options):
    return parse_prompt(text, LOADED, **options)


@pytest.mark.parametrize("text", ["", "a teddy", "1 < 2 > 0", "i <3 you", "<|endoftext|>", "a < teddy >", "<>", "<-x>"])
def test_a_prompt_without_concepts_is_left_as_it_is(text):
    assert parse(text) == Prompt(text)


def test_a_concept_becomes_its_superclass():
    assert parse("a <my-pot> here") == Prompt("a teapot here", (Mention("my-pot", "a "),))


def test_several_concepts_keep_their_order_and_what_stands_before_them():
    prompt = parse("<teddy>, a <my-pot> and a <teddy>")
    assert prompt.text == "teddy, a teapot and a teddy"
    assert [(m.name, m.prefix) for m in prompt.mentions] == [("teddy", ""), ("my-pot", "teddy, a "), ("teddy", "teddy, a teapot and a ")]


def test_names_may_be_written_in_capitals():
    assert parse("<Teddy> and <C3_PO>").mentions == (Mention("teddy", ""), Mention("c3_po", "teddy and "))


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("a<teddy>bear", "a teddy bear"),
        ("<teddy><my-pot>", "teddy teapot"),
        ("3<teddy>4", "3 teddy 4"),
        ("<teddy>'s hat", "teddy's hat"),
        ("(<teddy>), ok", "(teddy), ok"),
        ("é<teddy>é", "é teddy é"),
    ],
)
def test_the_superclass_is_a_word_of_its_own(text, plain):
    assert parse(text).text == plain


@pytest.mark.parametrize(
    ("tag", "settings"),
    [
        ("<teddy:0.8>", {"strength": 0.8}),
        ("<teddy:0>", {"strength": 0.0}),
        ("<perfusion:teddy>", {}),
        ("<perfusion:Teddy:1.5>", {"strength": 1.5}),
        ("<teddy|bias=0.5>", {"bias": 0.5}),
        ("<teddy| bias = -.5 , temperature=0.1 >", {"bias": -0.5, "temperature": 0.1}),
        ("<teddy:0.8|bias=0.5,>", {"strength": 0.8, "bias": 0.5}),
        ("<teddy|strength=2>", {"strength": 2.0}),
        ("<teddy|>", {}),
    ],
)
def test_settings(tag, settings):
    assert parse(f"a {tag}").mentions == (Mention("teddy", "a ", **settings),)


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        ("<teddy:>", "strength to '', which is not a number"),
        ("<teddy:much>", "strength to 'much', which is not a number"),
        ("<teddy|bias>", "bias to '', which is not a number"),
        ("<teddy|bais=1>", "sets 'bais'; it may set each of strength, bias, temperature once"),
        ("<teddy|bias=1,bias=1>", "sets 'bias'; it may set each"),
        ("<teddy:1|strength=1>", "sets 'strength'; it may set each"),
        ("<teddy:4.1>", "strength must be a number between 0 and 4, got 4.1"),
        ("<teddy:-1>", "strength must be a number between 0 and 4, got -1"),
        ("<teddy|bias=nan>", "bias must be a number between -2 and 2, got nan"),
        ("<teddy|temperature=0>", "temperature must be a number between 0.001 and 10, got 0"),
        ("<teddy|temperature=inf>", "temperature must be a number"),
    ],
)
def test_wrong_settings_are_refused(tag, message):
    with pytest.raises(PromptError) as error:
        parse(f"a {tag}")
    assert message in str(error.value) and tag in str(error.value)


def test_an_unknown_concept_is_refused_with_the_loaded_ones():
    with pytest.raises(PromptError, match=r"no concept <bear> is loaded; loaded are: <c3_po>, <my-pot>, <teddy>\."):
        parse("a <teddy> and a <bear>")
    with pytest.raises(PromptError, match=r"loaded are: none\."):
        parse_prompt("a <bear>", {})


def test_words_of_the_tokenizer_are_left_alone():
    prompt = parse("<SKS> by <teddy> of <sks>", tokens={"<sks>"})
    assert prompt == Prompt("<SKS> by teddy of <sks>", (Mention("teddy", "<SKS> by "),))


def test_a_name_that_means_two_things_is_refused():
    with pytest.raises(PromptError, match="both a loaded concept and a word of the tokenizer"):
        parse("a <teddy>", tokens={"<teddy>"})
    assert parse("a <perfusion:teddy>", tokens={"<teddy>"}).mentions == (Mention("teddy", "a "),)


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("a <teddy", ["<teddy"]),
        ("a < teddy > and < Teddy", ["< teddy >", "< Teddy"]),
        ("a <teddy bear> at night", ["<teddy bear>"]),
        ("a <teddy> by <b c>, <perfusion:d", ["<b c>", "<perfusion:d"]),
        ("i <3 you, 1 < x > 0, a -> b, <-x>, <|endoftext|>, <teddy:0.5>, <>", []),
    ],
)
def test_what_looks_like_a_concept_and_is_none(text, near):
    assert near_tags(text, LOADED) == near


def test_check_settings():
    check_settings("x", strength=4, bias=-2, temperature=0.001)
    check_settings("x")
    with pytest.raises(PromptError, match="^here: bias must be a number between -2 and 2, got '1'"):
        check_settings("here", bias="1")
