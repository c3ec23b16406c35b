"""Lines of a file that something is wrong with, all of them named in as few words as they need."""

from __future__ import annotations

from collections.abc import Iterable


def name_lines(numbers: Iterable[int]) -> str:
    """ "line 3", "lines 3, 7-9": numbers ascending, runs of three or more as first-last."""
    numbers = sorted(set(numbers))
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"line{'s' * (len(numbers) > 1)} {', '.join(shown)}"


def name_problems(found: Iterable[tuple[int, str]]) -> str:
    """ "line 3: lacks pred; lines 5-8: empty" of (line, problem): one entry a problem, by its first line."""
    by_problem: dict[str, list[int]] = {}
    for line, problem in found:
        by_problem.setdefault(problem, []).append(line)
    return "; ".join(f"{name_lines(lines)}: {problem}" for problem, lines in by_problem.items())
