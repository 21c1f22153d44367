"""How a model is evaluated: test prompts, pictures on fixed noise, scores, and a table with intervals."""
