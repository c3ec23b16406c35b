"""Topics, in the manner of LongEval (Li et al. 2023): a conversation about several; the first one is asked."""

from __future__ import annotations

from hici.eval.retrieval.base import Draft, Drawn, Filler, Option, Options, RetrievalTask
from hici.eval.retrieval.draws import Draws
from hici.eval.retrieval.scoring import label_within

_FIELDS = ("the history of", "the future of", "the science of", "the economics of", "the art of", "the language of")
SUBJECTS = (
    "lighthouses", "bread", "bridges", "bicycles", "glaciers", "honeybees", "volcanoes", "umbrellas", "clockmaking",
    "coral reefs", "orchestras", "railways", "tea", "maps", "windmills", "libraries", "chess", "fireworks", "canals",
    "perfume", "kites", "mushrooms", "puppets", "cathedrals", "submarines", "carnivals", "olive oil", "postage stamps",
    "deserts", "street lamps",
)  # fmt: skip
_ASPECTS = (
    "the first people who cared about it", "its place in everyday life", "the money behind it", "its failures",
    "the tools that it needs", "what children learn of it", "the weather", "its rules", "the way it sounds",
    "what newspapers write about it", "its effect on cities", "the disputes among experts", "its most famous example",
    "how it changes in winter", "the people who collect things around it", "what could replace it one day",
)  # fmt: skip
_QUESTIONS = (
    "Could you tell me something about {}?", "I have often wondered about {}. What do you think?",
    "What would you say about {}?", "And what of {}?", "Somebody told me to ask about {}.",
    "Let us go on with {}.",
)  # fmt: skip
_ANSWERS = (
    "There is a lot to say about {}, and most of it was found out slowly and by patient people.",
    "As to {}, opinions differ, but nearly everybody agrees that it matters more than it seems to.",
    "The usual view of {} is too simple; a closer look shows many small causes that work together.",
    "With {} it is best to begin with one example, and to follow it for some years.",
    "Much has been written about {}, though little of it is based on careful counting.",
    "I find {} the most interesting part, and the one that surprises those who think they know everything.",
)  # fmt: skip


def _draft(draws: Draws, depth: float | None, options: Options, filler: Filler) -> Draft:
    topics = [f"{draws.choose(_FIELDS)} {subject}" for subject in draws.sample(SUBJECTS, options["topics"])]

    def turns_of(topic: str) -> Drawn:
        source = draws.stream(topic)

        def turn() -> str:
            aspect = source.choose(_ASPECTS)
            return (
                f"USER: {source.choose(_QUESTIONS).format(aspect)}\nASSISTANT: {source.choose(_ANSWERS).format(aspect)}"
            )

        return Drawn(turn)

    turns = [turns_of(topic) for topic in topics]

    def text(count: int) -> str:
        each, more = divmod(count, len(topics))
        lines = [
            f"Here is a conversation about {len(topics)} topics, one after another. USER opens every topic with the "
            "words 'I would like to discuss the topic of', and its name. Remember the names of the topics in their "
            "order.",
            "",
        ]
        for i, topic in enumerate(topics):
            lines += [
                f"USER: I would like to discuss the topic of {topic}.",
                "ASSISTANT: With pleasure. What would you like to know?",
                *turns[i].first(each + (i < more)),
            ]
        lines += [
            "USER: What is the first topic that we discussed? Give only its name.",
            "ASSISTANT: The first topic is",
        ]
        return "\n".join(lines)

    return Draft(text, (topics[0],), lead_in="The first topic that we discussed was")


TASK = RetrievalTask(
    name="topics",
    about="the first topic of a long conversation",
    draft=_draft,
    score=label_within,
    options={"topics": Option(5, 2, len(SUBJECTS), "topics of a conversation; the prompt's length is shared by them")},
)
