"""Full attention, LongLoRA's shifted sparse attention and HiCI (visibility all, current, past) from one recipe.

    python benchmarks/compare.py --model .cache/SmolLM2-135M-Instruct --books BOOKS --test-book sherlock-holmes

Every method trains on all books but one from the same recipe (compare.yaml, and --key value for each of its keys), with
the same tokens in every step, the same steps and seeds; only the recipe's `method` and hici.visibility differ. The base
is the model with its context cut to --base-context by its config, and its rope is extended to --context. Then all are
measured in full attention on the book left out, over the same windows at several lengths; `hici-past` also in its own
attention, which is causal too. Differences are paired by window and seed, with an interval over windows and one
over windows and seeds; where one holds zero they are called not distinguishable. docs/comparison.md has the protocol
and the commands.

Each run is a process of its own and leaves its result in --scratch: with --resume, a benchmark that was stopped goes on
with the runs that are not finished. A run that fails is reported, and the others go on.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from compare_report import (
    EXTENDED,
    UNTOUCHED,
    check_same_data,
    comparisons,
    costs,
    make_series,
    tables,
    timed,
    write_report,
)
from compare_setup import (
    FULL,
    HICI_PREFIX,
    METHODS,
    Data,
    changed,
    cut_base,
    find_books,
    make_recipe,
    prepare_data,
    shared_values,
    spec_key,
)
from hici.eval.windows import disjoint_windows
from hici.files import check_writable, read_json, write_json
from hici.provenance import provenance

WORKER = Path(__file__).with_name("compare_worker.py")
PATHS = ("model", "data", "output_dir", "token_cache")  # of this machine; not for results
DESCRIPTION = (__doc__ or "").partition("\n\nEach run")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    args, overrides = parser.parse_known_args(given)
    args.overrides, args.command = overrides, " ".join(given)
    try:
        return Comparison(args).run() if args.report is None else report_again(args.report, given)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", type=Path, help="directory of the base")
    add("--books", type=Path, help="folder of text files")
    add("--test-book", help="the one of them that is not trained on")
    add("--context", type=positive, default=8192, help="tokens of a training sequence (default 8192)")
    add("--base-context", type=positive, default=2048, help="positions the base is cut to (default 2048)")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default all")
    add("--seeds", type=int, nargs="+", default=[0, 1], help="default 0 1")
    add("--steps", type=positive, default=100, help="optimizer steps (default 100)")
    add("--equal-time", action="store_true", help="full attention gets only as many steps as fit into the time of the "
        "slowest HiCI method")  # fmt: skip
    add("--eval-lengths", type=positive, nargs="+", help="tokens of a window (default: from --base-context doubling to "
        "--context)")  # fmt: skip
    add("--eval-windows", type=positive, default=64, help="windows a length, at most, evenly spaced (default 64)")
    add("--eval-precision", choices=("float32", "bfloat16"), help="default bfloat16 on a GPU, else float32")
    add("--jobs", type=positive, default=1, help="trainings at a time on the one device; seconds a step are then "
        "measured in short runs, one at a time")  # fmt: skip
    add("--profile-steps", type=int, help="steps of such a short run after 3 to warm up (default 10 with --jobs above "
        "1 or --equal-time, else 0: the trainings are timed)")  # fmt: skip
    add("--scratch", type=Path, default=Path("runs/compare"), help="adapters and unfinished results")
    add("--resume", action="store_true", help="keep the finished runs in --scratch")
    add("--out", type=Path, help="folder for compare-DEVICE-CONTEXT-DATE.json, .md and .png")
    add("--overwrite", action="store_true", help="replace such files")
    add("--report", type=Path, metavar="FILE.json", help="train nothing: make the differences, tables and picture of "
        "such a file anew from its stored losses, and replace them there")  # fmt: skip
    return parser


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def check(args: argparse.Namespace) -> None:
    """What can be refused before anything is read; fills in defaults that depend on other options."""
    if missing := [
        f"--{name.replace('_', '-')}" for name in ("model", "books", "test_book") if not getattr(args, name)
    ]:
        raise ValueError(f"{', '.join(missing)} missing; a comparison needs a base, books and the one to test on")
    for flag, values in (("--methods", args.methods), ("--seeds", args.seeds), ("--eval-lengths", args.eval_lengths)):
        if values and len(set(values)) != len(values):
            raise ValueError(f"{flag} {' '.join(map(str, values))} names one twice; name each once")
    if args.context <= args.base_context:
        raise ValueError(
            f"--context {args.context} is no longer than --base-context {args.base_context}, so nothing would be "
            "extended; give a longer one"
        )
    if args.eval_lengths is None:
        args.eval_lengths = [args.context]
        while args.eval_lengths[0] // 2 >= args.base_context:
            args.eval_lengths.insert(0, args.eval_lengths[0] // 2)
    if max(args.eval_lengths) > args.context:
        raise ValueError(f"--eval-lengths {max(args.eval_lengths)} is beyond --context {args.context}; give shorter")
    rivals = [method for method in args.methods if method.startswith(HICI_PREFIX)]
    if args.equal_time and (FULL not in args.methods or not rivals):
        raise ValueError("--equal-time gives full attention the time of HiCI; add full and a hici- method to --methods")
    needed = args.jobs > 1 or args.equal_time
    if args.profile_steps is None:
        args.profile_steps = 10 if needed else 0
    if args.profile_steps < 0:
        raise ValueError(f"--profile-steps {args.profile_steps} is below 0; give 0 for none")
    if needed and not args.profile_steps:
        raise ValueError(
            f"--profile-steps 0 with --jobs {args.jobs}{' --equal-time' * args.equal_time}, where a step must be timed "
            "by itself; give at least 1"
        )


class Comparison:
    """All runs of one comparison, and what is known of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        check(args)
        self.args = args
        self.shared = shared_values(args.overrides, args.context)
        self.runs_folder = args.scratch / "runs"
        self.failures: list[str] = []
        self.started = time.perf_counter()
        self.lock = threading.Lock()
        if args.eval_precision is None:
            args.eval_precision = "bfloat16" if self.on_gpu() else "float32"

    def run(self) -> int:
        """Everything, in order. 0, or 1 where a run failed."""
        self.target = self.check_outputs()
        self.base, self.data = self.prepare()
        self.profile = self.measure_profile()
        self.steps = dict.fromkeys(self.args.methods, self.args.steps)
        if self.args.equal_time:
            self.steps[FULL] = self.equal_time_steps()
        jobs = [(method, seed) for seed in self.args.seeds for method in self.args.methods]
        runs = [
            {"method": method, "seed": seed, "trained": result}
            for (method, seed), result in zip(jobs, self.train_all(jobs), strict=True)
            if result is not None
        ]
        if problems := check_same_data(runs):
            raise ValueError(f"no comparison at equal data: {'; '.join(problems)}")
        baselines = self.evaluate_all(runs)
        runs = [run for run in runs if run["evaluations"] is not None]
        return self.report(runs, {name: found for name, found in baselines.items() if found is not None})

    # ---- before the runs

    def check_outputs(self) -> Path | None:
        """The results' name without its ending; what is there is neither replaced nor mixed in silently."""
        args = self.args
        check_writable(args.scratch)
        if self.runs_folder.exists() and not args.resume:
            raise ValueError(f"{self.runs_folder} holds runs; give --resume to keep them, or another --scratch")
        if args.out is None:
            return None
        check_writable(args.out)
        target = Path(args.out / f"compare-{self.device_name()}-{args.context}-{datetime.date.today().isoformat()}")
        for file in (target.with_suffix(ending) for ending in (".json", ".md", ".png")):
            if file.exists() and not args.overwrite:
                raise ValueError(f"{file} exists, and nothing is overwritten silently; give another --out or "
                                 "--overwrite")  # fmt: skip
        return target

    def on_gpu(self) -> bool:
        import torch

        return self.shared.get("device", "auto") != "cpu" and torch.cuda.is_available()

    def device_name(self) -> str:
        import torch

        return torch.cuda.get_device_name().lower().removeprefix("nvidia ").split()[0] if self.on_gpu() else "cpu"

    def prepare(self) -> tuple[Path, Data]:
        """The cut base and the token files, and whether the first recipe and the longest windows are possible."""
        args = self.args
        find_books(args.books, args.test_book)
        base = cut_base(args.model, args.base_context, args.scratch)
        self.say(f"tokenising {args.books} (once)")
        data = prepare_data(args.books, args.test_book, base, args.scratch)
        for length in args.eval_lengths:
            disjoint_windows(data.facts["test_tokens"], length, None, args.eval_windows)
        self.say(f"{data.facts['training_tokens']:,} tokens of {len(data.facts['training_books'])} books to train on, "
                 f"{data.facts['test_tokens']:,} of {data.facts['test_book']} to test on")  # fmt: skip
        for method in args.methods:  # bad keys are seen here, not in the last run
            make_recipe(self.shared, method, 0, base=base, data=data.train, context=args.context, steps=args.steps,
                        output=args.scratch)  # fmt: skip
        return base, data

    # ---- runs

    def measure_profile(self) -> dict[str, dict[str, Any]]:
        """Short trainings, one at a time: seconds of each step, by method."""
        profile = {}
        warm_up = min(3, self.args.profile_steps)
        for method in self.args.methods if self.args.profile_steps else []:
            found = self.train((method, self.args.seeds[0]), profile=warm_up + self.args.profile_steps)
            if found is None and self.args.equal_time:
                raise ValueError(f"the profile of {method} failed, and --equal-time needs it: {self.failures[-1]}")
            if found is not None:
                profile[method] = {"step_seconds": found["step_seconds"], "warm_up": warm_up,
                                   "peak_memory_bytes": found["peak_memory_bytes"]}  # fmt: skip
        return profile

    def equal_time_steps(self) -> int:
        """Steps of full attention in the time of the slowest HiCI method; at most as many as the others'."""
        seconds = {name: median(timed(one["step_seconds"], one["warm_up"])) for name, one in self.profile.items()}
        hici = max(value for name, value in seconds.items() if name.startswith(HICI_PREFIX))
        steps = min(self.args.steps, int(self.args.steps * hici / seconds[FULL]))
        if steps < 1:
            raise ValueError(
                f"a step of full attention takes {seconds[FULL]:.1f} s, more than --steps {self.args.steps} of HiCI; "
                "give more --steps"
            )
        self.say(f"full attention gets {steps} steps in the time of {self.args.steps} of HiCI")
        return steps

    def train_all(self, jobs: list[tuple[str, int]]) -> list[dict[str, Any] | None]:
        """The results of `train`, --jobs at a time. Hours of work are never thrown away by a changed option."""
        for job in jobs:
            folder, spec = self.training(job)
            begun = folder / "trained-spec.json"
            if begun.exists() and (differences := changed(read_json(begun), spec)):
                raise ValueError(f"{folder} was begun with other settings ({differences}); give the same, or another "
                                 "--scratch")  # fmt: skip
        return self.at_a_time(self.train, jobs)

    def at_a_time(self, work: Callable[..., Any], items: Sequence[Any]) -> list[Any]:
        """`work` of every item in order, --jobs at a time."""
        pool = ThreadPoolExecutor(self.args.jobs)
        try:
            return list(pool.map(work, items))
        finally:
            pool.shutdown(cancel_futures=True)  # an interrupt must not begin the next ones

    def training(self, job: tuple[str, int], profile: int = 0) -> tuple[Path, dict[str, Any]]:
        """(folder, spec) of one training, or with `profile` steps of a short one."""
        (method, seed), args = job, self.args
        folder = self.runs_folder / (f"profile-{method}" if profile else f"{method}-seed{seed}")
        recipe = make_recipe(self.shared, method, seed, base=self.base, data=self.data.train, context=args.context,
                             steps=profile or self.steps[method], output=folder / "train",
                             profile=bool(profile))  # fmt: skip
        return folder, {"recipe": recipe.to_dict(), "data": self.data.facts["sha256"]}

    def train(self, job: tuple[str, int], profile: int = 0) -> dict[str, Any] | None:
        """Train, or take the finished result; None when it failed."""
        folder, spec = self.training(job, profile)
        return self.work("train", folder, "trained", spec, f"{spec['recipe']['max_steps']} steps")

    def evaluate_all(self, runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]] | None]:
        """Measure the bases, which are returned by name, and every run, which gets its `evaluations`."""
        bases = {UNTOUCHED: None, EXTENDED: self.args.context}
        base = {"base": str(self.base.resolve()), "rope": self.shared["rope"]}
        work = [(name, {**base, "extend_rope": positions}, [FULL]) for name, positions in bases.items()]
        for run in runs:
            attentions = [FULL, "hici"] if run["method"] == "hici-past" else [FULL]
            work.append((f"{run['method']}-seed{run['seed']}", {"adapter": run["trained"]["adapter"]}, attentions))
        found = self.at_a_time(lambda one: self.evaluate(*one), work)
        for run, evaluations in zip(runs, found[len(bases) :], strict=True):
            run["evaluations"] = evaluations
        return dict(zip(bases, found, strict=False))

    def evaluate(self, name: str, model: dict[str, Any], attentions: list[str]) -> list[dict[str, Any]] | None:
        """Perplexity runs of one model; None when that failed."""
        args = self.args
        folder = self.runs_folder / name.replace(", ", "-").replace(" ", "-")
        spec = {
            **model, "test": str(self.data.test.resolve()), "lengths": args.eval_lengths, "windows": args.eval_windows,
            "attentions": attentions, "precision": args.eval_precision, "device": self.shared.get("device", "auto"),
            # an adapter has the same name whatever it learned
            "trained": read_json(folder / "trained.json")["spec"] if "adapter" in model else None,
        }  # fmt: skip
        found = self.work("evaluate", folder, "evaluated", spec, f"lengths {args.eval_lengths}")
        return None if found is None else list(found["runs"])

    def work(self, task: str, folder: Path, name: str, spec: dict[str, Any], what: str) -> dict[str, Any] | None:
        """The worker's result of a spec, made unless it is there. None, and a line in `failures`, when it failed."""
        result_file, log = folder / f"{name}.json", folder / f"{name}.log"
        if result_file.exists():
            result = dict(read_json(result_file))
            if result["spec"] == spec_key(spec):
                self.say(f"{folder.name}: {task}, finished before")
                return result
        folder.mkdir(parents=True, exist_ok=True)
        for stale in (result_file, folder / "evaluated.json"):  # what is trained anew is evaluated anew
            stale.unlink(missing_ok=True)
        spec_file = write_json(folder / f"{name}-spec.json", spec)
        self.say(f"{folder.name}: {task}, {what} (log: {log})")
        code = start_worker(task, spec_file, result_file, log)
        if code or not result_file.exists():
            with self.lock:
                self.failures.append(
                    f"{folder.name}: {task} failed: {last_line(log, code)} in {log.relative_to(self.args.scratch)}"
                )
                self.say(self.failures[-1])
            return None
        result = dict(read_json(result_file))
        if task == "train":
            shutil.rmtree(folder / "train" / "checkpoints", ignore_errors=True)  # of use to unfinished runs alone
            self.say(f"{folder.name}: trained, {median(timed(result['step_seconds'])):.3g} s a step, "
                     f"{result['peak_memory_bytes'] / 2**30:.2f} GiB")  # fmt: skip
        return result

    def say(self, line: str) -> None:
        print(f"[{(time.perf_counter() - self.started) / 60:7.1f} min] {line}", flush=True)

    # ---- results

    def report(self, runs: list[dict[str, Any]], baselines: dict[str, list[dict[str, Any]]]) -> int:
        """Tables on the screen and in files, from the runs that did not fail."""
        args = self.args
        if not runs:
            raise ValueError(f"every run failed: {'; '.join(self.failures)}")
        for run in runs:
            del run["trained"]["adapter"]
        settings = {key: getattr(args, key) for key in (
            "context", "base_context", "methods", "seeds", "steps", "equal_time", "eval_lengths", "eval_windows",
            "eval_precision", "jobs", "profile_steps")}  # fmt: skip
        result = {
            "command": args.command, "settings": {**settings, "model": args.model.name},
            "recipe": {key: value for key, value in self.shared.items() if key not in PATHS}, "data": self.data.facts,
            "costs": costs(runs, self.profile), "comparisons": comparisons(make_series(runs, baselines)),
            "baselines": baselines, "runs": runs, "profile": self.profile, "failures": self.failures,
            "made_with": provenance(),
        }  # fmt: skip
        print(f"\n{tables(result)}")
        if self.target is not None:
            write_report(result, self.target)
            print(f"wrote {self.target}.json, .md and .png")
        return 1 if self.failures else 0


def report_again(file: Path, given: Sequence[str]) -> int:
    """Tables, verdicts and picture of a JSON file from its stored losses; what was measured stays as it is."""
    if len(given) > 2:
        raise ValueError(f"--report {file} takes all from that file; give it alone")
    if file.suffix != ".json" or not file.is_file():
        raise ValueError(f"--report {file} is no JSON file; give one that --out has made")
    result = dict(read_json(file))
    if missing := {"command", "settings", "data", "costs", "baselines", "runs", "profile", "failures"} - result.keys():
        raise ValueError(f"--report {file} lacks {', '.join(sorted(missing))}; give one that --out has made")
    result["comparisons"] = comparisons(make_series(result["runs"], result["baselines"]))
    result["report_made_with"] = {key: provenance()[key] for key in ("git_revision", "time_utc")}
    write_report(result, file.with_suffix(""))
    print(f"{tables(result)}\nwrote {file.with_suffix('')}.json, .md and .png")
    return 0


def start_worker(task: str, spec_file: Path, result_file: Path, log: Path) -> int:
    """Run compare_worker.py to its end; its exit code."""
    with log.open("w", encoding="utf-8") as output:
        command = [sys.executable, str(WORKER), task, str(spec_file), str(result_file)]
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode


def last_line(log: Path, code: int) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].strip() if lines else 'no output'} (exit code {code})"


if __name__ == "__main__":
    sys.exit(main())
