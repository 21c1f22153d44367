"""From recipes to results: check, prepare, train and export a run."""
