"""Public benchmarks of text-to-image models: reads their prompt lists, and writes folders that their scorers read.

Nothing here imports torch or knows a model.
"""

from lumina_mgpt.benchmarks.layouts import BENCHMARKS, Benchmark

__all__ = ["BENCHMARKS", "Benchmark"]
