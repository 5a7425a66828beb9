"""The benchmarks are scripts in a folder of their own; some of their parts are worth a test."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))
