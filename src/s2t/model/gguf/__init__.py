"""GGUF files: what stands in one, its tokenizer, and the engine that runs it by llama.cpp.

`file` and `tokenizer` need neither torch weights nor llama.cpp; `library` and all above it need the extra `gguf`.
"""
