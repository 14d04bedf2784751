"""Weights as files: safetensors folders, read and written tensor by tensor.

`header.py` is the file format, `files.py` reads and writes such files, `folder.py` makes a folder appear whole or not
at all; nothing in them knows a model. `names.py` maps our tensor names to the published ones, `stored.py` pairs FP8 and
FP4 codes with their scales. From there: `load.py` and `save.py` between a folder and a model (`place.py`, `target.py`),
`contents.py` with `convert.py`, `compare.py` and `summary.py` for folders alone, `synthetic.py` for made-up ones.
"""
