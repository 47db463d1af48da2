"""Calls of a cached step: lengths before and after, and the configuration of its model."""

from lumina_mgpt.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    image_code_offset=64,
    num_image_codes=32,
)


# Calls after a prompt of 9 ids, a row each: where they start, and how many ids. Windows are fed again from any place.
CALLS = (((9, 7), 1), ((10, 8), 2), ((12, 10), 1), ((13, 11), 11), ((15, 19), 11), ((20, 21), 1), ((21, 22), 2))
