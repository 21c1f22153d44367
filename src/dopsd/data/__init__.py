"""From a folder of pictures and captions to batches of tensors: folder, then buckets, then cache, then loader."""
