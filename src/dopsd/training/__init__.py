"""Optimizer loop, weights of student, teacher and base, adapters, memory savers, checkpoints."""
