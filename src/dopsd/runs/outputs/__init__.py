"""What a run leaves: its folder, previews, exported weights, model card, report, tracker logs."""
