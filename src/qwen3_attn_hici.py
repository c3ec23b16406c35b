"""The published module `qwen3_attn_hici` on top of hici: the same names, so that a model card's code runs unchanged.

Constants are read at every forward call. What differs from the published module: docs/dropin.md.
"""

from __future__ import annotations

from typing import Any

from hici.dropin import loading as _loading
from hici.dropin import modules as _modules

CONTEXT_LENGTH: int | None = None  # tokens a released adapter was trained for; None: its name tells (-16k)

MIXED_GROUP_TRAINING = False
GROUP_SIZE_RATIOS = [1 / 2, 1 / 4, 1 / 8]
group_size_ratio = 1 / 4
USE_FIXED_SEGMENT_SIZE = False
FIXED_SEGMENT_SIZE = 1024
USE_FULL_ATTN_WITH_HICI = True
CAUSAL_CONTEXT_MODE = "causal_gi"

CHOICE = _modules.Choice()  # set by replace_qwen3_attn; before that, HiCI attention


def replace_qwen3_attn(
    use_flash_attn: bool = True,
    use_full: bool = False,
    inference: bool = False,
    use_hierarchical_forward: bool = False,
) -> None:
    """Choose the attention of all registered models, from their next forward call on.

    Args:
        use_flash_attn: flash-attn's kernel for full attention, where it is installed; else sdpa, which is logged.
        use_full: full attention, also with the others (logged).
        inference, use_hierarchical_forward: HiCI attention, which is also what nothing chosen gives.
    """
    global CHOICE
    CHOICE = _modules.choose(
        _modules.QWEN3,
        use_flash_attn=use_flash_attn,
        use_full=use_full,
        inference=inference,
        use_hierarchical_forward=use_hierarchical_forward,
    )


def register_hici_to_qwen3_model(
    model: Any,
    num_local_slots: int | None = None,
    global_slots: int = 4,
    num_heads: int = 8,
    use_bottleneck: bool = True,
    bottleneck_dim: int = 512,
    use_local_constructor: bool = True,
    use_global_integrator: bool = True,
    use_local_constructor_flash: bool = False,
    use_attn_init: bool = False,
    use_shared_compressor: bool = True,
    compress_dim: int = 512,
    shared_compress_dim: int = 128,
    ds_config_path: str | None = None,
    *,
    num_memory_slots: int | None = None,
) -> Any:
    """Put HiCI modules on a Qwen3 model, in place. `PeftModel.from_pretrained` then loads HiCI directories whole.

    `num_local_slots` (None: 8) and `num_memory_slots` are one number. `compress_dim` counts for independent
    compressors (`use_shared_compressor=False`) only, as published.

    Returns:
        The same model.

    Raises:
        ValueError: a PEFT model, one that has HiCI modules already, one of another type; options that contradict each
            other or have no meaning here (use_attn_init, ds_config_path).
    """
    return _modules.register(
        _modules.QWEN3,
        model,
        num_local_slots=num_local_slots,
        num_memory_slots=num_memory_slots,
        global_slots=global_slots,
        num_heads=num_heads,
        use_bottleneck=use_bottleneck,
        bottleneck_dim=bottleneck_dim,
        use_local_constructor=use_local_constructor,
        use_global_integrator=use_global_integrator,
        use_local_constructor_flash=use_local_constructor_flash,
        use_attn_init=use_attn_init,
        use_shared_compressor=use_shared_compressor,
        compress_dim=compress_dim,
        shared_compress_dim=shared_compress_dim,
        ds_config_path=ds_config_path,
    )


register_hici_to_model = register_hici_to_qwen3_model  # the name in the model cards


# now, since Python looks `PeftModel.from_pretrained` up before it evaluates its arguments (a nested register call)
_loading.wrap_peft()
