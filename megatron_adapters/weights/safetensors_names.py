"""Names of the files of a Hugging Face folder."""

__all__ = ["ADAPTER_FILE", "INDEX_FILE", "SINGLE_FILE", "TOKENIZER_FILES"]

SINGLE_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# What belongs to the tokenizer and to generation, and goes along with the weights.
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
