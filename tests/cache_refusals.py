"""What tests of a HiCICache's refusals expect in messages, and how they generate. Nothing here is a test."""

DYNAMIC = r"transformers\.DynamicCache\(config=model\.config\)"
RAW = rf"pass {DYNAMIC} for the published decode over raw keys \(decode='raw' in the config, --decode raw\)"
GENERATE = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
