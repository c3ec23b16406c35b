"""How far a merged adapter is from the unmerged one, in float32 and in the base's own dtype.

    make demo
    python benchmarks/merged.py runs/demo/adapter --text some-book.txt

float32: the largest difference of a logit. The base's dtype: the mean KL divergence from the unmerged model in float32,
of the unmerged and of the merged model, which round at different places.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="adapter directory")
    parser.add_argument("--text", type=Path, required=True, help="text to read")
    parser.add_argument("--tokens", type=int, default=5000)
    args = parser.parse_args()
    ids = read(args)
    exact = {mode: logits(args.adapter, ids, mode, "float32") for mode in ("full", "hici")}
    largest, apart = (
        max(x.abs().max().item() for x in exact.values()),
        (exact["full"] - exact["hici"]).abs().max().item(),
    )
    print(f"{ids.shape[1]:,} tokens; largest logit {largest:.1f}; full and hici differ by up to {apart:.1f}")
    with tempfile.TemporaryDirectory(prefix="hici-merged-") as scratch:
        for dtype in ("float32", None):
            for kind, mode in (("plain", "full"), ("hici", "hici")):
                target = merge(args.adapter, Path(scratch) / f"{kind}-{dtype}", kind, dtype)
                merged = merged_logits(target, ids)
                if dtype:
                    gap = (merged - exact[mode]).abs().max().item()
                    print(f"{kind}, float32: largest difference {gap:.2g}")
                else:
                    unmerged = divergence(exact[mode], logits(args.adapter, ids, mode, None))
                    print(
                        f"{kind}, the base's dtype: KL {divergence(exact[mode], merged):.2g} (unmerged {unmerged:.2g})"
                    )


def read(args: argparse.Namespace) -> Any:
    """Token ids [1, tokens]."""
    from transformers import AutoTokenizer

    from hici.adapters.contents import tokenizer_source

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(Path(args.adapter)))
    return tokenizer(args.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, : args.tokens]


def logits(adapter: str, ids: Any, mode: str, dtype: str | None) -> Any:
    """Logits of the unmerged adapter, as float32."""
    import hici

    return run(hici.from_pretrained(adapter, attention=mode, dtype=dtype), ids)


def merge(adapter: str, target: Path, kind: str, dtype: str | None) -> Path:
    import hici

    return hici.merge(adapter, target, kind, dtype=dtype)


def merged_logits(directory: Path, ids: Any) -> Any:
    """Logits of a merged directory through AutoModel, as float32."""
    from transformers import AutoModelForCausalLM

    return run(AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=True), ids)


def run(model: Any, ids: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def divergence(exact: Any, other: Any) -> float:
    """Mean KL(exact || other) over tokens, in nats."""
    p, q = exact.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


if __name__ == "__main__":
    main()
