"""lm-evaluation-harness: importing this package registers the model type "hici" with it.

lm-eval 0.4.13 looks for models in its own list only (it reads no entry points), so its command does not know "hici";
`python -m hici.eval.harness` is that command with "hici" in the list.
"""

from hici.eval.harness.model import HiCIModel

__all__ = ["HiCIModel"]
