"""The models that `train.py` trains."""
