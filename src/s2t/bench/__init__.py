"""`s2t bench`: decoding, collecting and training timed on one machine, each against a baseline of the same run."""

from s2t.bench.run import bench

__all__ = ["bench"]
