"""The command itself: quick help, errors in one line, verbs found by their files."""

import subprocess
import sys

import pytest

from hici import __version__
from hici.cli.main import build_parser, main, parse

VERBS = [
    ["info"],
    ["train"],
    ["generate"],
    ["chat"],
    ["convert"],
    ["merge"],
    ["verify"],
    ["report"],
    ["inspect"],
    ["score"],
    ["score", "lines"],
    ["score", "longbench"],
    ["score", "topics"],
    ["eval"],
    ["eval", "all"],
    ["eval", "lm"],
    ["eval", "longbench"],
    ["eval", "ppl"],
    ["eval", "retrieval"],
]
_HEAVY = ("torch", "transformers", "peft", "numpy", "matplotlib")


@pytest.mark.parametrize("verb", [[], *VERBS], ids=lambda v: " ".join(v) or "hici")
def test_help_has_examples_and_imports_nothing_heavy(verb):
    code = (
        "import sys\nfrom hici.cli.main import main\n"
        f"try:\n    main({[*verb, '--help']!r})\nexcept SystemExit as e:\n    assert not e.code, e.code\n"
        f"print('HEAVY', [m for m in {_HEAVY!r} if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "examples:" in done.stdout
    assert f"hici {' '.join(verb)}".strip() in done.stdout.partition("examples:")[2]
    assert done.stdout.rstrip().endswith("HEAVY []")


def test_the_list_above_is_complete():
    parser = build_parser()
    top = next(action for action in parser._actions if action.dest == "verb")
    groups = {
        (group, verb)
        for group in ("eval", "score")
        for verb in next(a for a in top.choices[group]._actions if a.dest == f"{group}_verb").choices
    }
    assert {(verb,) for verb in top.choices} | groups == {tuple(verb) for verb in VERBS}


def test_version(hici_command):
    assert hici_command("--version").out == f"hici {__version__}\n"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["evl"], "unknown hici verb 'evl'; known: chat, convert, eval, generate, info, inspect, merge, "
         "report, score, train, verify. Did you mean 'eval'?"),
        (["eval", "pp"], "unknown hici eval verb 'pp'; known: all, lm, longbench, ppl, retrieval. "
         "Did you mean 'ppl'?"),
        ([], "the following arguments are required: VERB"),
        (["info", "--preset", "llama-2-7b", "--contxt", "5"], "unknown flag '--contxt' of `hici info`. Did you mean "
         "'--context'?"),
        (["info", "--preset", "llama-2-7b", "--visibility", "pasd"], "unknown value of --visibility 'pasd'; known: "
         "all, current, past. Did you mean 'past'?"),
        (["info", "--preset", "llama-2-7b", "--context", "0"], "'0' is not an integer >= 1"),
        (["info", "a", "b"], "unexpected argument 'b'"),
        (["generate", "m", "--max-new"], "unknown flag '--max-new' of `hici generate`"),
        (["eval", "ppl", "m", "--context", "5"], "the following arguments are required: --data"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_usage_is_one_line_and_status_2(arguments, message, hici_command):
    done = hici_command(*arguments)
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("hici: error: ")
    assert done.err.count("\n") == 1
    assert message in done.err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="unknown preset"):
        main(["info", "--preset", "nothing", "--debug"])


def test_overrides_reach_only_the_verb_that_takes_them():
    args = parse(["train", "recipe.yaml", "--max_steps", "3", "--hici.visibility", "past"])
    assert args.recipe == "recipe.yaml"
    assert args.overrides == ["--max_steps", "3", "--hici.visibility", "past"]
    with pytest.raises(ValueError, match="unknown flag '--max_steps'"):
        parse(["info", "--max_steps", "3"])


@pytest.mark.parametrize("arguments", [["-v", "info"], ["info", "-v"]])
def test_verbose_before_and_behind_the_verb(arguments):
    assert parse(arguments).verbose
    assert not parse(["info"]).verbose


def test_a_reader_that_leaves_is_no_error():
    code = "import sys, time; time.sleep(0.3); from hici.cli.main import main; sys.exit(main(['--help']))"
    command = f'"{sys.executable}" -c "{code}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_interrupt_is_one_line(monkeypatch, hici_command):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("hici.presets.load_preset", interrupted)
    assert hici_command("info", "--preset", "llama-2-7b") == (130, "", "hici: interrupted\n")
