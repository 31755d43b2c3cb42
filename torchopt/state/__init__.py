"""What a model in training carries beside its tensors: the step counter, and what tells that steps were taken as they should be."""
