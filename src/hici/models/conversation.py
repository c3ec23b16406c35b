"""A conversation in the tokenizer's chat template, with a document that is read once."""

from __future__ import annotations

from typing import Any

from hici.models.generate import Generation, encode_messages, generate
from hici.models.session import Session, common_length


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
        first, second = (encode_messages(self.tokenizer, self._with_question(x)) for x in ("a", "The"))
        return first[: common_length(first, second)]

    def ask(self, question: str, **settings: Any) -> Generation:
        """The model's answer; both are then part of the conversation. `settings` as in `generate`.

        Raises:
            ValueError: an empty question; see `generate`. The conversation is then as before.
        """
        if not question.strip():
            raise ValueError("the question is empty; give at least one word")
        messages = self._with_question(question)
        answer = generate(self.session, self.tokenizer, encode_messages(self.tokenizer, messages), **settings)
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
