"""What a run leaves: its folder, previews, exported weights, model card, report and tracker logs."""
