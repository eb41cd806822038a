import json
import random
import time

import pytest

from glm4lite.text.call_arguments import parse_arguments
from glm4lite.text.output_parser import (
    Call,
    CallBegun,
    CallCut,
    CallPiece,
    OutputParser,
    Segment,
    Text,
    Thinking,
)

NAMES = {"add", "add_all", "get_weather"}
SEPARATOR = "\0"  # stands for the token <|assistant|> between parts

# (output, thinking, segments with neighbours of one kind joined)
CASES: list[tuple[str, bool, list[Segment]]] = [
    ("\nHello", False, [Text("Hello")]),
    ("Hello", False, [Text("Hello")]),
    ("\n\nHello\n", False, [Text("\nHello\n")]),
    ("", False, []),
    ("\n", False, []),
    ('add\n{"a": 1}', False, [Call("add", '{"a": 1}')]),
    ('add \n{"a": 1}\n', False, [Call("add", '{"a": 1}')]),
    ("\nadd\r\n {}", False, [Call("add", "{}")]),
    ('get_weather\n{"city": "北京"}', False, [Call("get_weather", '{"city": "北京"}')]),
    ('add\n{\n  "a": {"b": [1, "}\\""]}\n}', False, [Call("add", '{\n  "a": {"b": [1, "}\\""]}\n}')]),
    ("add\n{'a': None, 'b': 'it\\'s'}", False, [Call("add", '{"a": null, "b": "it\'s"}')]),
    (
        f'add\n{{"a": 1}}{SEPARATOR}add_all\n{{}}{SEPARATOR}\nSo.',
        False,
        [Call("add", '{"a": 1}'), Call("add_all", "{}"), Text("So.")],
    ),
    (f'I add.{SEPARATOR}add\n{{"a": 1}}', False, [Text("I add."), Call("add", '{"a": 1}')]),
    # Text and calls in one part.
    ('Let me see.\nadd\n{"a": 1}', False, [Text("Let me see."), Call("add", '{"a": 1}')]),
    ("我来查一下。\n\nadd\n{}", False, [Text("我来查一下。"), Call("add", "{}")]),
    ("\n\nadd\n{}", False, [Call("add", "{}")]),
    ("hm</think>\nSo.\nadd\n{}", True, [Thinking("hm"), Text("So."), Call("add", "{}")]),
    ("add\n{}\n\nI wait.\n", False, [Call("add", "{}"), Text("I wait.\n")]),
    ("add\n{}\nadd_all\n{}\n", False, [Call("add", "{}"), Call("add_all", "{}")]),
    ("add\n{}add_all\n{}", False, [Call("add", "{}"), Call("add_all", "{}")]),  # as GLM's own parser takes it
    ("  add\t\n\n{}", False, [Call("add", "{}")]),
    ("add\nadd\n{}", False, [Text("add"), Call("add", "{}")]),
    ("add\n{code}\nadd\n{}", False, [Text("add\n{code}"), Call("add", "{}")]),
    ("{\nadd\n{}", False, [Text("{"), Call("add", "{}")]),
    ('One: \n{"name": "add", "arguments": {}}\nTwo', False, [Text("One: "), Call("add", "{}"), Text("Two")]),
    ("{'name': 'add', 'arguments': {'a': None}}", False, [Call("add", '{"a": null}')]),
    ('{\n "name": "add",\n "arguments": {}\n}', False, [Call("add", "{}")]),
    # Arguments that are written anew.
    ('add\n{"a": "x\n\ty"}', False, [Call("add", '{"a": "x\\n\\ty"}')]),
    ("add\n{'a': 'x\n\ty', 'b': True,}", False, [Call("add", '{"a": "x\\n\\ty", "b": true}')]),
    ("add\n{'a': 'C:\\dir'}", False, [Call("add", '{"a": "C:\\\\dir"}')]),
    ('add\n{"a": 1, "a": 2}', False, [Call("add", '{"a": 2}')]),
    ('add\n{"a": "\x01\x1b"}', False, [Call("add", '{"a": "\\u0001\\u001b"}')]),
    # A code block shows a call, it makes none.
    ("```\nadd\n{}\n```", False, [Text("```\nadd\n{}\n```")]),
    (
        "~~~json\n```\nadd\n{}\n~~~\nadd\n{}",
        False,
        [Text("~~~json\n```\nadd\n{}\n~~~"), Call("add", "{}")],
    ),
    ("```inline``` code\nadd\n{}", False, [Text("```inline``` code"), Call("add", "{}")]),
    ("    add\n    {}", False, [Text("    add\n    {}")]),
    # Not calls: shown in full.
    ("`add`\n{}", False, [Text("`add`\n{}")]),
    ("Use add\n{}", False, [Text("Use add\n{}")]),
    ("add:\n{}", False, [Text("add:\n{}")]),
    ("Use this:\nmain\n{ return 0; }", False, [Text("Use this:\nmain\n{ return 0; }")]),
    ("<think>\nadd\n{}\n</think>", False, [Thinking("add\n{}\n")]),
    ('{"name": "add", "name": [1], "arguments": {}}', False, [Text('{"name": "add", "name": [1], "arguments": {}}')]),
    ('{"name": "add", "name": {}, "arguments": {}}', False, [Text('{"name": "add", "name": {}, "arguments": {}}')]),
    (
        '{"name": "add", "name": "add_all", "arguments": {}}',
        False,
        [Text('{"name": "add", "name": "add_all", "arguments": {}}')],
    ),
    ('{"name": "add", "arguments": [1]}', False, [Text('{"name": "add", "arguments": [1]}')]),
    ('[{"name": "add", "arguments": {}}]', False, [Text('[{"name": "add", "arguments": {}}]')]),
    ('add\n{"a": "\\ud800"}', False, [Text('add\n{"a": "\\ud800"}')]),
    ('add\n{"a": 1e999}', False, [Text('add\n{"a": 1e999}')]),
    ('other\n{"a": 1}', False, [Text('other\n{"a": 1}')]),
    ("add\n{code}", False, [Text("add\n{code}")]),
    ('add\n{"a": 1', False, [Text('add\n{"a": 1')]),
    ('add\n{"a": 1} and more', False, [Text('add\n{"a": 1} and more')]),
    ("add\n[1]", False, [Text("add\n[1]")]),
    ('add\n{"a": NaN}', False, [Text('add\n{"a": NaN}')]),
    ("add\n{1, 2}", False, [Text("add\n{1, 2}")]),
    ("add\n{1: 2}", False, [Text("add\n{1: 2}")]),
    ("add\n{'a': {1, 2}}", False, [Text("add\n{'a': {1, 2}}")]),
    ("add\n{'a': __import__('os')}", False, [Text("add\n{'a': __import__('os')}")]),
    ("add\n", False, [Text("add\n")]),
    ("add", False, [Text("add")]),
    ("additional words\n{}", False, [Text("additional words\n{}")]),
    ("add\n" + '{"a":' * 100 + "1" + "}" * 100, False, [Text("add\n" + '{"a":' * 100 + "1" + "}" * 100)]),
    # Thinking.
    ("<think>\nhm\n</think>\n\nYes", False, [Thinking("hm\n"), Text("Yes")]),
    ("\n<think>hm</think>Yes", False, [Thinking("hm"), Text("Yes")]),
    ("\nhm </thi nk></think>\n\nYes", True, [Thinking("hm </thi nk>"), Text("Yes")]),
    ("<think>\nhm</think>\nYes", True, [Thinking("hm"), Text("Yes")]),
    ('hm</think>\nadd\n{"a": 1}', True, [Thinking("hm"), Call("add", '{"a": 1}')]),
    ("never closed </th", True, [Thinking("never closed </th")]),
    ("</think>\n\nYes", True, [Text("Yes")]),
    ("The tag <think> opens</think>", False, [Text("The tag <think> opens</think>")]),
    ("<thin", False, [Text("<thin")]),
    ("<b>bold</b>", False, [Text("<b>bold</b>")]),
    # Rumination's form.
    ('hm</think>\n{"name": "add", "arguments": {"a": "北"}}', True, [Thinking("hm"), Call("add", '{"a": "北"}')]),
    ('{"name": "other", "arguments": {}}', False, [Text('{"name": "other", "arguments": {}}')]),
    ('{"name": "add", "age": 3}', False, [Text('{"name": "add", "age": 3}')]),
    ('{"key": "value"}', False, [Text('{"key": "value"}')]),
]


def joined(segments: list[Segment]) -> list[Segment]:
    whole: list[Segment] = []
    for segment in segments:
        last = whole[-1] if whole else None
        if isinstance(segment, Text) and isinstance(last, Text):
            whole[-1] = Text(last.text + segment.text)
        elif isinstance(segment, Thinking) and isinstance(last, Thinking):
            whole[-1] = Thinking(last.text + segment.text)
        else:
            whole.append(segment)
    return whole


def parse(output: str, thinking: bool, chunks: random.Random | None = None) -> list[Segment]:
    parser = OutputParser(NAMES, thinking)
    segments: list[Segment] = []
    for index, part in enumerate(output.split(SEPARATOR)):
        if index:
            segments += parser.separator()
        while part:
            size = chunks.randint(1, 7) if chunks else len(part)
            segments += parser.feed(part[:size])
            part = part[size:]
    return joined(segments + parser.finish())


@pytest.mark.parametrize(("output", "thinking", "expected"), CASES)
def test_an_output_splits_into_its_parts(output: str, thinking: bool, expected: list[Segment]) -> None:
    assert parse(output, thinking) == expected


@pytest.mark.parametrize(("output", "thinking", "expected"), CASES)
def test_the_split_does_not_depend_on_the_chunks(output: str, thinking: bool, expected: list[Segment]) -> None:
    for seed in range(30):
        assert parse(output, thinking, random.Random(seed)) == expected


def said(segment: Segment) -> str:
    match segment:
        case Text(text) | Thinking(text) | CallPiece(text):
            return text
        case Call(name, arguments):
            return name + arguments
        case CallCut(written=written):
            return written
    return ""


def test_random_outputs_lose_nothing_and_do_not_depend_on_the_chunks() -> None:
    pieces = [
        "add",
        "add\n{}",
        "get_weather",
        '{"name": "add", "arguments": {}}',
        "'a'",
        "```",
        "    ",
        " " * 70,
        "\r",
        "\t" * 65,
        "\u2028",
        ",",
        "\n",
        " ",
        "{",
        "}",
        '"a"',
        ":",
        "1",
        "<think>",
        "</think>",
        "<",
        "</",
        "x",
        SEPARATOR,
    ]
    source = random.Random(7)
    for _ in range(3000):
        output = "".join(source.choices(pieces, k=source.randint(1, 14)))
        thinking = source.random() < 0.3
        whole = parse(output, thinking)
        assert parse(output, thinking, source) == whole
        shown = "".join(said(one) for one in whole)
        assert letters(shown) == letters(output), output
        assert all(s.name in NAMES for s in whole if isinstance(s, Call))


def letters(output: str) -> str:
    """What may not be lost: all but white space, tags and the frame of Rumination's form."""
    for frame in ("<think>", "</think>", SEPARATOR, '{"name": "add", "arguments": {}}', "add{}", "'", '"'):
        output = output.replace(frame, "add{}" if frame.startswith("{") else "")
    return "".join(output.split()).replace("add{}", "")


SHAPES = [
    *(
        " ",
        "\n",
        "\r\n",
        "{",
        "}",
        "'",
        '"',
        "add",
        "a",
        "<",
        "</think",
        "add\n",
        "add\n{",
        'add\n{"a": "',
        "{\n",
        "x\n",
    ),
    *("{'name': 'add', 'arguments': {'a': -", '{"name": "add", ', "```\n", "add\n{}", "add\n{}\n", "add\n{'a': 1,}\n"),
    *("add\n{} add ", "add\n{'a': [", "add\n" + '{"a":' * 70, "add\n{'a': " + "-" * 50),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_time_grows_with_the_length_of_the_output_only(shape: str) -> None:
    def seconds(length: int) -> float:
        parser, output = OutputParser(NAMES), (shape * length)[:length]
        started = time.thread_time()
        for place in range(0, length, 8):
            parser.feed(output[place : place + 8])
        parser.finish()
        return time.thread_time() - started

    short, long = (min(seconds(length) for _ in range(2)) for length in (2_500, 30_000))
    assert long < 36 * short  # 12 where it is linear, 144 where it is quadratic


def test_text_is_streamed_as_soon_as_it_cannot_be_a_call() -> None:
    parser = OutputParser(NAMES)
    assert parser.feed("\n") == []
    assert parser.feed("a") == []  # may become "add"
    assert parser.feed("n apple") == [Text("an apple")]
    assert parser.feed(" a day") == [Text(" a day")]
    parser = OutputParser(NAMES)
    assert parser.feed("add\n") == []
    assert parser.feed("{") == []
    assert parser.feed(" return") == [Text("add\n{ return")]
    parser = OutputParser(NAMES)
    assert parser.feed('add\n{"a": 1}') == []
    assert parser.feed("\nThat") == [Call("add", '{"a": 1}'), Text("That")]
    parser = OutputParser(NAMES)
    assert parser.feed("First.\nNow ") == [Text("First.\nNow ")]
    assert parser.feed("see.\nad") == [Text("see.")]  # the line may become a name, and its end belong to a call
    assert parser.feed("opt") == [Text("\nadopt")]


def test_json_answers_are_streamed_unless_they_name_a_tool() -> None:
    parser = OutputParser(NAMES)
    assert parser.feed('{"na') == []
    assert parser.feed('me": "Ann"') == [Text('{"name": "Ann"')]


def test_a_thought_is_streamed_up_to_what_may_be_its_end() -> None:
    parser = OutputParser(NAMES, thinking=True)
    assert parser.feed("\nI see </") == [Thinking("I see ")]
    assert parser.feed("b> </think") == [Thinking("</b> ")]
    assert parser.feed(">\n") == []
    assert parser.feed("\nYes") == [Text("Yes")]


def test_an_endless_call_becomes_text() -> None:
    parser = OutputParser(NAMES)
    segments = parser.feed('add\n{"a": "')
    for _ in range(110):
        segments += parser.feed("x" * 1000)
    assert len("".join(s.text for s in segments if isinstance(s, Text))) > 100_000


def test_without_declared_tools_there_are_no_calls() -> None:
    parser = OutputParser(())
    assert parser.feed("add\n{") == [Text("add\n{")]


def test_arguments_are_kept_as_the_model_wrote_them() -> None:
    assert parse_arguments(' {"a" : 1e3}\n') == '{"a" : 1e3}'
    assert json.loads(parse_arguments("{'a': True, 'b': (1, 2)}") or "") == {"a": True, "b": [1, 2]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "1",
        "null",
        "{'a': b''}",
        "{" * 5000,
        "{'a':" + "1" * 5000 + "}",
        "{'a': 1e999}",
        "-" * 9000,
        '{"a": "\\ud800"}',
    ],
)
def test_what_is_not_one_object_has_no_arguments(text: str) -> None:
    assert parse_arguments(text) is None


def told(*pieces: str) -> list[Segment]:
    """What a parser tells that knows of a grammar, the last segments behind the end."""
    parser = OutputParser(NAMES, certain=True)
    return [*(segment for piece in pieces for segment in parser.feed(piece)), *parser.finish()]


def test_a_call_is_told_of_once_its_first_brace_is_there() -> None:
    parser = OutputParser(NAMES, certain=True)
    assert parser.feed("\nI add.\nadd \n") == [Text("I add.")]
    assert parser.feed(' {"a"') == [CallBegun("add"), CallPiece('{"a"')]
    assert parser.feed(": [1, ") == [CallPiece(": [1, ")]
    assert parser.feed("2]}") == [CallPiece("2]}")]
    assert parser.separator() == [Call("add", '{"a": [1, 2]}')]
    assert parser.feed("add_all\n{}\n") == [CallBegun("add_all"), CallPiece("{}"), Call("add_all", "{}")]
    assert parser.finish() == []


def test_a_call_that_ends_early_is_given_back_with_all_that_was_written() -> None:
    assert told('Well.\nadd\n{"a": ') == [
        Text("Well."),
        CallBegun("add"),
        CallPiece('{"a": '),
        CallCut("add", '{"a": ', '\nadd\n{"a": '),
    ]
    assert told("add\n") == [Text("add\n")]


@pytest.mark.parametrize("output", ["```\nadd\n{}\n```\nadd\n{}", "~~~\nx\n~~~\nadd\n{}", "So\nadd\nis one.\nadd\n{}"])
def test_where_a_grammar_lets_anything_come_a_call_is_told_of_as_a_whole(output: str) -> None:
    segments = told(output)
    assert segments[-1] == Call("add", "{}")
    assert not any(isinstance(segment, CallBegun | CallPiece) for segment in segments)


def test_calls_that_are_told_of_while_they_come_are_the_calls_that_come() -> None:
    chance = random.Random(5)
    pieces = ["add\n", "add_all \n", '{"a": 1}', "{}", "{", "\n", "I say. ", "```\n", '{"x": [1', "}", SEPARATOR]
    for _ in range(3000):
        output = "".join(chance.choices(pieces, k=chance.randint(1, 9)))
        plain, certain = OutputParser(NAMES), OutputParser(NAMES, certain=True)
        expected, segments = list[Segment](), list[Segment]()
        for part in output.split(SEPARATOR):
            cuts = sorted(chance.choices(range(len(part) + 1), k=3))
            for begin, end in zip([0, *cuts], [*cuts, len(part)], strict=True):
                expected += plain.feed(part[begin:end])
                segments += certain.feed(part[begin:end])
            expected += plain.separator()
            segments += certain.separator()
        calls = [one for one in segments if isinstance(one, Call)]
        assert calls == [one for one in expected if isinstance(one, Call)][: len(calls)]
        written: str | None = None
        for segment in segments:  # each call that was told of ends, with what was told of it
            if isinstance(segment, CallBegun):
                assert written is None
                written = ""
            elif isinstance(segment, CallPiece):
                assert written is not None
                written += segment.text
            elif isinstance(segment, Call | CallCut):
                assert written in (None, segment.arguments), output
                written = None
        assert written is None
