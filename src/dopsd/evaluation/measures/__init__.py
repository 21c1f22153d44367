"""What is measured of pictures: one file a model or a formula, loaded when it is asked for. Pictures come as float
tensors in [0, 1]; nothing here knows which model painted them."""
