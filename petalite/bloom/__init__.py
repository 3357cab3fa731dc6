"""BLOOM in plain torch: configuration, blocks, KV cache, checkpoints, model id (spec: model).

Nothing here knows about networks. From the bottom: `config` (what config.json says), `blocks` (the formulas), `cache`
(rows of keys and values), `span` (consecutive blocks as a server runs them), `checkpoint` and `loading` (safetensors to
modules), `quantize` (int8 weights), `manifest` (the model id), `synthetic` (made-up checkpoints for tests).
"""
