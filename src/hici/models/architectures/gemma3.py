"""Gemma 3, the text model: tokens get q_norm and k_norm, slots do not (they enter behind them).

Five of six layers have a sliding window: segments must not be longer than it. Rope parameters are by layer type.
"""

from hici.models.architectures import gemma2

ARCHITECTURE = gemma2.Gemma(model_types=("gemma3_text",), norms=(*gemma2.ARCHITECTURE.norms, "q_norm", "k_norm"))
