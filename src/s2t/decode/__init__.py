"""One decoding loop, and the triggers, selectors and strategies that plug into it."""
