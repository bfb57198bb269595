"""Methods for vision-language models: one frozen dataclass and one file each, loaded on first use."""
