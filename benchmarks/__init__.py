"""Speed and memory, each against a named peer or limit measured in the same run."""

import os

# Before TensorFlow is imported, here or in a worker: it reports on hardware it lacks.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
