"""An OpenAI-compatible server over the batched engine, with a playground at `/`; needs the `serve` extra."""
