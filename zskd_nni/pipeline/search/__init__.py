"""NNI's experiments over a recipe's settings: above the pipeline, whose runs are their trials."""
