"""Recipes, LoRA files and models side by side: same data, prompts, noise and metrics."""
