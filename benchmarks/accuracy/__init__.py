"""Three trained models in every preset, beside float: quality, size, speed; `make accuracy`."""
