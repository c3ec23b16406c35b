"""A conversation in the tokenizer's chat template, with a document that is read once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hici.models.generate import Generation, encode_messages, generate
from hici.models.session import Session, common_length

PROBES = ("a", "The", "1", "¿")  # questions of different beginnings


class Conversation:
    """Questions and answers in one session; what was read stays read.

    The document stands in front of the first question, in the same message: every chat template has user messages.

    Args:
        session: of the model.
        tokenizer: with a chat template.
        document: text that all questions are about.
        system: system message.

    Raises:
        ValueError: no chat template.
    """

    def __init__(
        self, session: Session, tokenizer: Any, *, document: str | None = None, system: str | None = None
    ) -> None:
        self.session = session
        self.tokenizer = tokenizer
        self.document = document
        self.system = system
        self.messages: list[dict[str, str]] = []
        encode_messages(tokenizer, self._with_question("a"))

    def beginning(self) -> list[int]:
        """Token ids that every conversation begins with: system message and document."""
        return common_beginning(encode_messages(self.tokenizer, self._with_question(x)) for x in PROBES)

    def ask(self, question: str, **settings: Any) -> Generation:
        """The model's answer; both are then part of the conversation. `settings` as in `generate`.

        White space around the question is left out: it could change the tokens in front of it.

        Raises:
            ValueError: an empty question; see `generate`. The conversation is then as before.
        """
        question = question.strip()
        if not question:
            raise ValueError("the question is empty; give at least one word")
        messages = self._with_question(question)
        ids = encode_messages(self.tokenizer, messages)
        # up to here the next turn will surely be the same: a template may put more in front of an answer that is to be
        # written than in front of one that was
        settled = common_length(ids[:-1], encode_messages(self.tokenizer, messages, answer=False))
        answer = generate(self.session, self.tokenizer, ids, settled=settled, **settings)
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}]
        return answer

    def clear(self) -> None:
        """Begin anew, behind the document."""
        self.messages = []

    def _with_question(self, question: str) -> list[dict[str, str]]:
        messages = [*self.messages, {"role": "user", "content": question}]
        if self.document is not None:
            messages[0] = {"role": "user", "content": f"{self.document}\n\n{messages[0]['content']}"}
        return messages if self.system is None else [{"role": "system", "content": self.system}, *messages]


def common_beginning(sequences: Iterable[list[int]]) -> list[int]:
    """The longest list that all of them begin with."""
    first, *others = sequences
    return first[: min(common_length(first, other) for other in others)]
