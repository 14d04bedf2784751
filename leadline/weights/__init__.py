"""Weights as files: safetensors folders, read and written tensor by tensor.

`names.py` maps our tensor names to the published ones, `header.py` is the file format, `files.py` reads and writes
folders of such files, `folder.py` makes a folder appear whole or not at all, and `load.py` and `save.py` put them
together with a model.
"""
