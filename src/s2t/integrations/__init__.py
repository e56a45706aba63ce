"""Adapters to tools that people already use, one module each; every one needs that tool's extra."""
