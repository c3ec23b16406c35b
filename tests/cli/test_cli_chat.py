"""`hici chat`: turns, commands, documents, interrupts."""

import copy
import io
import re

import pytest

import hici
from hici.models.conversation import Conversation
from hici.models.generate import encode_messages, generate
from hici.models.session import Session

QUESTIONS = ["the cat sees the river", "a dog runs", "and then the old house"]


@pytest.fixture
def chat(adapter_directory, monkeypatch, hici_command):
    def run(lines, *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        return hici_command("chat", adapter_directory, "--max-new-tokens", 6, *arguments)

    return run


def expected_answers(model, tokenizer, questions):
    """Every turn read anew, from its beginning."""
    messages, answers = [], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = encode_messages(tokenizer, messages)
        answers.append(generate(Session(model), tokenizer, ids, max_new_tokens=6).text)
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.mark.parametrize("flags", [["full"], ["hici"], ["hici", "--decode", "raw"]], ids=" ".join)
def test_turns_equal_reading_everything_again(chat, adapter_directory, tokenizer, flags):
    model = hici.from_pretrained(adapter_directory, attention=flags[0])
    if "raw" in flags:
        hici.reconfigure(model, decode="raw")
    done = chat(QUESTIONS, "--attention", *flags)
    assert done.status == 0, done.err
    assert done.out == "".join(f"{answer}\n" for answer in expected_answers(model, tokenizer, QUESTIONS))
    read = [(int(a), int(b)) for a, b in re.findall(r"(\d+) of (\d+) prompt tokens read", done.err)]
    assert len(read) == 3
    kept = [b - a for a, b in read]
    assert kept == [0, 0, 0] if "raw" in flags else kept[2] > kept[1] > kept[0] == 0


def test_clear_begins_anew(chat):
    twice = chat([QUESTIONS[0], "/clear", QUESTIONS[0]]).out.splitlines()
    assert len(twice) == 2
    assert twice[0] == twice[1]


def test_exit_blank_lines_and_unknown_commands(chat):
    done = chat(["", "  ", "/nothing at all", "/exit", QUESTIONS[0]])
    assert (done.status, done.out) == (0, "")
    assert "unknown command '/nothing'; known: /clear, /exit" in done.err


def test_a_document_stays(chat, tmp_path):
    document = tmp_path / "document.txt"
    document.write_text("a blue tree sings. " * 2)
    kept = tmp_path / "kept"
    common = ["--attention", "hici", "--document", document, "--document-cache", kept]
    lines = [QUESTIONS[1], "/clear", QUESTIONS[1]]
    done = chat(lines, *common)
    assert done.status == 0, done.err
    first, second = done.out.splitlines()
    assert first == second
    count = int(re.search(r"document of (\d+) tokens read", done.err)[1])
    kept_first, kept_second = (int(b) - int(a) for a, b in re.findall(r"(\d+) of (\d+) prompt", done.err))
    assert kept_first == count
    assert kept_second >= count  # the same question was read before
    assert chat(lines, *common).out == done.out
    assert chat(lines, "--attention", "hici").out != done.out


def test_a_system_message_comes_first(adapter_directory, tokenizer):
    session = Session(hici.from_pretrained(adapter_directory))
    conversation = Conversation(session, tokenizer, document="a tree", system="be short")
    conversation.ask("the cat", max_new_tokens=2)
    text = tokenizer.decode(encode_messages(tokenizer, conversation._with_question("and")))
    assert text.startswith("[system] be short[user] a tree\n\nthe cat[assistant] ")
    assert text.endswith("[user] and[assistant]")
    beginning = tokenizer.decode(conversation.beginning())
    assert "[system] be short[user] a tree\n\nthe cat[assistant] ".startswith(beginning[:40])


def test_too_many_tokens_end_a_pipe(chat):
    done = chat([QUESTIONS[0] * 10, QUESTIONS[0]])
    assert done.status == 2
    assert "tokens are more than the 128 positions" in done.err


@pytest.mark.parametrize("attention", ["full", "hici"])
def test_an_interrupted_answer_is_taken_back(chat, monkeypatch, attention):
    from transformers import TextStreamer

    expected = chat(QUESTIONS[:1], "--attention", attention).out
    monkeypatch.setattr("hici.cli.chat.terminal_input", lambda: True)
    put, calls = TextStreamer.put, []

    def interrupted(self, value):
        calls.append(value)
        if len(calls) == 4:
            raise KeyboardInterrupt
        put(self, value)

    monkeypatch.setattr(TextStreamer, "put", interrupted)
    done = chat([QUESTIONS[1], QUESTIONS[0]], "--attention", attention)
    assert done.status == 0, done.err
    assert "stopped; the question is taken back" in done.err
    assert "> " in done.err  # the terminal's prompt does not go into a redirected output
    assert "> " not in done.out
    assert done.out.endswith(expected)
    (first,) = re.findall(r"(\d+) of (\d+) prompt tokens read", done.err)
    assert first[0] == first[1] or attention == "full"


def test_an_interrupt_ends_a_pipe(chat, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.TextStreamer.put", interrupted)
    done = chat(QUESTIONS)
    assert done.status == 130
    assert done.err.endswith("hici: interrupted\n")


@pytest.mark.parametrize("attention", ["full", "hici"])
def test_an_error_in_an_answer_leaves_the_conversation_as_it_was(adapter_directory, tokenizer, attention):
    model = hici.from_pretrained(adapter_directory, attention=attention)

    class Broken:
        calls = 0

        def put(self, value):
            self.calls += 1
            if self.calls == 4:
                raise OSError("no space left")

        def end(self):
            pass

    conversation = Conversation(Session(model), tokenizer)
    conversation.ask(QUESTIONS[0], max_new_tokens=6)
    with pytest.raises(OSError, match="no space left"):
        conversation.ask(QUESTIONS[1], max_new_tokens=6, streamer=Broken())
    answers = expected_answers(model, tokenizer, QUESTIONS[:2])
    assert conversation.ask(QUESTIONS[1], max_new_tokens=6).text == answers[1]


TEMPLATES = {
    "thinks before an answer": "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think> quietly and slowly</think>{% endif %}",
    "strips answers": "{% for m in messages %}[{{ m['role'] }}]"
    "{{ m['content'] if m['role'] == 'user' else m['content'][:3] }}|{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "counts": "{{ messages | length }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
@pytest.mark.parametrize("attention", ["full", "hici"])
def test_turns_with_templates_that_rewrite_what_was(adapter_directory, tokenizer, template, attention):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    model = hici.from_pretrained(adapter_directory, attention=attention)
    conversation = Conversation(Session(model), changed)
    results = [conversation.ask(question, max_new_tokens=6) for question in QUESTIONS]
    assert [x.text for x in results] == expected_answers(model, changed, QUESTIONS)
    if "think" in template:  # the turns before the last answer are not read again
        assert results[2].prompt_tokens - results[2].read_tokens > results[1].prompt_tokens / 2


def test_white_space_around_a_question_does_not_lose_the_document(adapter_directory, tokenizer):
    conversation = Conversation(Session(hici.from_pretrained(adapter_directory, attention="hici")), tokenizer,
                                document="a blue tree sings. " * 3)  # fmt: skip
    beginning = conversation.beginning()
    conversation.session.read(beginning)
    conversation.session.keep()
    for question in ("the cat", "\n the cat", "\tthe cat ", "a dog"):
        conversation.clear()
        result = conversation.ask(question, max_new_tokens=3)
        assert result.read_tokens <= result.prompt_tokens - len(beginning)


def test_a_template_without_a_system_role(adapter_directory, tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}a"
    )
    session = Session(hici.from_pretrained(adapter_directory))
    with pytest.raises(ValueError, match=r"refuses the messages \(no system role\); put the system message into the"):
        Conversation(session, changed, system="be short")


def test_without_a_template(chat, monkeypatch, tokenizer):
    plain = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    monkeypatch.setattr("hici.cli.common.load_tokenizer", lambda *_: plain)
    done = chat(QUESTIONS)
    assert (done.status, done.out) == (2, "")
    assert "no chat template" in done.err
