"""Training a little beside a frozen base, and its files: LoRA through PEFT, HiCI modules, one directory."""
