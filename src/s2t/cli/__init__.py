"""The command line: one file per command, each of which parses, calls and prints.

Knows no model and no method; whatever is heavy is imported inside the command that needs it.
"""
