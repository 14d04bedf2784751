"""DeepSeek-V4 on one device: every noun of the report in the file of that name."""
