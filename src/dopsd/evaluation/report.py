"""Placeholder until the real one lands."""

Panel = tuple


def write_report(run):
    return run


def write_comparison(*a):
    return a
