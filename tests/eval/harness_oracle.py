"""Log-likelihoods of whole documents by lm-evaluation-harness's own model and windows. Nothing here is a test.

What lm-eval 0.4.13 does for a document:
* tokens: `tokenizer.encode(text)` with the tokenizer's own special tokens, unless the text begins with the prefix
  token's text; so a tokenizer that puts BOS before every text has it among the tokens, and that BOS is scored.
* prefix: the tokenizer's BOS where it has one, else its EOS, whether or not the tokenizer adds it itself.
* windows of C tokens: the first reads the prefix and tokens 0..C-2 and scores tokens 0..C-1. Each later one scores the
  next `stride` tokens, the last one those that are left; each reads the C tokens before its last target, so the last
  window reads tokens that were read before, and has a whole context.
"""

import copy

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window


def harness_model(model, tokenizer, max_length, **options):
    """lm-eval's `hf` around a loaded plain model (it ties weights anew, which PEFT's copies do not survive)."""
    return HFLM(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), max_length=max_length, backend="causal", **options
    )


def harness_rolling_loss(model, tokenizer, documents, max_length, stride=None):
    """(sum of the documents' log-likelihoods in nats, number of tokens that they are of).

    `stride` None: `HFLM.loglikelihood_rolling` itself, whose windows do not overlap (stride = max_length) but for the
    last. Else the same with lm-eval's windows for context_len = max_length - stride + 1.
    """
    lm = harness_model(model, tokenizer, max_length)
    encoded = [lm.tok_encode(text) for text in documents]
    tokens = sum(map(len, encoded))
    if stride is None:
        requests = [
            Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=i)
            for i, text in enumerate(documents)
        ]
        return sum(lm.loglikelihood_rolling(requests, disable_tqdm=True)), tokens
    windows = [
        (None, *make_disjoint_window(window))
        for ids in encoded
        for window in get_rolling_token_windows(ids, lm.prefix_token_id, max_length, max_length - stride + 1)
    ]
    return sum(score for score, _ in lm._loglikelihood_tokens(windows, disable_tqdm=True)), tokens
