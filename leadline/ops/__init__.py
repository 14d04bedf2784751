"""Operations: one folder each, with the public function and its contract in `__init__.py` and its meaning in
`reference.py`. A reference is plain PyTorch, linear in memory, and runs anywhere; it is the specification, the CPU
product and the oracle of every faster implementation.
"""
