"""NNI experiments over a recipe's settings; a trial makes its student with the pipeline."""
