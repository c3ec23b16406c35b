"""The demo: SmolLM2-135M adapted on this machine's own text, and what that did, with intervals.

    make demo

On the same held-out tokens, paired by window: the base in full attention; the base cut into segments without slots;
after a short adaptation with visibility `past`, the model in full attention and in its own HiCI attention. Then one
window of 16K tokens, beyond the base's 8K (segments help there by themselves: no two tokens that see each other are
far apart). It passes when the adapted model in full attention is below the base, and in `past` below segments without
slots, both beyond the 95 % interval of the paired difference. At the end the model continues a long prompt in both
attentions: over a cache of all keys, and in memory that does not grow.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from smollm2 import smollm2
from stdlib_text import training_and_heldout

CONTEXT, WINDOWS, SEGMENT = 4096, 8, 2048
LONG_CONTEXT, LONG_SCORED = 16384, 8192  # scored: the half that lies beyond the base's positions
PROMPT_TOKENS, NEW_TOKENS = 8000, 60


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="where the converted model is kept")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    args = parser.parse_args()
    started = time.perf_counter()
    print("loading torch and transformers ...", flush=True)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base_directory = smollm2(args.cache)
    training, heldout = training_and_heldout(args.out / "text")
    print(f"text: {len(training)} documents to train on, {len(heldout)} held out", flush=True)

    stream = heldout_stream(base_directory, heldout)
    runs = measure_base(base_directory, stream)
    train_adapter(base_directory, training, args.out)
    adapted, samples = measure_adapted(args.out / "adapter", stream)
    runs |= adapted
    return report(runs, samples, args.out, time.perf_counter() - started)


def heldout_stream(base_directory: Path, heldout: list[str]) -> Any:
    """Tokens of all held-out documents in a row."""
    from transformers import AutoTokenizer

    from hici.data.stream import load_stream

    tokenizer = AutoTokenizer.from_pretrained(base_directory)
    return load_stream(heldout, tokenizer, vocab_size=len(tokenizer))[0]


def measure_base(base_directory: Path, stream: Any) -> dict[str, Any]:
    """The base in full attention, cut into segments without slots, and beyond its positions."""
    import hici

    model = load(base_directory)
    runs = {"base, full": measure(model, stream, "base, full")}
    hici.attach(model, hici.HiCIConfig(segment_size=SEGMENT, visibility="past", use_global=False, use_local=False))
    runs["base, segments"] = measure(model, stream, "base, segments")
    runs["16K base, segments"] = measure(model, stream, "16K base, segments")
    hici.detach(model)
    runs["16K base, full"] = measure(model, stream, "16K base, full")
    hici.extend_rope(model, LONG_CONTEXT)
    runs["16K base + rope, full"] = measure(model, stream, "16K base + rope, full")
    return runs


def train_adapter(base_directory: Path, training: list[str], out: Path) -> None:
    """Adapt by demo/recipe.yaml into `out`/adapter."""
    from hici.train.recipe import recipe_from_dict
    from hici.train.run import train

    values = yaml.safe_load((Path(__file__).parent / "recipe.yaml").read_text(encoding="utf-8"))
    recipe = recipe_from_dict({**values, "model": str(base_directory), "data": training, "output_dir": str(out)})
    print(f"adapting: {recipe.max_steps} steps of {recipe.context_length} tokens", flush=True)
    train(recipe)


def measure_adapted(adapter: Path, stream: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The adapted model, read back from its directory, in its own and in full attention; and samples."""
    import hici

    runs = {}
    model = hici.from_pretrained(adapter, attention="hici")
    runs["adapted, past"] = measure(model, stream, "adapted, past")
    runs["16K adapted, past"] = measure(model, stream, "16K adapted, past")
    model.set_attn_implementation("sdpa")
    runs["adapted, full"] = measure(model, stream, "adapted, full")
    return runs, generate(model, adapter, stream)


def load(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()


def measure(model: Any, stream: Any, name: str) -> Any:
    """Held-out loss, with a progress line: `WINDOWS` windows of 4K, or for a "16K" run the end of one 16K window."""
    from hici.eval.perplexity import perplexity

    def progress(done: int, total: int) -> None:
        print(f"\r  {name}: window {done} of {total}", end="", flush=True)

    if name.startswith("16K"):
        run = perplexity(model, stream, LONG_CONTEXT, stride=LONG_SCORED, max_windows=1, allow_beyond_rope=True,
                         progress=progress)  # fmt: skip
    else:
        run = perplexity(model, stream, CONTEXT, max_windows=WINDOWS, progress=progress)
    print(f", loss {run.loss.mean:.4f}, {run.seconds:.0f} s", flush=True)
    gc.collect()
    return run


def generate(model: Any, adapter: Path, stream: Any) -> list[dict[str, Any]]:
    """Greedy continuations of held-out text in full attention and in HiCI attention, and their caches."""
    from transformers import AutoTokenizer

    from hici.models.generate import generate as continue_prompt
    from hici.models.modes import set_attention
    from hici.models.session import Session

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    prompt = stream[:PROMPT_TOKENS].tolist()
    samples = []
    for attention in ("full", "hici"):
        set_attention(model, attention)
        session = Session(model)
        result = continue_prompt(session, tokenizer, prompt, max_new_tokens=NEW_TOKENS)
        samples.append({
            "attention": attention, "prompt_tokens": PROMPT_TOKENS, "prompt_end": tokenizer.decode(prompt[-60:]),
            "text": result.text, "read_seconds": result.read_seconds, "tokens_per_second": result.tokens_per_second,
            "cache_bytes": session.cache_bytes,
        })  # fmt: skip
    return samples


def report(runs: dict[str, Any], samples: list[dict[str, Any]], out: Path, seconds: float) -> int:
    """Table, JSON, plot, verdict: 0 when passed."""
    from hici.eval.perplexity import paired_difference
    from hici.files import write_json, write_text
    from hici.provenance import provenance

    checks = {}
    for new, old in (("adapted, full", "base, full"), ("adapted, past", "base, segments")):
        difference = paired_difference(runs[new], runs[old])
        assert difference.interval is not None  # several windows
        checks[f"{new} - {old}"] = {
            "mean": difference.mean,
            "interval": difference.interval,
            "passed": difference.interval[1] < 0,
        }
    print_tables(runs, checks, samples, seconds)
    write_json(out / "demo.json", {
        "runs": {name: run.to_dict() for name, run in runs.items()}, "checks": checks, "samples": samples,
        "seconds": seconds, "made_with": provenance(),
    })  # fmt: skip
    continued = "".join(f"\n--- continued in attention {x['attention']} ---\n{x['text']}\n" for x in samples)
    write_text(out / "sample.txt", f"... {samples[0]['prompt_end']}{continued}")
    plot(runs, out / "demo.png")
    passed = all(check["passed"] for check in checks.values())
    print(f"\n{out}/demo.json, demo.png, sample.txt, adapter/, train.json, train.png")
    print("PASSED" if passed else "NOT PASSED: an interval above does not lie below zero")
    return 0 if passed else 1


def print_tables(runs: dict[str, Any], checks: dict[str, Any], samples: list[dict[str, Any]], seconds: float) -> None:
    print(f"\nheld-out text, {WINDOWS} windows of {CONTEXT:,} tokens; the end of one window of {LONG_CONTEXT:,}")
    print(f"{'':28}{'loss':>9}{'95 % interval':>20}{'perplexity':>12}")
    for name, run in runs.items():
        interval = "" if run.loss.interval is None else "{:.3f} .. {:.3f}".format(*run.loss.interval)
        print(f"{name:28}{run.loss.mean:>9.4f}{interval:>20}{run.ppl:>12.2f}")
    print("\npaired by window (negative: better)")
    for name, check in checks.items():
        low, high = check["interval"]
        print(f"{name:40}{check['mean']:+.4f}  [{low:+.4f}, {high:+.4f}]  {'ok' if check['passed'] else 'NOT ok'}")
    for x in samples:
        print(f"\nattention {x['attention']}: {x['prompt_tokens']:,} tokens read in {x['read_seconds']:.0f} s, cache "
              f"{x['cache_bytes'] / 2**20:.0f} MiB, continued:\n  {x['text'].strip()[:300]}")  # fmt: skip
    print(f"\n{seconds / 60:.1f} minutes")


def plot(runs: dict[str, Any], target: Path) -> None:
    """Losses as points with intervals: 4K on the left, 16K on the right."""
    from hici.report.figures import new_figure, save_figure

    figure, axes = new_figure(columns=2, width=5.5)
    for axis, long in zip(axes, (False, True), strict=True):
        shown = {name: run for name, run in runs.items() if name.startswith("16K") == long}
        for row, (name, run) in enumerate(shown.items()):
            interval = run.loss.interval or (run.loss.mean, run.loss.mean)
            color = "tab:orange" if "adapted" in name else "tab:gray"
            axis.plot(interval, (row, row), color=color)
            axis.plot(run.loss.mean, row, "o", color=color)
        axis.set_yticks(range(len(shown)), [name.removeprefix("16K ") for name in shown])
        axis.invert_yaxis()
        axis.set_xlabel("held-out loss (nats a token)")
        title = (
            f"{LONG_CONTEXT:,} tokens: the second half, one window" if long else f"{CONTEXT:,} tokens, 95 % interval"
        )
        axis.set_title(title)
    save_figure(figure, target)


if __name__ == "__main__":
    sys.exit(main())
