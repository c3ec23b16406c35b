"""What the drop-in modules `llama_attn_hici` and `qwen3_attn_hici` share. Importing it changes nothing.

`modules` holds what their functions do, `loading` what `PeftModel.from_pretrained` does for a model that they
registered. Only the use of a drop-in module has effects on the whole process; nothing else in `hici` imports this.
"""
