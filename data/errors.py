"""What is raised where a file is not what it should be."""

__all__ = ["DataError"]


class DataError(ValueError):
    """A file does not hold what it should; the message is one line with the file and the record."""
