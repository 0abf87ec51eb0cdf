"""What the tests of both `fuse` benchmarks share: the folder's modules and tiny sizes."""

import argparse
import dataclasses
import importlib
import sys

from cuda_sources import ROOT

FOLDER = ROOT / "benchmarks"
OPTIONS = argparse.Namespace(device="cpu", layers=1, rounds=2)
STAMP = {"gpu": None, "cpu": "C", "threads": 1, "torch": "", "commit": "abc", "date": ""}


def benchmark(name):
    """A module of `benchmarks/`, whose folder is on the path while it is imported."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


def use_tiny_model(module, monkeypatch):
    """Instead of T5-base."""
    shape = benchmark("t5_cases").Shape
    tiny = shape("tiny", H=32, D=48, heads=4, d_kv=8, layers=1, vocabulary=40)
    monkeypatch.setattr(module, "SHAPES", (tiny, tiny))


def small(case, rows=4):
    """The case with few tokens."""
    return dataclasses.replace(case, B=rows, source=6, target=3)
