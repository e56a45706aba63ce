"""Everything that touches Hugging Face models: loading, prompts, caches, the engine and the adapter."""
