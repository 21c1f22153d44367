"""What the numbers in a run's report mean, one sentence each."""

HEALTH = {
    "sharpness": "mean of the steepest 5% of the slopes in an image, over the base model's; "
    "unhealthy below its limit (blur)",
    "roughness": "mean absolute Laplacian in the flatter half of an image, over the base model's; "
    "unhealthy above its limit (speckle, blocks)",
    "diversity": "distance between the two images of a prompt, over the base model's; unhealthy "
    "below its limit (images become alike)",
    "nfe_gap": "distance between the images at one and at two times the sampler's steps, over the "
    "base model's; unhealthy above its limit (the few-step ability is lost)",
    "text": "CLIP similarity of image and prompt, over the base model's; unhealthy below its limit",
    "drift": "distance to the base model's image on the same noise, over the distance between its "
    "images on other noise; unhealthy above its limit (0 is no change)",
}
HEALTH_COLUMNS = {
    "standard error": "of the value, over prompts; a value is unhealthy when it is beyond its "
    "limit and further from no change than two standard errors",
    "noise floor": "what the base model shows against itself on other noise; a smaller change says "
    "nothing",
}
DISTANCE = "root mean square difference of the pixel values (0 to 1)"

LOSS = (
    "What the method minimises. Its scale depends on the method and the noise: judge a run by its "
    "images and its health."
)
TRAINING = {
    "grad_norm": "Norm of the gradient of all trained weights, before clipping.",
    "retention": "Squared distance to the base model's velocity on the replay prompts.",
    "anchor": "Squared distance of the student's one-step images to the base model's.",
    "subject": "The part of the loss on your images.",
    "prior": "The part of the loss on the class images.",
    "pairs": "Pairs that count in a step.",
    "margin": "How much more the student prefers the winner of a pair than the base model does.",
    "accuracy": "Share of pairs whose margin is above 0.",
    "saturated": "Share of pairs whose margin is so large that they hardly teach any more.",
    "winner_error": "Error on the winner of a pair, minus the base model's where there is one.",
    "loser_error": "Error on the loser of a pair, minus the base model's where there is one.",
    "score": "Mean reward of the generated images.",
    "diversity": "Distance between the two generated images of a prompt, in latents.",
}
AT_STEPS = "By step of the sampler: 0 is the noisiest."
AT_TIMES = {
    "pull_cosine": "By range of t (1 is noise): cosine between teacher - student and the student's "
    "error against the training image, (z - image) / t - student. 1: the teacher leads to that "
    "image; near 0: it does not show it at this noise level.",
    "pull_ratio": "By range of t (1 is noise): length of teacher - student over the length of the "
    "student's error against the training image.",
}
