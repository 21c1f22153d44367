"""From a folder of images and captions to batches of tensors: folder, then buckets, then cache,
then loader."""
