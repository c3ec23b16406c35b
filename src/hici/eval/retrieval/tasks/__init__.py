"""One small file a task; a module of this package with a `TASK` is measured by its name."""

from __future__ import annotations

from hici.eval.retrieval.base import RetrievalTask
from hici.registry import entries, suggest


def retrieval_tasks() -> dict[str, RetrievalTask]:
    """All tasks by name."""
    return {task.name: task for task in entries(__name__, "TASK")}


def get_task(name: str) -> RetrievalTask:
    """The task of that name. Raises ValueError with the nearest name when there is none."""
    known = retrieval_tasks()
    if name not in known:
        raise ValueError(suggest(name, known, "retrieval task"))
    return known[name]
