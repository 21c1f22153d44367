"""What a run leaves: folder, previews, exported weights, metadata, model card, report, trackers."""
