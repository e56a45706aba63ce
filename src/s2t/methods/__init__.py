"""What is decided at a step: triggers, selectors and sampling. They see a `Round`; no cache, no server and no file."""
