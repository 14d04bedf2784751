"""Optimisers: Muon for matrices, AdamW for everything else, and the table that says which tensor is which.

`groups.py` holds that table, `muon.py` and `adamw.py` the two update rules, `schedule.py` the numbers that change over
a run, `clip.py` the global gradient norm.
"""
