"""Results as the verbs write them, made by hand: every field of the schema, numbers like real ones, no model."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np

from hici.eval.results import SCHEMA
from hici.eval.statistics import weighted_estimate
from hici.eval.windows import OVERLAPPING

FULL = ("full", None)
PAST = ("hici", "past")
ALL = ("hici", "all")

_UNIT = {"published": OVERLAPPING, "strict": "window", "position": "window"}
_LEVEL = {FULL: 2.62, PAST: 2.66, ALL: 2.58, ("hici_s2", None): 2.71}


def condition(attention=FULL, context=4096, segment_size=1024):
    """What `hici.eval.conditions.describe_condition` gives."""
    mode, visibility = attention
    size = None if mode == "full" else min(segment_size, context)
    return {
        "attention": mode,
        "visibility": visibility,
        "causal": visibility not in ("all", "current"),
        "segment_size": size,
        "segments": None if size is None else -(-context // size),
        "context": context,
    }


def model(path="runs/adapter", *, adapter=True, rope="linear", dtype="float32"):
    """What a result says of its model."""
    return {
        "path": path,
        "kind": "adapter" if adapter else "plain",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_fingerprint": "sha256:" + "5f" * 32,
        "fingerprint": "sha256:" + ("a7" if adapter else "5f") * 32,
        "adapter_sha256": {"hici_model.safetensors": "c4" * 32, "adapter_model.safetensors": "9e" * 32}
        if adapter
        else None,
        "model_type": "llama",
        "dtype": dtype,
        "device": "cpu",
        "hici": {"num_local_slots": 8, "num_global_slots": 4, "visibility": "past"} if adapter else None,
        "rope": {
            "extended": rope if adapter else False,
            "positions_before": 8192,
            "positions": 16384 if adapter else 8192,
            "rope_parameters": {"rope_type": rope if adapter else "default", "rope_theta": 100000.0},
            "allow_beyond_rope": False,
        },
    }


def provenance(**changes):
    """What `hici.provenance.provenance` gives."""
    return {
        "hici": "0.1.0",
        "python": "3.12.3",
        "packages": {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.0", "numpy": "2.4.0"},
        "git_revision": "0123456789abcdef0123456789abcdef01234567",
        "machine": {"system": "Linux-6.8-x86_64", "cpu_threads": 2, "device": "cpu"},
        "time_utc": "2026-11-26T09:00:00+00:00",
    } | changes


def result(task, protocol, conditions, *, about=None, data="default", seed=None, **more):
    """The fields that every result has."""
    if data == "default":
        data = {"files": ["books/alice.txt", "books/moby.txt"], "documents": 2, "tokens": 412_117, "sha256": "b0" * 32}
    return {
        "schema": SCHEMA,
        "task": task,
        "protocol": protocol,
        "model": about,
        "data": data,
        "seed": seed,
        "conditions": conditions,
        "processes": 1,
        "provenance": provenance(),
        **more,
    }


def perplexity(
    contexts=(2048, 4096, 8192),
    attentions=(FULL, PAST, ALL),
    *,
    protocol="published",
    windows=16,
    shift=0.0,
    about=None,
    **more,
):
    """Loss falls with the context; `shift` is added to every window's loss: two runs differ by exactly that."""
    conditions = []
    for context in contexts:
        noise = np.random.default_rng(context).normal(0, 0.12, windows)  # of the text: the same for all attentions
        for attention in attentions:
            own = np.random.default_rng([context, *map(ord, str(attention))]).normal(0, 0.01, windows)
            losses = (_LEVEL[attention] - 0.06 * math.log2(context / 2048) + shift + noise + own).tolist()
            counts = [context - 1] * windows
            estimate = weighted_estimate(losses, counts)
            entry = condition(attention, context) | {
                "mean_loss": estimate.mean,
                "standard_error": estimate.standard_error,
                "loss_interval": estimate.interval,
                "ppl": math.exp(estimate.mean),
                "ppl_interval": None if estimate.interval is None else [math.exp(x) for x in estimate.interval],
                "tokens_scored": sum(counts),
                "seconds": windows * context / (900 if attention == FULL else 1400),
                "tokens_per_second": (2400 - 0.15 * context) if attention == FULL else 2100 - 0.01 * context,
                "peak_memory_bytes": int(2**30 * (0.8 + context / (8192 if attention == FULL else 16384))),
                "losses": losses,
                "counts": counts,
                "confidence": 0.95,
                "interval_method": f"Student's t, unit: {_UNIT[protocol]}",
                "groups": windows,
                "windows": _windows(protocol, context, windows),
            }
            if protocol == "position":
                entry["bins"] = _bins(context, estimate.mean)
            conditions.append(entry)
    modes = [mode for mode, _ in attentions]
    settings = {"name": protocol, "windows": "words", "contexts": list(contexts), "attentions": modes, "stride": 256,
                "max_windows": windows}  # fmt: skip
    record = result("perplexity", settings, conditions, about=about or model(), paired_differences=[], **more)
    return json.loads(json.dumps(record))


def _windows(protocol, context, windows):
    return {"context": context, "stride": 256, "starts": [256 * i for i in range(windows)], "available": 1400,
            "unused_tokens": 77, "unit": _UNIT[protocol], "groups": list(range(windows))}  # fmt: skip


def _bins(context, level):
    edges = [*(2**i for i in range(20) if 2**i < context), context]
    bins = []
    for first, after in itertools.pairwise(edges):
        loss = level + 1.6 / math.log2(after + 2)
        error = 0.25 / math.sqrt(after)
        bins.append(
            {"first": first, "last": after - 1, "tokens": (after - first) * 16, "mean_loss": loss,
             "standard_error": error, "interval": [loss - 2 * error, loss + 2 * error]}
        )  # fmt: skip
    return bins


def retrieval(
    contexts=(1024, 2048, 4096, 8192),
    depths=(0.0, 0.25, 0.5, 0.75, 1.0),
    attentions=(FULL, PAST),
    *,
    tasks=("passkey", "needle", "variables"),
    samples=20,
    skill=1.0,
    about=None,
):
    """Passkey by length and depth; the other tasks by length alone."""
    conditions = []
    generator = np.random.default_rng(7)
    for task in tasks:
        for attention in attentions:
            for context in contexts:
                for depth in depths if task == "passkey" else (None,):
                    hard = 0.04 * math.log2(context / 512) * (1 + (0.8 if depth in (0.25, 0.5) else 0))
                    hard += 0.25 if attention == PAST and context > 2048 else 0.0
                    chance = min(1.0, max(0.0, skill * (1.03 - hard)))
                    right = int(generator.binomial(samples, chance))
                    conditions.append(_retrieval_entry(task, attention, context, depth, right, samples))
    settings = {"name": "retrieval", "tasks": list(tasks), "lengths": list(contexts), "samples": samples,
                "options": {task: {"words": len(task)} for task in tasks}}  # fmt: skip
    record = result("retrieval", settings, conditions, about=about or model(), data=None, seed=0)
    return json.loads(json.dumps(record))


def _retrieval_entry(task, attention, context, depth, right, samples):
    low, high = wilson(right, samples)
    answers = [{"expected": "71432", "answer": "71432" if i < right else "7143", "correct": i < right,
                "prompt_tokens": context - 7, "seed": i} for i in range(samples)]  # fmt: skip
    return condition(attention, context) | {
        "task": task,
        "depth": depth,
        "samples": samples,
        "accuracy": right / samples,
        "accuracy_interval": [low, high],
        "prompt_tokens": [context - 30, context - 3],
        "seconds": samples * context / 900,
        "peak_memory_bytes": 2**30,
        "answers": answers,
    }


def wilson(right, samples, z=1.959963984540054):
    """Wilson's score interval, written out."""
    share, extra = right / samples, z * z / samples
    middle = (share + extra / 2) / (1 + extra)
    half = z * math.sqrt(share * (1 - share) / samples + extra / (4 * samples)) / (1 + extra)
    return middle - half, middle + half


def longbench(attentions=(FULL, PAST), *, shift=0.0, about=None):
    """Scores in percent by dataset."""
    scores = {"narrativeqa": 18.7, "qasper": 24.31, "hotpotqa": 31.9, "gov_report": 27.8, "trec": 70.5, "lcc": 61.2}
    conditions = [
        condition(attention, 3500)
        | {
            "dataset": name,
            "score": score + shift - (1.5 if attention == PAST else 0.0),
            "samples": 200,
            "metric": "f1",
        }
        for attention in attentions
        for name, score in scores.items()
    ]
    return result("longbench", {"name": "longbench", "edit_similarity": "levenshtein"}, conditions,
                  about=about or model())  # fmt: skip


_FILES = {"directory": "there", "files": {"trec.jsonl": 999}, "sha256": {"trec.jsonl": "ab" * 32}}


def scored_predictions():
    """`hici score longbench`."""
    scores = {"narrativeqa": 17.15, "qasper": 25.02, "trec": 68.0, "lcc": 63.44}
    return result("score", {"name": "longbench", "edit_similarity": "levenshtein"}, [], scores=scores,
                  metrics=dict.fromkeys(scores, "qa_f1"), samples=dict.fromkeys(scores, 200), data=_FILES)  # fmt: skip


def scored_topics():
    """`hici score topics`."""
    accuracy = {"5": 100.0, "10": 96.0, "15": 88.0, "25": 60.0}
    return result("score", {"name": "topics", "rule": "words"}, [], accuracy=accuracy, data=_FILES)


def lm(about=None):
    """`hici eval lm`."""
    numbers = {("arc_easy", "acc,none"): (0.5612, 0.0102), ("hellaswag", "acc_norm,none"): (0.4301, 0.0049),
               ("piqa", "acc,none"): (0.6741, 0.0109)}  # fmt: skip
    conditions = [
        condition(FULL, None)
        | {"task_name": name, "metric": metric, "value": value, "standard_error": error, "higher_is_better": True}
        for (name, metric), (value, error) in numbers.items()
    ]
    return result("lm", {"name": "lm-eval", "version": "0.4.13"}, conditions, about=about or model(), data=None, seed=0)


def inspect(layers=12, heads=6, segments=4, *, about=None):
    """`hici inspect`: shares that sum to one, similarities of a cosine."""
    generator = np.random.default_rng(3)
    depth = np.linspace(0, 1, layers)[:, None]
    to_global = 0.05 + 0.12 * np.sin(math.pi * depth) + generator.uniform(-0.02, 0.02, (layers, heads))
    to_local = 0.22 - 0.13 * depth + generator.uniform(-0.04, 0.04, (layers, heads))
    shares = {"global": to_global, "local": to_local, "tokens": 1 - to_global - to_local}
    later = {"global": 0.005, "local": 0.005, "tokens": -0.01}
    by_segment = {name: value.mean(axis=1, keepdims=True) + later[name] * np.arange(segments)
                  for name, value in shares.items()}  # fmt: skip
    distance = np.abs(np.subtract.outer(np.arange(segments), np.arange(segments)))
    similarity = {
        "local": np.stack([(0.9 - 0.5 * x) ** distance for x in depth[:, 0]]),
        "global": np.stack([(0.98 - 0.2 * x) ** distance for x in depth[:, 0]]),
    }
    entry = condition(PAST, 4096) | {
        "layers": layers,
        "layer_numbers": list(range(layers)),
        "shares": {name: value.tolist() for name, value in shares.items()},
        "by_segment": {name: value.tolist() for name, value in by_segment.items()},
        "slot_similarity": {name: value.tolist() for name, value in similarity.items()},
    }
    return result("inspect", {"name": "inspect", "backend": "reference"}, [entry], about=about or model())


def write(path, record):
    """A result's file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))
    return path


def training_run(directory, *, steps=60, method="hici", visibility="all", slope=1.0):
    """A run's output_dir with metrics.jsonl."""
    generator = np.random.default_rng(steps)
    hici = method == "hici"
    entries = [
        {"event": "start", "step": 0, "method": method, "visibility": visibility if hici else None,
         "leaks_future": {"hici": hici and visibility != "past", "full": False},
         "clips": {"hici": 0.3, "other": 1.0}, "total_steps": steps, "context_length": 4096},
        {"event": "heldout", "step": 0, "losses": {"full": 3.6, **({"hici": 3.9} if hici else {})}},
    ]  # fmt: skip
    for i in range(1, steps + 1):
        loss = 2.7 + slope * math.exp(-i / 15) + generator.normal(0, 0.05)
        entry = {"step": i, "loss": loss, "other_grad_norm": 1.2 + math.exp(-i / 9), "learning_rate": 2e-5,
                 "tokens": 4096, "seconds": 1.9, "tokens_per_second": 2150.0 + 20 * math.sin(i),
                 "peak_memory_bytes": 3 * 2**30}  # fmt: skip
        entries.append(entry | ({"hici_grad_norm": 0.2 + 2 / i, "hici_learning_rate": 2e-4} if hici else {}))
    entries.append({"event": "heldout", "step": steps, "losses": {"full": 2.8, **({"hici": 2.75} if hici else {})}})
    entries.append({"event": "end", "step": steps, "seconds": 1.9 * steps})
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return directory


def training_comparison():
    """What `benchmarks/compare.py --out` leaves: two methods, two seeds, one base."""

    def evaluation(mean, context):
        losses = [mean - 0.1 * i for i in (-1, 0, 1)]
        return {"attention": "full", "visibility": None, "leaks_future": False, "segments": None, "segment_size": None,
                "mean_loss": mean, "ppl": math.exp(mean), "losses": losses, "counts": [context - 1] * 3,
                "stream_sha256": "d1" * 32,
                "windows": {"context": context, "starts": [0, context, 2 * context]}}  # fmt: skip

    def run(method, seed, mean):
        trained = {"steps": 20, "tokens": 20 * 4096, "step_seconds": [0.5] * 20, "peak_memory_bytes": 2**31,
                   "losses": [mean + 1 - 0.05 * i + 0.01 * seed for i in range(20)]}  # fmt: skip
        return {"method": method, "seed": seed, "trained": trained, "made_with": provenance(),
                "evaluations": [evaluation(mean, 2048), evaluation(mean - 0.1, 4096)]}  # fmt: skip

    runs = [
        run(method, seed, mean + 0.02 * seed) for method, mean in (("full", 3.0), ("hici-past", 2.9)) for seed in (0, 1)
    ]
    differences = [
        {"a": "hici-past", "minus": "full", "length": length, "seeds": [0, 1], "verdict": "hici-past lower",
         "loss_difference": -0.1, "by_seed": [-0.1, -0.1], "interval_windows": [-0.12, -0.08],
         "interval_windows_and_seeds": [-0.15, -0.05], "confidence": 0.95, "windows": 3}
        for length in (2048, 4096)
    ]  # fmt: skip
    costs = {name: {"runs": 2, "steps": [20], "tokens": [81920], "seconds_per_step": 0.5, "step_minutes": 0.17,
                    "timed": "in the runs", "peak_memory_bytes": 2**31} for name in ("full", "hici-past")}  # fmt: skip
    return {"command": "--steps 20", "settings": {"model": "SmolLM2", "base_context": 2048, "context": 4096},
            "recipe": {}, "data": {"sha256": "d1" * 32}, "costs": costs, "comparisons": differences,
            "baselines": {"base, untouched": [evaluation(3.5, 2048), evaluation(5.0, 4096)]}, "runs": runs,
            "profile": {}, "failures": [], "made_with": provenance()}  # fmt: skip


def write_everything(root):
    """A base, an adapter with its training, scores of predictions, and a comparison: arguments of `hici report`."""
    base = model("HuggingFaceTB/SmolLM2-135M-Instruct", adapter=False)
    write(root / "base" / "ppl.json", perplexity(attentions=(FULL,), about=base, shift=0.04))
    write(root / "base" / "ppl-strict.json",
          perplexity(attentions=(FULL,), protocol="strict", about=base, shift=0.06))  # fmt: skip
    write(root / "base" / "position.json",
          perplexity((8192,), (FULL,), protocol="position", about=base, shift=0.05))  # fmt: skip
    write(root / "base" / "retrieval.json", retrieval(attentions=(FULL,), skill=0.93, about=base))
    write(root / "base" / "longbench.json", longbench((FULL,), shift=-2.0, about=base))
    write(root / "base" / "lm.json", lm(about=base))
    adapter = training_run(root / "adapter")
    about = model("runs/adapter")
    write(adapter / "eval" / "ppl.json", perplexity(about=about))
    write(adapter / "eval" / "ppl-strict.json", perplexity(attentions=(FULL, PAST), protocol="strict", about=about))
    write(adapter / "eval" / "position.json", perplexity((8192,), protocol="position", about=about))
    write(adapter / "eval" / "retrieval.json", retrieval(about=about))
    write(adapter / "eval" / "longbench.json", longbench(about=about))
    write(adapter / "eval" / "lm.json", lm(about=about))
    write(adapter / "eval" / "inspect.json", inspect(about=about))
    write(root / "published" / "longbench.json", scored_predictions())
    write(root / "published" / "topics.json", scored_topics())
    write(root / "compare.json", training_comparison())
    training_run(root / "full", method="full", slope=1.4)
    return [root / "base", adapter, root / "published", root / "full", root / "compare.json"]
