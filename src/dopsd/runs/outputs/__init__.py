"""What a run leaves: its folder, previews, exported weights, metadata, card, report, trackers."""
