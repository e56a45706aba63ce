"""The method in tools other than our own; each file needs its tool alone."""
