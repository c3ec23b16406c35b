"""Names of the files of an adapter directory. Imports nothing, so that the command line can look before torch loads."""

RECORD_FILE = "hici_config.json"
HICI_FILE = "hici_model.safetensors"
LORA_CONFIG_FILE = "adapter_config.json"
LORA_FILE = "adapter_model.safetensors"
PICKLED_LORA_FILE = "adapter_model.bin"
TRAINABLE_FILE = "trainable_params.bin"

ALL = (RECORD_FILE, HICI_FILE, LORA_CONFIG_FILE, LORA_FILE, PICKLED_LORA_FILE, TRAINABLE_FILE)
