"""Models behind an OpenAI-compatible completions API (vLLM and others): the client, and the LLM read through it."""
