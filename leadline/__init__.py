"""leadline: DeepSeek-V4, whole and exact, in Python."""

__version__ = "0.1.0"
