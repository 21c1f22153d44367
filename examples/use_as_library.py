"""dopsd as a library: a recipe, a generator of steps, and images from the LoRA file.

python -m dopsd.pocket images runs/pocket-thing
python examples/use_as_library.py
"""

from pathlib import Path

from dopsd import load_recipe, sample, train

recipe = load_recipe(
    Path("recipes/pocket-identity-dopsd.yaml"),
    changes=["run_name=library", "train.max_steps=60", "sample.every=0"],
)

# A run is a generator: log, stop or do something else between two optimizer steps. It has saved
# when it ends.
for report in train(recipe):
    print(f"step {report.step}  loss {report.log['loss']:.4f}  {report.seconds:.2f} s")

lora = recipe.run_folder / f"{recipe.run_name}.safetensors"
caption = (recipe.data.folder / "0.txt").read_text(encoding="utf-8").strip()
prompts = [caption, "a big red hut in the middle on paper"]
for index, image in enumerate(sample(recipe.model.name_or_path, prompts, lora=lora, seed=1)):
    image.save(recipe.run_folder / f"sample_{index}.png")
