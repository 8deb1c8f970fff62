"""The operations, a folder each: public functions in `__init__.py`, the formula in `reference.py`."""
